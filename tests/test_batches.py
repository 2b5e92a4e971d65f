"""Batches are a function of the step, every row comes once an epoch, and nothing is cut."""

import numpy as np
import pytest

from raft_jax.data.batches import Batches, Room, TokenRow, pad

PAD = 0


def rows(count, longest=30):
    random = np.random.default_rng(3)

    def ids():
        return random.integers(1, 9, random.integers(1, longest)).tolist()

    return [TokenRow(ids(), ids(), ids(), number) for number in range(count)]


def unpadded(batch):
    """The batch's rows as lists, by the masks alone."""
    sides = ((batch.prompt_BP, batch.prompt_mask_BP), (batch.answer_BA, batch.answer_mask_BA),
             (batch.teacher_prompt_BQ, batch.teacher_prompt_mask_BQ))
    return [
        TokenRow(*(tokens[row][mask[row]].tolist() for tokens, mask in sides), int(number))
        for row, number in enumerate(batch.row_B)
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


@pytest.mark.parametrize(("count", "batch_size", "buckets"), [
    (47, 16, 3), (47, 16, 1), (13, 4, 2), (13, 4, 13), (31, 16, 4), (48, 16, 5), (9, 8, 3), (17, 5, 50), (100, 7, 6),
])
@pytest.mark.parametrize("seed", [0, 5])
def test_all_rows_are_used_equally_often(count, batch_size, buckets, seed):
    batches = Batches(rows(count), batch_size, seed=seed, pad_id=PAD, length_buckets=buckets)
    uses = np.zeros(count, int)
    for epoch in range(50):
        for index in range(batches.steps_per_epoch):
            uses += np.bincount(batches.at(epoch * batches.steps_per_epoch + index).row_B, minlength=count)
        # Each epoch leaves out less than a batch, and in turn: no row is ever two uses behind another.
        assert uses.sum() == (epoch + 1) * (count - count % batch_size)
        assert uses.max() <= epoch + 1 and uses.max() - uses.min() <= 1


def test_a_batch_is_a_function_of_seed_and_step():
    data = rows(20)
    one, other = (Batches(data, 4, seed=1, pad_id=PAD, length_buckets=2) for _ in range(2))
    forwards = [one.at(step) for step in range(11)]
    for step in (10, 3, 7, 0, 3):
        for a, b in zip(forwards[step], other.at(step), strict=True):
            np.testing.assert_array_equal(a, b)
    reseeded = Batches(data, 4, seed=2, pad_id=PAD, length_buckets=2)
    assert any((reseeded.at(step).row_B != forwards[step].row_B).any() for step in range(5))


def test_there_are_no_more_shapes_than_buckets_and_they_pad_less():
    data = rows(64, longest=80)
    sizes = {}
    for buckets in (1, 4):
        batches = Batches(data, 4, seed=1, pad_id=PAD, length_buckets=buckets)
        made = [batches.at(step) for step in range(3 * batches.steps_per_epoch)]
        shapes = {(batch.prompt_BP.shape, batch.answer_BA.shape, batch.teacher_prompt_BQ.shape) for batch in made}
        assert len(shapes) <= buckets
        assert all(length % 8 == 0 for shape in shapes for _, length in shape)
        sizes[buckets] = sum(batch.prompt_BP.size + batch.answer_BA.size for batch in made)
    assert sizes[4] < sizes[1]


@pytest.mark.parametrize(("num_parts", "num_micro_batches"), [(1, 1), (2, 1), (2, 2), (4, 1)])
def test_rooms_hold_every_batch_of_their_class_and_no_more(num_parts, num_micro_batches):
    batches = Batches(rows(64, longest=80), 4, seed=1, pad_id=PAD, length_buckets=3)
    num_steps = 3 * batches.steps_per_epoch
    rooms = batches.rooms(num_steps, num_parts, num_micro_batches)
    needed = {}
    for step, room in enumerate(rooms):
        batch = batches.at(step)
        masks = batch.prompt_mask_BP, batch.answer_mask_BA, batch.teacher_prompt_mask_BQ
        counts = [
            max(int(part[m::num_micro_batches].sum()) for part in np.split(mask, num_parts)
                for m in range(num_micro_batches))
            for mask in masks
        ]
        shape = (room, *(mask.shape for mask in masks))
        needed[shape] = np.maximum(needed.get(shape, 0), counts)
    assert len(rooms) == num_steps and len(needed) == 3
    for (room, *_), counts in needed.items():
        assert (counts <= room[:3]).all() and (np.array(room[:3]) < counts + 8).all()


def test_rooms_count_what_all_prompts_begin_with_once():
    asked = [[1, 2, 3, *range(10 * n, 11 * n)] for n in (9, 20, 14, 30)]
    data = [TokenRow(row, [5] * 8, [1, 2, 4, 4, 7, *row], n) for n, row in enumerate(asked)]
    batches = Batches(data, 4, seed=0, pad_id=PAD)
    # Prompts of 3 + 73 tokens, counted once what is the same; teacher prompts begin with eight that are.
    (room,) = batches.rooms(1)
    assert (room.shared_prompt, room.shared_teacher_prompt) == (3, 8)
    assert (room.prompt, room.teacher_prompt) == (80, 88)  # 73 + 3 and 73 + 8, in eights
    (apart,) = batches.rooms(1, share=False)
    assert (apart.shared_prompt, apart.prompt) == (0, 88)  # 73 + 4 x 3


def test_room_for_rollouts_comes_in_quarters():
    found = {Room(1, 1, 1).with_rollout(count, 30).rollout for count in range(31)}
    assert found == {0, 8, 16, 24, 30}
    assert all(Room(1, 1, 1).with_rollout(count, 30).rollout >= count for count in range(31))


def test_there_is_no_room_where_rows_do_not_divide():
    assert Batches(rows(8), 4, seed=0, pad_id=PAD).rooms(2, 4, 2) is None


def test_padding_stands_outside_and_the_masks_say_so():
    batch = Batches(rows(4), 4, seed=0, pad_id=PAD).at(0)
    sides = ((batch.prompt_mask_BP, True), (batch.answer_mask_BA, False), (batch.teacher_prompt_mask_BQ, True))
    for mask, left in sides:
        assert mask.dtype == bool and mask.any(axis=1).all()
        steps = np.diff(mask.astype(int), axis=1)
        assert (steps >= 0 if left else steps <= 0).all()
        assert mask[:, -1 if left else 0].all()
    for tokens in (batch.prompt_BP, batch.answer_BA, batch.teacher_prompt_BQ, batch.row_B):
        assert tokens.dtype == np.int32
    assert (batch.prompt_BP[~batch.prompt_mask_BP] == PAD).all()


def test_a_method_without_teacher_has_no_teacher_prompts():
    data = [TokenRow(row.prompt, row.answer, [], row.number) for row in rows(4)]
    assert Batches(data, 2, seed=0, pad_id=PAD).at(0).teacher_prompt_BQ.shape == (2, 0)


def test_too_few_rows_and_too_long_ones_are_refused():
    with pytest.raises(ValueError, match=r"3 rows do not fill one batch of 4; lower train\.batch_size"):
        Batches(rows(3), 4, seed=0, pad_id=PAD)
    with pytest.raises(ValueError, match="row 1 has 3 tokens, and the length is 2"):
        pad([[1], [1, 2, 3]], 2, PAD, left=True)
