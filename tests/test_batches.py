"""Batches are a function of the step, every row comes once an epoch, and nothing is cut."""

import jax
import numpy as np
import pytest

from raft_jax.data.batches import Batches, TokenRow, pad, token_capacities, token_capacity

PAD = 0
LANES = {"length_multiple": 128}


def rows(count, longest=30):
    random = np.random.default_rng(3)

    def ids():
        return random.integers(1, 9, random.integers(1, longest)).tolist()

    return [TokenRow(ids(), ids(), ids(), number) for number in range(count)]


def unpadded(batch):
    """The batch's rows as lists, by the masks alone."""
    sides = batch.prompt, batch.answer, batch.teacher_prompt
    return [
        TokenRow(*(side.ids[row][side.mask[row]].tolist() for side in sides), int(number))
        for row, number in enumerate(batch.row_ids)
    ]


@pytest.mark.parametrize(("count", "batch_size", "buckets"), [(12, 4, 1), (13, 4, 3), (7, 7, 2), (5, 1, 5), (29, 4, 6)])
def test_an_epoch_has_every_row_at_most_once_and_whole(count, batch_size, buckets):
    data = rows(count)
    batches = Batches(data, batch_size, seed=5, pad_id=PAD, length_buckets=buckets)
    assert batches.steps_per_epoch == count // batch_size
    orders = []
    for epoch in range(3):
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        seen = [row for step in steps for row in unpadded(batches.at(step))]
        assert len({row.number for row in seen}) == len(seen) == batches.steps_per_epoch * batch_size
        assert all(row == data[row.number] for row in seen)
        orders.append([row.number for row in seen])
    if count > 7:
        assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize(
    ("count", "batch_size", "buckets"),
    [
        (47, 16, 3),
        (47, 16, 1),
        (13, 4, 2),
        (13, 4, 13),
        (31, 16, 4),
        (48, 16, 5),
        (9, 8, 3),
        (17, 5, 50),
        (100, 7, 6),
    ],
)
@pytest.mark.parametrize("seed", [0, 5])
def test_all_rows_are_used_equally_often(count, batch_size, buckets, seed):
    batches = Batches(rows(count), batch_size, seed=seed, pad_id=PAD, length_buckets=buckets)
    uses = np.zeros(count, int)
    for epoch in range(50):
        for index in range(batches.steps_per_epoch):
            uses += np.bincount(batches.at(epoch * batches.steps_per_epoch + index).row_ids, minlength=count)
        # Each epoch leaves out less than a batch, and in turn: no row is ever two uses behind another.
        assert uses.sum() == (epoch + 1) * (count - count % batch_size)
        assert uses.max() <= epoch + 1 and uses.max() - uses.min() <= 1


def test_a_batch_is_a_function_of_seed_and_step():
    data = rows(20)
    one, other = (Batches(data, 4, seed=1, pad_id=PAD, length_buckets=2) for _ in range(2))
    forwards = [one.at(step) for step in range(11)]
    for step in (10, 3, 7, 0, 3):
        jax.tree.map(np.testing.assert_array_equal, forwards[step], other.at(step))
    reseeded = Batches(data, 4, seed=2, pad_id=PAD, length_buckets=2)
    assert any((reseeded.at(step).row_ids != forwards[step].row_ids).any() for step in range(5))


def test_there_are_no_more_shapes_than_buckets_and_they_pad_less():
    data = rows(64, longest=80)
    sizes = {}
    for buckets in (1, 4):
        batches = Batches(data, 4, seed=1, pad_id=PAD, length_buckets=buckets)
        made = [batches.at(step) for step in range(3 * batches.steps_per_epoch)]
        shapes = {(batch.prompt.ids.shape, batch.answer.ids.shape, batch.teacher_prompt.ids.shape) for batch in made}
        assert len(shapes) <= buckets
        assert all(length % 8 == 0 for shape in shapes for _, length in shape)
        sizes[buckets] = sum(batch.prompt.ids.size + batch.answer.ids.size for batch in made)
    assert sizes[4] < sizes[1]


@pytest.mark.parametrize(("num_shards", "num_micro_batches"), [(1, 1), (2, 1), (2, 2), (4, 1)])
def test_max_tokens_hold_every_batch_of_their_bucket_and_no_more(num_shards, num_micro_batches):
    batches = Batches(
        rows(64, longest=80),
        4,
        seed=1,
        pad_id=PAD,
        length_buckets=3,
        epochs=3,
        num_shards=num_shards,
        num_micro_batches=num_micro_batches,
    )
    needed = {}
    for step in range(3 * batches.steps_per_epoch):
        sides = batches.at(step)[:3]
        counts = [
            max(
                int(part[m::num_micro_batches].sum())
                for part in np.split(side.mask, num_shards)
                for m in range(num_micro_batches)
            )
            for side in sides
        ]
        shape = tuple((side.max_tokens, side.ids.shape) for side in sides)
        needed[shape] = np.maximum(needed.get(shape, 0), counts)
    assert len(needed) == 3
    for shape, counts in needed.items():
        most = np.array([max_tokens for max_tokens, _ in shape])
        assert (counts <= most).all() and (most < counts + 8).all()


def test_max_tokens_count_what_all_prompts_begin_with_once():
    asked = [[1, 2, 3, *range(10 * n, 11 * n)] for n in (9, 20, 14, 30)]
    data = [TokenRow(row, [5] * 8, [1, 2, 4, 4, 7, *row], n) for n, row in enumerate(asked)]
    batch = Batches(data, 4, seed=0, pad_id=PAD).at(0)
    # Prompts of 3 + 73 tokens, counted once what is the same; teacher prompts begin with eight that are.
    assert (batch.prompt.shared_prefix, batch.answer.shared_prefix, batch.teacher_prompt.shared_prefix) == (3, 0, 8)
    assert (batch.prompt.max_tokens, batch.teacher_prompt.max_tokens) == (80, 88)  # 73 + 3 and 73 + 8, in eights
    apart = Batches(data, 4, seed=0, pad_id=PAD, share_prefixes=False).at(0)
    assert (apart.prompt.shared_prefix, apart.prompt.max_tokens) == (0, 88)  # 73 + 4 x 3


def test_capacities_of_rollouts_come_in_quarters():
    found = {token_capacity(count, 30) for count in range(31)}
    assert found == {0, 8, 16, 24, 30}
    assert all(token_capacity(count, 30) >= count for count in range(31))


def test_lengths_are_multiples_of_what_kernels_want():
    data = rows(64, longest=200)
    eights, lanes = (Batches(data, 4, seed=5, pad_id=PAD, length_buckets=4, **more) for more in ({}, LANES))
    lengths = set()
    for step in range(eights.steps_per_epoch):
        assert [side.max_tokens for side in eights.at(step)[:3]] == [side.max_tokens for side in lanes.at(step)[:3]]
        assert unpadded(eights.at(step)) == unpadded(lanes.at(step))
        for one, other in zip(eights.at(step)[:3], lanes.at(step)[:3], strict=True):
            assert other.length == -(-one.length // 128) * 128
            lengths.add(other.length)
    assert lengths == {128, 256}


@pytest.mark.parametrize("most", [1, 2, 3, 5, 16, 130])
def test_all_capacities_are_known(most):
    assert token_capacities(most) == sorted({token_capacity(count, most) for count in range(1, most + 1)})


@pytest.mark.parametrize("steps", [range(12), range(3, 5), range(7, 8)])
def test_one_batch_of_each_shape(steps):
    batches = Batches(rows(29), 4, seed=5, pad_id=PAD, length_buckets=3, epochs=2)

    def shape(batch):
        structure = jax.tree.structure(batch)  # has the token capacities
        return structure, tuple(leaf.shape for leaf in jax.tree.leaves(batch))

    found = [shape(batch) for batch in batches.one_of_each_shape(steps)]
    assert len(set(found)) == len(found) and set(found) == {shape(batches.at(step)) for step in steps}


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"train\.batch_size 4 does not divide over 2 shards of the mesh in 4 micro"):
        Batches(rows(8), 4, seed=0, pad_id=PAD, num_shards=2, num_micro_batches=4)


def test_padding_stands_outside_and_the_masks_say_so():
    batch = Batches(rows(4), 4, seed=0, pad_id=PAD).at(0)
    for side, left in ((batch.prompt, True), (batch.answer, False), (batch.teacher_prompt, True)):
        assert side.mask.dtype == bool and side.mask.any(axis=1).all()
        steps = np.diff(side.mask.astype(int), axis=1)
        assert (steps >= 0 if left else steps <= 0).all()
        assert side.mask[:, -1 if left else 0].all()
        assert side.ids.dtype == np.int32
    assert batch.row_ids.dtype == np.int32
    assert (batch.prompt.ids[~batch.prompt.mask] == PAD).all()


def test_a_method_without_teacher_has_no_teacher_prompts():
    data = [TokenRow(row.prompt, row.answer, [], row.number) for row in rows(4)]
    assert Batches(data, 2, seed=0, pad_id=PAD).at(0).teacher_prompt.ids.shape == (2, 0)


def test_too_few_rows_and_too_long_ones_are_refused():
    with pytest.raises(ValueError, match=r"3 rows do not fill one batch of 4; lower train\.batch_size"):
        Batches(rows(3), 4, seed=0, pad_id=PAD)
    with pytest.raises(ValueError, match="row 1 has 3 tokens, and the length is 2"):
        pad([[1], [1, 2, 3]], 2, PAD, left=True)
