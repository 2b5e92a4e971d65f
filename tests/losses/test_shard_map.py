"""Under `jax.shard_map` each device has its rows and all of the vocabulary."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from quick import quick_jit
from rows import ROWS

SIZES = {"batch": 4, "vocabulary": 300}
MASK = np.random.default_rng(0).random((4, 5)) < 0.7


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_rows_on_devices(row):
    """The value, and gradients that are summed over the devices where the array is on all of them."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    student, fixed = row.student(**SIZES), row.fixed(**SIZES)
    split = (P("data"), *[P()] * (len(student) - 1)), (P("data"), *[P()] * (len(fixed) - 1))

    @jax.shard_map(mesh=mesh, in_specs=(*split, P("data")), out_specs=P())
    def mean(student, fixed, mask):
        return jax.lax.pmean(row.means(student, fixed, mask)[0], "data")

    got = quick_jit(jax.value_and_grad(mean))(student, fixed, MASK)
    want = quick_jit(jax.value_and_grad(lambda student: row.means(student, fixed, MASK)[0]))(student)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), got, want)


def test_gradients_inside():
    """Asked for inside, the gradient of an array that all devices hold is already summed, as JAX does."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    row = next(row for row in ROWS if row.name == "linear_cross_entropy")
    student, fixed = row.student(**SIZES), row.fixed(**SIZES)

    @jax.shard_map(mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=(P("data"), P()))
    def grads(hidden, unembedding, labels):
        return jax.grad(lambda *student: row.unreduced(student, (labels,)).sum(), (0, 1))(hidden, unembedding)

    got = quick_jit(grads)(*student, *fixed)
    want = quick_jit(jax.grad(lambda student: row.unreduced(student, fixed).sum()))(student)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), got, want)
