"""Arrays that are split over devices: what their types tell, and running without their types in the way."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def vocab_shards(given: int | None, array: jax.Array, axis: int = -1) -> int:
    """Devices over which the axis of the vocabulary is split: as given, as typed, or as many as there may be."""
    axis %= array.ndim
    size = array.shape[axis]
    if given is not None:
        if given < 1 or size % given:
            raise ValueError(f"vocab_shards must divide the vocabulary of {size}, got {given}")
        return given
    sharding = jax.typeof(array).sharding
    types = set(sharding.mesh.axis_types)
    if AxisType.Explicit in types:
        names = sharding.spec[axis] if axis < len(sharding.spec) else None
        names = names if isinstance(names, tuple) else (names,)
        return math.prod(sharding.mesh.shape[name] for name in names if name is not None)
    if types == {AxisType.Manual}:
        return 1
    return math.gcd(size, jax.device_count(), 16)


def automatic(function: Callable, first_BTX: jax.Array, *others, scalar: bool = False):
    """function(first_BTX, *others) -> pytree of [B, T, ...] split like the first array, or a scalar.

    In a mesh with explicit axes the compiler is left to place what is in between. Under `shard_map` every array
    is made to vary over the axes that any of them varies over, so that gradients are summed where they must be.
    """
    arrays = (first_BTX, *others)
    axes = frozenset().union(*(_varying(x) for x in jax.tree.leaves(arrays)))
    if axes:
        arrays = jax.tree.map(lambda x: vary(x, axes), arrays)
    meshes = {jax.typeof(x).sharding.mesh for x in jax.tree.leaves(arrays)}
    mesh = next((m for m in meshes if AxisType.Explicit in m.axis_types), None)
    if mesh is None:
        return function(*arrays)
    spec = PartitionSpec() if scalar else PartitionSpec(*jax.typeof(first_BTX).sharding.spec[:2])
    return jax.sharding.auto_axes(function, out_sharding=NamedSharding(mesh, spec))(*arrays)


def vary(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = tuple(axes - _varying(array))
    return jax.lax.pcast(array, missing, to="varying") if missing else array


def vary_like(array: jax.Array, like: jax.Array) -> jax.Array:
    """A constant, typed as varying over the same `shard_map` axes as another array: a loop's start."""
    return vary(array, _varying(like))


def _varying(array: jax.Array) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying
