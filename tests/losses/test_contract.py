"""What every loss keeps, row by row: its numbers."""

import in_float64
import jax
import jax.numpy as jnp
import numpy as np
from contract import MASK, assert_close, every_distilling_loss, every_loss, step_of
from quick import used_jit
from rows import B, T


@every_loss
def test_jit_is_eager_is_float64(row):
    student, fixed = row.student(), row.fixed()
    loss_BT = row.unreduced(student, fixed)
    assert loss_BT.shape == (B, T) and loss_BT.dtype == jnp.float32
    assert_close(step_of(row)(student, fixed, MASK)[0], loss_BT)
    assert_close(loss_BT, row.losses_in_numpy(student, fixed))


@every_loss
def test_gradient_is_that_of_differences(row):
    """Of the losses in float64 NumPy, so that the differences are not ours either."""
    student, fixed = row.student(), row.fixed()
    _, _, grads = step_of(row)(student, fixed, MASK)
    weight = MASK / MASK.sum(-1, keepdims=True) / B
    wide = [x.astype(np.float64) for x in student]
    for place, x in enumerate(wide):

        def mean(x, place=place):
            return (row.losses_in_numpy([*wide[:place], x, *wide[place + 1 :]], fixed) * weight).sum()

        want = in_float64.gradient(mean, x)
        assert_close(grads[0][place], want, rtol=1e-4, atol=2e-6)


@every_loss
def test_masked_is_subset(row):
    """A batch whose second row is masked is the first row alone; garbage in the second reaches no mean."""
    student, fixed, first = row.student(), row.fixed(), MASK & np.array([[True], [False]])
    _, means, grads = step_of(row)(student, fixed, first)
    _, subset, subset_grads = step_of(row)(*one_row(student, fixed, 0), MASK[:1])
    assert_close((2 * means[0], means[1]), subset)
    assert not grads[0][0][1].any()
    assert_close(2 * grads[0][0][:1], subset_grads[0][0])
    assert_close(jax.tree.map(lambda x: 2 * x, grads[0][1:]), subset_grads[0][1:])
    broken = student[0].copy()
    broken[1] = np.inf
    assert_close(step_of(row)((broken, *student[1:]), fixed, first)[1], means)


def one_row(student, fixed, b):
    return (student[0][b : b + 1], *student[1:]), (fixed[0][b : b + 1], *fixed[1:])


@every_loss
def test_micro_batches_add_up(row):
    student, fixed = row.student(), row.fixed()
    _, means, grads = step_of(row)(student, fixed, MASK)
    parts = [step_of(row)(*one_row(student, fixed, b), MASK[b : b + 1]) for b in range(B)]
    assert_close(means[0], np.mean([part[1][0] for part in parts]))
    assert_close(grads[0][0], np.concatenate([part[2][0][0] for part in parts]) / B)
    assert_close(grads[0][1:], jax.tree.map(lambda *x: np.mean(x, axis=0), *[part[2][0][1:] for part in parts]))


@every_distilling_loss
def test_identical_distributions_give_exactly_0(row):
    student = row.student()
    assert not row.unreduced(student, student).any()
    assert not used_jit(row.unreduced)(student, student).any()  # as compiled for use: fused, contracted
    _, _, grads = step_of(row)(student, student, MASK)
    assert_close(grads, jax.tree.map(np.zeros_like, grads))


@every_distilling_loss
def test_no_gradient_to_the_teacher(row):
    _, _, (_, teacher_grads) = step_of(row)(row.student(), row.fixed(), MASK)
    assert not any(x.any() for x in jax.tree.leaves(teacher_grads))


@every_loss
def test_nothing_unmasked_gives_0(row):
    _, means, grads = step_of(row)(row.student(), row.fixed(), np.zeros((B, T), bool))
    assert means == (0, 0) and not any(x.any() for x in jax.tree.leaves(grads))
