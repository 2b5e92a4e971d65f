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
    found = weights.keys()
    quantised.refuse_names(found - wanted.keys(), weights.place)
    if missing := sorted(wanted.keys() - found):
        raise InputError(
            f"{weights.place}: {missing[0]} of shape {_expected(wanted[missing[0]], config)} is missing "
            f"({len(missing)} of {len(wanted)} tensors are)"
        )
    # Old exports also store the tied head or the rope table; both are redundant.
    surplus = {key for key in found - wanted.keys() if not key.endswith("rotary_emb.inv_freq")}
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
    return parameters


def _load(weights, name: str, stored: Stored, config: DecoderConfig, dtype, sharding) -> jax.Array:
    """Loads one parameter; a stacked one is allocated on the devices and filled by layers. The devices transpose."""
    letters, ours = "".join(stored.dims), _letters(name)
    order = tuple(letters.index(letter) for letter in ours)
    as_stored = None
    if sharding is not None:
        spec = dict(zip(ours, sharding.spec[-len(ours) :], strict=True))
        as_stored = NamedSharding(sharding.mesh, PartitionSpec(*(spec[letter] for letter in letters)))
    if "{}" not in stored.key:
        return _transposed(_put(_from_stored(weights, stored.key, stored, config), dtype, as_stored), order)
    stack_LX = jnp.zeros(parameter_table(config)[name].shape, dtype, device=sharding)
    for layer in range(config.num_layers):
        array = _from_stored(weights, stored.key.format(layer), stored, config)
        stack_LX = _set_layer(stack_LX, _transposed(_put(array, dtype, as_stored), order), layer)
        stack_LX.block_until_ready()  # otherwise the host runs ahead and holds many layers
    return stack_LX


@partial(jax.jit, static_argnums=1)
def _transposed(array: jax.Array, order: tuple[int, ...]) -> jax.Array:
    return array.transpose(order)


@partial(jax.jit, donate_argnums=0)
def _set_layer(stack_LX: jax.Array, layer_X: jax.Array, layer) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack_LX, layer_X, layer, 0)


def _put(array: np.ndarray, dtype, sharding: NamedSharding | None) -> jax.Array:
    """Puts an array on the default device, or its shards on the devices of this process."""
    if sharding is None:
        return jnp.asarray(np.array(array, dtype))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: np.array(array[index], dtype))


def _letters(name: str) -> str:
    return name.rpartition("_")[2].removeprefix("L")


def _rows(dims: tuple[str, ...], sizes: Mapping[str, int]) -> list[int]:
    return [math.prod(sizes[letter] for letter in dim) for dim in dims]


def _expected(stored: Stored, config: DecoderConfig) -> tuple[int, ...]:
    """The shape of a tensor in its file."""
    sizes = config.sizes | {"V": config.vocab_size}
    return sum(_rows(stored.fused or stored.dims[:1], sizes)), *_rows(stored.dims[1:], sizes)


def _from_stored(weights, key: str, stored: Stored, config: DecoderConfig) -> np.ndarray:
    """One layer of a parameter, in the file's order of dimensions; a view where possible."""
    array, sizes = weights.read(key), config.sizes | {"V": config.vocab_size}
    if not np.isfinite(array).all():
        raise InputError(f"{weights.file_of(key)}: {key} holds numbers that are not finite; this model is broken")
    if stored.fused:
        first = _rows(stored.fused, sizes)
        array = array[sum(first[: stored.part]) : sum(first[: stored.part + 1])]
    if stored.dims[0] == "V" and config.vocab_padding:
        array, sizes = np.pad(array, ((0, config.vocab_padding), (0, 0))), config.sizes
    return array.reshape([sizes[letter] for letter in "".join(stored.dims)])


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
