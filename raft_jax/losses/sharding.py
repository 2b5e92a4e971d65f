"""Sharded arrays: the number of vocabulary shards, and computing under explicit meshes and `shard_map`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def vocab_shards(given: int | None, array: jax.Array, axis: int = -1) -> int:
    """Number of devices that the vocabulary axis is sharded over.

    The given number; else the number in the array's type if its mesh axes are explicit; else 1 under `shard_map`; else
    gcd(vocabulary, number of devices, 16).
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
    """Decorates a function of arrays; the first `result_ndim` dimensions of results are sharded like the first array.

    For results [B, T, ...], `result_ndim` is 2. In a mesh with explicit axes, the compiler chooses the sharding inside
    the function (`jax.sharding.auto_axes`). Under `shard_map`, every array is made to vary over all axes that any of
    them varies over, so that JAX sums gradients over these axes.
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
    """Constants typed as varying over the same `shard_map` axes as another array, as a loop's initial carry must be."""
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
