"""What every loss keeps, row by row."""

import jax
import jax.numpy as jnp
import losses_twin as twin
import numpy as np
import pytest
from rows import ROWS, B, T

from raft_jax.losses import sequence_mean, token_mean

MASK = np.array([[True, True, False, True, True], [True, False, False, True, False]])
every_loss = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
every_distilling_loss = pytest.mark.parametrize("row", [r for r in ROWS if r.distils], ids=lambda row: row.name)
every_linear_loss = pytest.mark.parametrize("row", [r for r in ROWS if r.linear], ids=lambda row: row.name)


def mean(row, student, fixed, mask=MASK):
    return sequence_mean(row.loss(student, fixed), mask)


def value_and_grad(row, student, fixed, mask=MASK):
    return jax.jit(jax.value_and_grad(lambda student: mean(row, student, fixed, mask)))(student)


def assert_close(got, want, rtol=2e-5, atol=2e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), got, want)


@every_loss
def test_jit_is_eager_is_twin(row):
    student, fixed = row.student(), row.fixed()
    nats_BT = row.loss(student, fixed)
    assert nats_BT.shape == (B, T) and nats_BT.dtype == jnp.float32
    assert_close(jax.jit(row.loss)(student, fixed), nats_BT)
    assert_close(nats_BT, row.twin(student, fixed))


@every_loss
def test_gradient_is_that_of_differences(row):
    """Of the float64 twin, so that the differences are not ours either."""
    student, fixed = row.student(), row.fixed()
    _, got = value_and_grad(row, student, fixed)
    weight = MASK / MASK.sum(-1, keepdims=True) / B
    wide = [x.astype(np.float64) for x in student]
    for place, x in enumerate(wide):
        want = twin.gradient(
            lambda x, place=place: (row.twin([*wide[:place], x, *wide[place + 1 :]], fixed) * weight).sum(), x
        )
        assert_close(got[place], want, rtol=1e-4, atol=2e-6)


@every_loss
def test_masked_is_subset(row):
    """Values and gradients of masked tokens are those of a batch that never had them; whatever stands there."""
    student, fixed = row.student(), row.fixed()
    mask = np.arange(T) < 3
    broken = (np.where(mask[:, None], student[0], np.inf), *student[1:])
    value, grad = value_and_grad(row, (student[0], *student[1:]), fixed, np.broadcast_to(mask, (B, T)))
    short = (student[0][:, :3], *student[1:])
    short_fixed = (fixed[0][:, :3], *fixed[1:])
    short_value, short_grad = value_and_grad(row, short, short_fixed, np.ones((B, 3), bool))
    assert_close(value, short_value)
    assert_close(grad[0][:, :3], short_grad[0])
    assert not grad[0][:, 3:].any()
    assert_close(grad[1:], short_grad[1:])
    assert np.isfinite(sequence_mean(row.loss(broken, fixed), np.broadcast_to(mask, (B, T))))


@every_loss
def test_micro_batches_add_up(row):
    student, fixed = row.student(), row.fixed()
    value, grad = value_and_grad(row, student, fixed)
    parts = [
        value_and_grad(row, (student[0][b : b + 1], *student[1:]), (fixed[0][b : b + 1], *fixed[1:]), MASK[b : b + 1])
        for b in range(B)
    ]
    assert_close(value, np.mean([part[0] for part in parts]))
    assert_close(grad[0], np.concatenate([part[1][0] for part in parts]) / B)
    if row.linear:
        assert_close(grad[1], np.mean([part[1][1] for part in parts], axis=0))


@every_loss
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_in_float32_out(row, dtype):
    student, fixed = row.student(), row.fixed()
    narrow = jax.tree.map(lambda x: jnp.asarray(x, dtype) if x.dtype == np.float32 else x, (student, fixed))
    nats_BT = row.loss(*narrow)
    assert nats_BT.dtype == jnp.float32
    same = jax.tree.map(lambda x: np.asarray(x, np.float32) if x.dtype == dtype else x, narrow)
    assert_close(nats_BT, row.loss(*same), rtol=1e-5, atol=1e-5)
    _, grad = value_and_grad(row, *narrow)
    assert all(x.dtype == dtype for x in grad)
    _, wide = value_and_grad(row, *same)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.float32(x), y, rtol=0.03, atol=2e-3), grad, wide)


@every_linear_loss
def test_linear_is_logits_variant(row):
    student, fixed = row.student(), row.fixed()
    got = value_and_grad(row, student, fixed)
    want = jax.value_and_grad(lambda s: sequence_mean(row.of_logits(s, fixed), MASK))(student)
    assert_close(got, want)


@every_distilling_loss
def test_identical_distributions_give_0(row):
    student = row.student()
    nats_BT = jax.jit(row.loss)(student, student)
    if "jensen" in row.name:
        assert_close(nats_BT, np.zeros((B, T)))
    else:
        assert not nats_BT.any()
    _, grad = value_and_grad(row, student, student)
    assert_close(grad, jax.tree.map(np.zeros_like, grad))


@every_distilling_loss
def test_no_gradient_to_the_teacher(row):
    grads = jax.jit(jax.grad(lambda fixed: mean(row, row.student(), fixed)))(row.fixed())
    assert not any(np.any(x) for x in grads)


@every_loss
def test_nothing_unmasked_gives_0(row):
    nothing = np.zeros((B, T), bool)
    value, grad = value_and_grad(row, row.student(), row.fixed(), nothing)
    assert value == 0 and not any(np.any(x) for x in grad)
    assert token_mean(row.loss(row.student(), row.fixed()), nothing) == 0


@every_loss
def test_one_token(row):
    student, fixed = row.student(), row.fixed()
    one = (student[0][:1, :1], *student[1:]), (fixed[0][:1, :1], *fixed[1:])
    assert_close(row.loss(*one), row.loss(student, fixed)[:1, :1])


@every_loss
def test_under_vmap_scan_and_checkpoint(row):
    student, fixed = row.student(), row.fixed()
    want = value_and_grad(row, student, fixed)

    def many(student):
        inner = jax.checkpoint(lambda x: mean(row, (x, *student[1:]), fixed))
        mapped = jax.vmap(inner)(jnp.stack([student[0]] * 2))
        scanned = jax.lax.scan(lambda total, x: (total + inner(x), None), 0.0, jnp.stack([student[0]] * 2))[0]
        return (mapped.sum() + scanned) / 4

    assert_close(jax.jit(jax.value_and_grad(many))(student), want)
