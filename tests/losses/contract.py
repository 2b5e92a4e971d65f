"""What the tests of the contract share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick_jit
from rows import ROWS

MASK = np.array([[True, True, False, True, True], [True, False, False, True, False]])


def each(rows):
    return pytest.mark.parametrize("row", rows, ids=lambda row: row.name)


every_loss = each(ROWS)
every_linear_loss = each([row for row in ROWS if row.linear])
every_distilling_loss = each([row for row in ROWS if row.distils])


@functools.cache
def step_of(row):
    """(student, fixed, mask) -> (losses, means, gradients of the first mean), compiled once for the whole file."""

    def loss(student, fixed, mask):
        means = row.means(student, fixed, mask)
        return means[0], (row.unreduced(student, fixed), means)

    def step(student, fixed, mask):
        floating = row.distils  # labels have no gradient to be asked for
        (_, seen), grads = jax.value_and_grad(loss, (0, 1) if floating else (0,), has_aux=True)(student, fixed, mask)
        return *seen, grads

    return quick_jit(step)


def unreduced_and_grad(loss):
    """(x, *others) -> (the loss of each token, the gradient of their sum with respect to x), compiled."""

    def run(x, *others):
        loss_BT, pullback = jax.vjp(lambda x: loss(x, *others), x)
        return loss_BT, pullback(jnp.ones_like(loss_BT))[0]

    return quick_jit(run)


def assert_close(got, want, rtol=2e-5, atol=2e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), got, want)
