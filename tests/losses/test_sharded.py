"""Batch over data, vocabulary over tensor, on 2 x 4 devices: the same numbers, and no vocabulary is gathered."""

import functools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from quick import quick_jit
from rows import ROWS, K, Row

from raft_jax import losses

B, T, D, V = 4, 8, 16, 4096
SIZES = {"batch": B, "time": T, "width": D, "vocabulary": V}
MASK = np.random.default_rng(0).random((B, T)) < 0.7


def with_metrics(*arrays):
    loss_BT, metrics = losses.linear_top_k_forward_kl(*arrays, k=K, chunk_size=4, return_metrics=True)
    return loss_BT + sum(metrics.values())


APPROXIMATE = partial(losses.linear_top_k_forward_kl, k=K, chunk_size=4, recall=1.0)
MORE = [
    Row("linear_top_k-approximate", APPROXIMATE, None, None, linear=True, distils=True),
    Row("linear_top_k-metrics", with_metrics, None, None, linear=True, distils=True),
]
every_row = pytest.mark.parametrize("row", ROWS + MORE, ids=lambda row: row.name)


@functools.cache
def step_of(row):
    return quick_jit(jax.value_and_grad(lambda student, fixed: row.means(student, fixed, MASK)[0]))


@functools.cache
def whole(row):
    return step_of(row)(row.student(**SIZES), row.fixed(**SIZES))


def place(row, mesh):
    def put(arrays, *specs):
        return tuple(jax.device_put(x, NamedSharding(mesh, P(*spec))) for x, spec in zip(arrays, specs, strict=False))

    specs = [("data",), (None, "tensor")] if row.linear else [("data", None, "tensor")]
    return put(row.student(**SIZES), *specs), put(row.fixed(**SIZES), *specs if row.distils else [("data",)])


def gathered(program):
    """Sizes of every dimension that an all-gather or all-to-all of the compiled program has a part in."""
    shapes = re.findall(r"= (.*?) (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", program)
    return {int(size) for shape in shapes for dims in re.findall(r"\[([\d,]+)\]", shape) for size in dims.split(",")}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@every_row
def test_split_is_whole(row, kind):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(kind, kind))
    arrays = place(row, mesh)
    program = step_of(row).lower(*arrays).compile()
    assert not gathered(program.as_text()) & {V, V // 2, V // 4, V // 8}
    value, grads = program(*arrays)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), (value, grads), whole(row))
    if row.linear:
        assert grads[1].sharding.spec == P(None, "tensor")


def test_gathering_would_be_seen():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    (hidden, unembedding), _ = place(ROWS[1], mesh)
    program = quick_jit(lambda h, w: jax.lax.top_k(h @ w, K)).lower(hidden, unembedding).compile()
    assert V in gathered(program.as_text())


def test_one_device_of_many_is_as_many_shards():
    random = np.random.default_rng(0)
    hidden, unembedding = random.normal(size=(B, T, D)), random.normal(size=(D, V))
    labels = random.integers(0, V, (B, T))
    got = losses.linear_cross_entropy(hidden, unembedding, labels, vocab_shards=1)
    np.testing.assert_allclose(losses.linear_cross_entropy(hidden, unembedding, labels, vocab_shards=8), got, rtol=1e-6)
    assert jnp.isfinite(got).all()
