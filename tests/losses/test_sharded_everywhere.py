"""The vocabulary over the same devices as the batch: every loss in every layout of data, fsdp and tensor."""

import functools
import re
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from quick import quick_jit
from rows import ROWS

from raft_jax.plan import hlo

B, T, D, V = 8, 8, 16, 4096
SIZES = {"batch": B, "time": T, "width": D, "vocabulary": V}
MASK = np.random.default_rng(0).random((B, T)) < 0.7
AXES = ("data", "fsdp", "tensor")
ROW_AXES, VOCABULARY = ("data", "fsdp"), ("tensor", "fsdp")
LINEAR = [row for row in ROWS if row.linear]


def step_of(row):
    return quick_jit(jax.value_and_grad(lambda student, fixed: row.means(student, fixed, MASK)[0]))


@functools.cache
def whole(row):
    return step_of(row)(row.student(**SIZES), row.fixed(**SIZES))


def compiled(row, shape, kind):
    mesh = jax.make_mesh(shape, AXES, axis_types=(kind,) * 3)

    def put(arrays, *specs):
        return tuple(jax.device_put(x, NamedSharding(mesh, P(*spec))) for x, spec in zip(arrays, specs, strict=False))

    specs = [(ROW_AXES,), (None, VOCABULARY)]
    arrays = put(row.student(**SIZES), *specs), put(row.fixed(**SIZES), *specs if row.distils else specs[:1])
    if kind == AxisType.Auto:  # an explicit mesh tells the axes in the arrays' types
        row = replace(row, loss=partial(row.loss, vocab_shards=VOCABULARY))
    with jax.set_mesh(mesh):
        return step_of(row).lower(*arrays).compile(), arrays


def sizes_moved(program, in_loop):
    """Sizes of the dimensions of all arrays that collectives move, in loops or outside."""
    moved = [row.shape for row in hlo.Module(program.as_text()).collectives() if row.in_loop == in_loop]
    return {int(size) for shape in moved for dims in re.findall(r"\[([\d,]+)\]", shape) for size in dims.split(",")}


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 2, 4)], ids=str)
@pytest.mark.parametrize("row", LINEAR, ids=lambda row: row.name)
def test_no_loop_moves_a_vocabulary(row, shape):
    program, arrays = compiled(row, shape, AxisType.Auto)
    assert not sizes_moved(program, in_loop=True) & {V // n for n in (1, 2, 4, 8)}
    value, grads = program(*arrays)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), (value, grads), whole(row))
    assert grads[1].sharding.is_equivalent_to(NamedSharding(grads[1].sharding.mesh, P(None, VOCABULARY)), 2)


@pytest.mark.parametrize("row", LINEAR, ids=lambda row: row.name)
def test_an_explicit_mesh(row):
    program, arrays = compiled(row, (2, 2, 2), AxisType.Explicit)
    assert not sizes_moved(program, in_loop=True) & {V // n for n in (1, 2, 4, 8)}
    value, grads = program(*arrays)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6), (value, grads), whole(row))


def test_axes_that_the_mesh_lacks():
    row = LINEAR[-1]
    message = r"vocab_shards must name axes of the mesh .*\('x',\), got 'tensor'"
    with jax.set_mesh(jax.make_mesh((8,), ("x",))), pytest.raises(ValueError, match=message):
        row.loss(*row.student(**SIZES), *row.fixed(**SIZES), vocab_shards=VOCABULARY)
