"""Sharded arrays: how the vocabulary is sharded, and computing under explicit meshes and `shard_map`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


class VocabSharding(NamedTuple):
    """How the vocabulary is sharded: over how many devices, and over which mesh axes if they are known."""

    shards: int
    axes: tuple[str, ...] = ()
    other_axes: tuple[tuple[str, int], ...] = ()  # the mesh's other axes with their sizes, if `axes` are known
    assumed: bool = False  # neither given nor read from a type

    @classmethod
    def of(cls, vocab_shards: int | str | Sequence[str] | None, array: jax.Array, axis: int = -1) -> VocabSharding:
        """The sharding of an array's vocabulary axis.

        The given number of devices or names of mesh axes; else what the array's type says if its mesh axes are
        explicit; else none under `shard_map`; else an assumption of gcd(vocabulary, number of devices, 16) devices.
        """
        axis %= array.ndim
        size, mesh = array.shape[axis], jax.typeof(array).sharding.mesh
        if vocab_shards is not None and not isinstance(vocab_shards, int):
            names = (vocab_shards,) if isinstance(vocab_shards, str) else tuple(vocab_shards)
            mesh = jax.sharding.get_abstract_mesh()
            if missing := [name for name in names if name not in mesh.axis_names]:
                raise ValueError(
                    f"vocab_shards must name axes of the mesh in `jax.set_mesh`, which has {mesh.axis_names}, got "
                    f"{missing[0]!r}"
                )
            shards = math.prod(mesh.shape[name] for name in names)
        elif vocab_shards is not None:
            names, shards = (), vocab_shards
        elif AxisType.Explicit in mesh.axis_types:
            spec = jax.typeof(array).sharding.spec
            names = spec[axis] if axis < len(spec) else None
            names = names if isinstance(names, tuple) else () if names is None else (names,)
            shards = math.prod(mesh.shape[name] for name in names)
        elif set(mesh.axis_types) == {AxisType.Manual}:
            return cls(1)
        else:
            return cls(math.gcd(size, jax.device_count(), 16), assumed=True)
        if shards < 1 or size % shards:
            raise ValueError(f"vocab_shards must divide the vocabulary of {size}, got {vocab_shards}")
        others = tuple((name, mesh.shape[name]) for name in mesh.axis_names if names and name not in names)
        return cls(shards, names, others)

    def chunk_size(self, of_device: int) -> int:
        """Tokens of a chunk. Every device holds its columns of all of them, so that `of_device` rows of the whole
        vocabulary are as large. An assumption is not relied on."""
        return of_device if self.assumed else of_device * self.shards

    def partial_sums(self, function: Callable, num_rows: int) -> tuple[int, Callable]:
        """A sum over tokens as partial sums over the mesh's other axes, for a loop in which no sum is to be completed.

        Returns:
          (groups, function): the number of partial sums, and a function of [groups, N / groups, ...] that gives
          [groups, ...], sharded over the other axes. One group if they are not known or do not divide the rows.
        """
        groups, names = self._others(num_rows)
        if groups == 1:
            return 1, function
        mapped = jax.vmap(function, spmd_axis_name=names)
        return groups, lambda *arrays: mapped(*(x.reshape(groups, -1, *x.shape[1:]) for x in arrays))

    def gather(self, hidden_ND: jax.Array, num_rows) -> jax.Array:
        """The hidden states of a chunk's tokens on all devices that share the vocabulary, in one exchange.

        Left to itself, the compiler may pass them around in a loop around each product, whose every step adds to the
        whole of the product: for the unembedding's gradient, that is two more arrays of its size in float32.
        """
        groups, names = self._others(num_rows)
        if not self.axes or (groups == 1 and any(size > 1 for _, size in self.other_axes)):
            return hidden_ND
        return jax.lax.with_sharding_constraint(hidden_ND, PartitionSpec(names or None, None))

    def _others(self, num_rows) -> tuple[int, tuple[str, ...]]:
        """Devices along the mesh's other axes, and their names, if they divide the rows; else 1 and none."""
        groups = math.prod(size for _, size in self.other_axes)
        if groups == 1 or not isinstance(num_rows, int) or num_rows % groups:
            return 1, ()
        return groups, tuple(name for name, _ in self.other_axes)

    def constrain(self, array: jax.Array, axis: int = -1) -> jax.Array:
        """The array, sharded along its vocabulary axis; other axes as the compiler chooses. Without known mesh axes it
        is unchanged: the compiler then follows the unembedding."""
        if self.shards == 1 or not self.axes:
            return array
        spec: list = [PartitionSpec.UNCONSTRAINED] * array.ndim
        spec[axis] = self.axes
        return jax.lax.with_sharding_constraint(array, PartitionSpec(*spec))


def automatic(*result_ndims: int) -> Callable:
    """Decorates a function of arrays; the first dimensions of its results are sharded like those of the first array.

    The number of these dimensions is 2 for results [B, T, ...] and 0 for scalars; several numbers are for the parts of
    a tuple. In a mesh with explicit axes, the compiler chooses the sharding inside the function
    (`jax.sharding.auto_axes`). Under `shard_map`, every array is made to vary over all axes that any of them varies
    over, so that JAX sums gradients over these axes.
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
            spec = jax.typeof(first).sharding.spec
            results = tuple(NamedSharding(mesh, PartitionSpec(*spec[:ndim])) for ndim in result_ndims)
            return jax.sharding.auto_axes(function, out_sharding=results if result_ndims[1:] else results[0])(*arrays)

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
