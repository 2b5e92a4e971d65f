"""Loading and storing weights: tensors of a folder or a GGUF file → parameters, and parameters → tensors of a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from raft_jax.errors import InputError
from raft_jax.host_memory import return_memory
from raft_jax.models.config import DecoderConfig, parameter_table
from raft_jax.models.families import Stored, config_from_hf, quantised, stored_keys
from raft_jax.models.weight_files import (
    EMBEDDING,
    HEAD,
    SAFETENSORS_DTYPES,
    GgufFile,
    SafetensorsFolder,
    open_weights,
)
from raft_jax.sharding import named_sharding, to_host

__all__ = [
    "SAFETENSORS_DTYPES",
    "GgufFile",
    "SafetensorsFolder",
    "check_keys",
    "config_as_loaded",
    "config_of",
    "head_differs",
    "load_parameters",
    "open_weights",
    "stored_tensors",
]


def config_of(weights: SafetensorsFolder | GgufFile) -> DecoderConfig:
    """The decoder's config, or an InputError that names the file or folder."""
    try:
        return config_from_hf(weights.hf_config)
    except InputError as error:
        raise InputError(f"{weights.place}: {error}") from error


def config_as_loaded(weights: SafetensorsFolder | GgufFile) -> DecoderConfig:
    """`config_of`, untied if the file has an unembedding of its own."""
    config = config_of(weights)
    return replace(config, tied_embeddings=False) if config.tied_embeddings and head_differs(weights) else config


def check_keys(weights: SafetensorsFolder | GgufFile, config: DecoderConfig) -> None:
    """Raises InputError unless the tensors are exactly those of the config, with its shapes; no tensor is read."""
    keys = stored_keys(config)
    wanted = {
        stored.key.format(layer): stored
        for stored in keys.values()
        for layer in (range(config.num_layers) if "{}" in stored.key else (0,))
    }
    present = weights.keys()
    quantised.refuse_names(present - wanted.keys(), weights.place)
    if missing := sorted(wanted.keys() - present):
        raise InputError(
            f"{weights.place}: {missing[0]} of shape {_expected(wanted[missing[0]], config)} is missing "
            f"({len(missing)} of {len(wanted)} tensors are)"
        )
    # Old exports also store the tied head or the rope table; both are redundant.
    surplus = {key for key in present - wanted.keys() if not key.endswith("rotary_emb.inv_freq")}
    if config.tied_embeddings:
        surplus.discard(HEAD)
    if surplus:
        key = min(surplus)
        raise InputError(f"{weights.file_of(key)}: {key} is not part of a {config.family} model with this config")
    for key, stored in wanted.items():
        shape, dtype = weights.describe(key)
        quantised.refuse_dtype(key, dtype, weights.file_of(key))
        if shape != (expected := _expected(stored, config)):
            raise InputError(f"{weights.file_of(key)}: {key} has shape {shape}, and the config asks for {expected}")


def head_differs(weights: SafetensorsFolder | GgufFile) -> bool:
    """Whether there is an unembedding that differs from the embedding: the model is then not tied, whatever its
    config.json says, as in transformers. Reads both if their shapes are equal."""
    if not {EMBEDDING, HEAD} <= weights.keys():
        return False
    if weights.describe(EMBEDDING)[0] != weights.describe(HEAD)[0]:
        return True
    return not np.array_equal(weights.read(EMBEDDING), weights.read(HEAD))


ROWS = 8192  # of a tensor that are read at once
LARGE = 64 << 20  # bytes of a parameter, after which memory is returned to the system


def load_parameters(
    weights: SafetensorsFolder | GgufFile, config: DecoderConfig, dtype=jnp.float32, mesh: Mesh | None = None
) -> dict[str, jax.Array]:
    """Loads the parameters, one at a time, directly to their shards on the mesh.

    Raises:
      InputError: a key is missing or surplus, a shape is not the config's, or a value is not finite.
    """
    check_keys(weights, config)
    keys, table, parameters = stored_keys(config), parameter_table(config), {}
    for name, stored in keys.items():
        sharding = None if mesh is None else named_sharding(mesh, table[name].axes, table[name].shape, name)
        parameters[name] = _load(weights, name, stored, config, dtype, sharding)
        if parameters[name].nbytes >= LARGE:
            return_memory()
    return parameters


def _load(weights, name: str, stored: Stored, config: DecoderConfig, dtype, sharding) -> jax.Array:
    """Loads one parameter; a stacked one is allocated on the devices and filled by layers.

    On a mesh each device takes its share of a tensor's rows, as they lie in the file, so no byte is read twice, and the
    devices exchange them.
    """
    letters, ours = "".join(stored.dims), _letters(name)
    order, stacked = tuple(letters.index(letter) for letter in ours), "{}" in stored.key
    of_layer = sharding
    if sharding is not None and stacked:
        of_layer = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    shape = tuple(config.sizes[letter] for letter in letters)

    def load(key: str) -> jax.Array:
        rows = _put(_StoredRows(weights, key, stored, config), dtype, of_layer and of_layer.mesh)
        array, finite = _arranged(rows, shape, order, of_layer)
        if not finite:
            raise InputError(f"{weights.file_of(key)}: {key} holds numbers that are not finite; this model is broken")
        return array

    if not stacked:
        return load(stored.key)
    stack_LX = jnp.zeros(parameter_table(config)[name].shape, dtype, device=sharding)
    for layer in range(config.num_layers):
        stack_LX = _set_layer(stack_LX, load(stored.key.format(layer)), layer)
        stack_LX.block_until_ready()  # otherwise the host runs ahead and holds many layers
    return stack_LX


@partial(jax.jit, static_argnums=(1, 2, 3))
def _arranged(rows: jax.Array, shape, order, sharding: NamedSharding | None) -> tuple[jax.Array, jax.Array]:
    """A parameter, from its rows in the file, and whether all of its numbers are finite."""
    array = rows.reshape(shape).transpose(order)
    if sharding is not None:
        array = jax.lax.with_sharding_constraint(array, sharding)
    return array, jnp.isfinite(rows).all()


@partial(jax.jit, donate_argnums=0)
def _set_layer(stack_LX: jax.Array, layer_X: jax.Array, layer) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack_LX, layer_X, layer, 0)


def _put(rows: _StoredRows, dtype, mesh: Mesh | None) -> jax.Array:
    """Puts rows on the default device, or an equal share of them on each device of the mesh."""
    if mesh is None:
        return jnp.asarray(rows.read(0, rows.shape[0], dtype))
    divides = rows.shape[0] % mesh.size == 0
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names) if divides else PartitionSpec())

    def read(index) -> np.ndarray:
        start, stop, _ = index[0].indices(rows.shape[0])
        return rows.read(start, stop, dtype)

    return jax.make_array_from_callback(rows.shape, sharding, read)


def _letters(name: str) -> str:
    return name.rpartition("_")[2].removeprefix("L")


def _rows(dims: tuple[str, ...], sizes: Mapping[str, int]) -> list[int]:
    return [math.prod(sizes[letter] for letter in dim) for dim in dims]


def _expected(stored: Stored, config: DecoderConfig) -> tuple[int, ...]:
    """The shape of a tensor in its file."""
    sizes = config.sizes | {"V": config.vocab_size}
    return sum(_rows(stored.fused or stored.dims[:1], sizes)), *_rows(stored.dims[1:], sizes)


class _StoredRows:
    """The rows of one parameter of one layer in its file; those of the vocabulary are followed by padding of zeros.

    Attributes:
      shape: of the rows with padding, in the file's order of dimensions.
    """

    def __init__(self, weights: SafetensorsFolder | GgufFile, key: str, stored: Stored, config: DecoderConfig):
        self._weights, self._key = weights, key
        sizes = config.sizes | {"V": config.vocab_size}
        before = _rows(stored.fused, sizes)[: stored.part]
        num_rows, *rest = _rows(stored.dims, sizes)
        self._first, self._last = sum(before), sum(before) + num_rows
        padding = config.vocab_padding if stored.dims[0] == "V" else 0
        self.shape = num_rows + padding, *rest

    def read(self, start: int, stop: int, dtype) -> np.ndarray:
        """Rows `start` to `stop`, without the latter; at most ROWS are read at once, as a file may hold a wider
        dtype."""
        array = np.empty((stop - start, *self.shape[1:]), dtype)
        for first in range(start, stop, ROWS):
            last = min(first + ROWS, stop)
            array[first - start : last - start] = self._read(first, last)
        return array

    def _read(self, start: int, stop: int) -> np.ndarray:
        first, last = self._first + start, min(self._first + stop, self._last)
        array = self._weights.read(self._key, first, max(first, last))
        missing = (stop - start) - len(array)
        return np.pad(array, ((0, missing), *((0, 0) for _ in self.shape[1:]))) if missing else array


def stored_tensors(
    params: Mapping[str, Any], config: DecoderConfig
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
    """Key, shape and a function that makes the array, for every tensor of an export; without vocabulary padding."""
    sizes, together = config.sizes | {"V": config.vocab_size}, {}
    for name, stored in stored_keys(config).items():
        together.setdefault(stored.key, []).append((name, stored))

    def make(parts, layer: int | None) -> np.ndarray:
        arrays = []
        for name, stored in parts:
            array = to_host(params[name] if layer is None else params[name][layer])
            ours, letters = _letters(name), "".join(stored.dims)
            array = array.transpose([ours.index(letter) for letter in letters])
            array = array[: config.vocab_size] if stored.dims[0] == "V" else array
            arrays.append(array.reshape(_rows(stored.dims, sizes)))
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    for key, parts in together.items():
        parts.sort(key=lambda part: part[1].part)
        dims = parts[0][1].dims
        shape = (sum(_rows(parts[0][1].fused or dims[:1], sizes)), *_rows(dims[1:], sizes))
        for layer in range(config.num_layers) if "{}" in key else (None,):
            yield key.format(layer), shape, partial(make, parts, layer)
