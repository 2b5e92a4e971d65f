"""What is masked may hold anything: NaN or inf there reaches no loss and no gradient. What counts is not hidden."""

import in_float64
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import MASK, assert_close, every_linear_loss, every_loss, step_of
from quick import as_one, quick_jit
from rows import B, D, T, V

from raft_jax.losses import (
    TiedEmbedding,
    cross_entropy,
    linear_cross_entropy,
    linear_top_k_forward_kl,
    sequence_mean,
    sequence_weight,
    token_mean,
    token_weight,
)

EVERYWHERE = np.ones((B, T), bool)


@every_loss
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_garbage_at_masked_places(row, bad):
    """The gradients without it are those of differences (test_contract.py)."""
    student, fixed = row.student(), row.fixed()
    want = step_of(row)(student, fixed, MASK)[1:]

    def broken(arrays):
        first = arrays[0].copy()
        first[~MASK] = bad if first.dtype.kind == "f" else 10**6
        return first, *arrays[1:]

    for arrays in (broken(student), fixed), (student, broken(fixed)), (broken(student), broken(fixed)):
        assert_close(step_of(row)(*arrays, MASK)[1:], want)


@every_loss
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_garbage_that_counts_is_seen(row, bad):
    """In the student or the teacher: loss NaN, gradient NaN."""
    student, fixed = row.student(), row.fixed()
    for side in range(1 + row.distils):
        arrays = [student, fixed]
        broken = arrays[side][0].copy()
        broken[0, 1] = bad
        arrays[side] = (broken, *arrays[side][1:])
        loss_BT, means, grads = step_of(row)(*arrays, MASK)
        np.testing.assert_array_equal(np.isnan(loss_BT), np.arange(T) == np.array([[1], [-1]]))
        assert np.isnan(means).all()
        assert np.isnan(grads[0][0][0, 1]).any() and all(np.isnan(x).any() for x in grads[0])
        assert np.isfinite(grads[0][0][1]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_garbage_without_a_label(bad):
    """Label -100: as if the token were not there, though its loss of 0 is in the mean. NumPy in float64 says what."""
    random = np.random.default_rng(0)
    hidden, unembedding = (random.normal(size=size).astype(np.float32) for size in [(B, T, D), (D, V)])
    labels = np.where(MASK, random.integers(0, V, (B, T)), -100)
    logits = hidden @ unembedding
    probs = np.stack([[in_float64.softmax(np.float64(x)) for x in row] for row in logits])
    dlogits = probs - np.eye(V)[np.maximum(labels, 0)]
    dlogits *= MASK[..., None] / (B * T)
    want_hidden, want_unembedding = dlogits @ unembedding.T, np.einsum("btd,btv->dv", hidden, dlogits)
    hidden[~MASK] = logits[~MASK] = bad

    def unreduced(hidden, unembedding):
        return sequence_mean(linear_cross_entropy(hidden, unembedding, labels, chunk_size=4), EVERYWHERE)

    def weighted(hidden, unembedding):
        weight_BT = sequence_weight(EVERYWHERE)
        tied = TiedEmbedding(unembedding.T)
        return linear_cross_entropy(hidden, tied, labels, weight_BT=weight_BT, chunk_size=4)

    for loss in unreduced, weighted:
        grads = quick_jit(jax.grad(loss, (0, 1)))(hidden, unembedding)
        assert_close(grads, (want_hidden, want_unembedding))
    grad = jax.grad(lambda logits: token_mean(cross_entropy(logits, labels), EVERYWHERE))(logits)
    assert_close(grad, dlogits)


@every_linear_loss
def test_garbage_in_the_padding_of_the_vocabulary(row):
    """Columns beyond vocab_size may be NaN, in both models; they have no part in anything and gradient 0."""
    student, fixed = row.student(vocabulary=150), row.fixed(vocabulary=150)
    garbage = np.full((D, 20), np.nan, np.float32)
    settings = {"vocab_size": 150} | ({"weight_BT": sequence_weight(MASK)} if row.weighted else {})

    def loss(student, fixed):
        value = row.loss(*student, *fixed, **settings)
        return value if row.weighted else sequence_mean(value, MASK)

    def padded(arrays):
        return arrays[0], np.concatenate([arrays[1], garbage], axis=1)

    step = quick_jit(jax.value_and_grad(loss))
    value, (hidden_grad, head_grad) = step(padded(student), padded(fixed) if row.distils else fixed)
    _, means, (grads, *_) = step_of(row)(student, fixed, MASK)
    assert_close((value, hidden_grad, head_grad[:, :150]), (means[0], *grads))
    assert not head_grad[:, 150:].any()


def test_a_label_in_the_padding_is_no_token():
    logits, labels = np.zeros((1, 2, 6), np.float32), np.array([[4, 3]])
    hidden, unembedding = np.ones((1, 2, 3), np.float32), np.zeros((3, 6), np.float32)
    for loss_BT in (
        as_one(cross_entropy, logits, labels, vocab_size=4),
        as_one(linear_cross_entropy, hidden, unembedding, labels, vocab_size=4),
    ):
        assert np.isnan(loss_BT[0, 0])
        np.testing.assert_allclose(loss_BT[0, 1], np.log(4), rtol=1e-6)
    grad = jax.grad(lambda x: cross_entropy(x, labels, vocab_size=4).sum())(logits)
    assert np.isnan(grad[0, 0]).any() and np.isfinite(grad[0, 1]).all() and not grad[0, 1, 4:].any()


def test_masks_of_integers():
    values, mask = np.array([[1.0, 3.0], [8.0, np.nan]], np.float32), np.array([[2, 7], [1, 0]])
    assert sequence_mean(values, mask) == 5 and token_mean(values, mask) == 4
    np.testing.assert_allclose(sequence_weight(mask), [[0.25, 0.25], [0.5, 0]])
    np.testing.assert_allclose(token_weight(mask), [[1 / 3, 1 / 3], [1 / 3, 0]], rtol=1e-6)


def test_a_nan_teacher_that_was_kept():
    hidden, unembedding = np.ones((1, 2, 3), np.float32), np.eye(3, 6, dtype=np.float32)
    teacher = np.zeros((1, 2, 4), np.float32), np.eye(4, 6, dtype=np.float32)
    teacher[0][0, 0, 0] = np.nan

    def loss(hidden):
        return linear_top_k_forward_kl(hidden, unembedding, *teacher, k=2).sum(where=jnp.array([[True, False]]))

    value, grad = jax.value_and_grad(loss)(hidden)
    assert np.isnan(value) and np.isnan(grad[0, 0]).any() and not grad[0, 1].any()
