"""Arrays that are split over devices: what their types say, and computing without their types in the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def vocab_shards(given: int | None, array: jax.Array, axis: int = -1) -> int:
    """Devices over which the vocabulary axis is split.

    As given; as the type says, where mesh axes are explicit; 1 under `shard_map`; else the largest number that the
    devices and the vocabulary allow, up to 16.
    """
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


def automatic(result_ndim: int) -> Callable:
    """Decorates a function of arrays whose results are split like the first array: [B, T, ...] for `result_ndim` 2.

    In a mesh with explicit axes the compiler places everything in between (`jax.sharding.auto_axes`). Under `shard_map`
    every array is made to vary over the axes that any of them varies over, so that JAX sums gradients over them.
    """

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def run(first, *others):
            arrays = (first, *others)
            axes = frozenset().union(*(_varying(x) for x in jax.tree.leaves(arrays)))
            if axes:
                arrays = jax.tree.map(lambda x: vary(x, axes), arrays)
            meshes = {jax.typeof(x).sharding.mesh for x in jax.tree.leaves(arrays)}
            mesh = next((m for m in meshes if AxisType.Explicit in m.axis_types), None)
            if mesh is None:
                return function(*arrays)
            spec = PartitionSpec(*jax.typeof(first).sharding.spec[:result_ndim])
            return jax.sharding.auto_axes(function, out_sharding=NamedSharding(mesh, spec))(*arrays)

        return run

    return decorate


def vary_like(tree, like: jax.Array):
    """Constants, typed as varying over the same `shard_map` axes as another array: what a loop starts from."""
    return jax.tree.map(lambda x: vary(x, _varying(like)), tree)


def vary(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = tuple(axes - _varying(array))
    if not missing:
        return array
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(array, missing, to="varying")
    return jax.lax.pvary(array, missing)  # pyright: ignore[reportAttributeAccessIssue] (jax before 0.8)


def _varying(array: jax.Array) -> frozenset[str]:
    kind = jax.typeof(array)
    if hasattr(kind, "manual_axis_type"):
        return kind.manual_axis_type.varying
    return getattr(kind, "vma", frozenset())  # jax before 0.10
