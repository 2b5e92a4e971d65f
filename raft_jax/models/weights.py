"""Weights in and out: safetensors folders and GGUF files → parameters, parameters → safetensors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from raft_jax.errors import InputError
from raft_jax.models.decoder import DecoderConfig, parameter_table
from raft_jax.models.families import (
    DECODER_OF,
    Stored,
    config_from_hf,
    decoder_config,
    decoder_key,
    stored_keys,
)
from raft_jax.models.families.metadata import ROPE_TENSORS, gguf_names, hf_config_from_gguf
from raft_jax.sharding import named_sharding, to_host

INDEX_NAME = "model.safetensors.index.json"
SAFETENSORS_DTYPES = {name: jnp.dtype(ours) for name, ours in (
    ("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16"), ("F64", "float64"), ("I64", "int64"),
    ("I32", "int32"), ("I16", "int16"), ("I8", "int8"), ("U8", "uint8"), ("BOOL", "bool"),
)}


def read_json(path: Path) -> Any:
    """A JSON file, or an InputError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object, or an InputError that names it."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


class SafetensorsFolder:
    """The tensors of a Hugging Face folder: one `model.safetensors`, or shards with an index."""

    def __init__(self, folder: Path):
        self.folder = folder
        given = read_object(folder / "config.json")
        try:
            self.hf_config = decoder_config(given)
        except InputError as error:
            raise InputError(f"{folder}: {error}") from error
        self._headers: dict[Path, tuple[int, dict[str, Any]]] = {}
        self._place_of = {key: (path, key) for key, path in self._index().items()}  # file, and key there
        if given.get("model_type") in DECODER_OF:
            self._place_of = {
                ours: place for key, place in self._place_of.items() if (ours := decoder_key(key)) is not None
            }

    def _index(self) -> dict[str, Path]:
        index_path = self.folder / INDEX_NAME
        if index_path.exists():
            weight_map = read_object(index_path).get("weight_map")
            if not isinstance(weight_map, dict):
                raise InputError(f"{index_path}: the key weight_map is missing or not an object")
            for name in weight_map.values():
                if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
                    raise InputError(f"{index_path}: the shard {name!r} does not lie in the folder")
            file_of = {key: self.folder / name for key, name in weight_map.items()}
            for path in sorted(set(file_of.values())):
                named = {key for key, place in file_of.items() if place == path}
                if surplus := sorted(self._header(path)[1].keys() - named - {"__metadata__"}):
                    raise InputError(f"{path}: holds {surplus[0]}, which {INDEX_NAME} does not name")
            return file_of
        path = self.folder / "model.safetensors"
        if not path.exists():
            found = ", ".join(sorted(p.name for p in self.folder.iterdir())) or "nothing"
            raise InputError(f"{self.folder}: neither model.safetensors nor {INDEX_NAME} is there (found {found})")
        return dict.fromkeys(self._header(path)[1].keys() - {"__metadata__"}, path)

    @property
    def generation_config(self) -> dict[str, Any]:
        """How the model is meant to be sampled; nothing where the folder does not say."""
        path = self.folder / "generation_config.json"
        return read_object(path) if path.exists() else {}

    @staticmethod
    def _check(path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a whole safetensors file ({error}); fetch or export it again") from error

    @property
    def place(self) -> Path:
        return self.folder

    def keys(self) -> set[str]:
        return set(self._place_of)

    def file_of(self, key: str) -> Path:
        return self._place_of[key][0]

    def read(self, key: str) -> np.ndarray:
        """A view of the tensor in its file: what is not looked at is not read."""
        path, key = self._place_of[key]
        start, header = self._header(path)
        if key not in header:
            raise InputError(f"{path}: the index says that {key} is here, and it is not")
        found = header[key]
        if found["dtype"] not in SAFETENSORS_DTYPES:
            raise InputError(f"{path}: {key} has dtype {found['dtype']}, which is not supported; supported: "
                             + ", ".join(SAFETENSORS_DTYPES))
        dtype, shape, (first, end) = SAFETENSORS_DTYPES[found["dtype"]], tuple(found["shape"]), found["data_offsets"]
        return np.zeros(shape, dtype) if first == end else np.memmap(path, dtype, "r", start + first, shape)

    def _header(self, path: Path) -> tuple[int, dict[str, Any]]:
        """Where the data of a shard begins, and what its header says; the library looks it over first."""
        if path not in self._headers:
            self._check(path)
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                self._headers[path] = 8 + size, json.loads(file.read(size))
        return self._headers[path]


class GgufFile:
    """The tensors of a GGUF file under their Hugging Face keys, dequantised and as transformers stores them."""

    generation_config: Mapping[str, Any] = {}

    def __init__(self, path: Path):
        import gguf

        self.path = path
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"{path}: not a GGUF file")
        try:
            reader = gguf.GGUFReader(path)
            self.metadata = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: a truncated or damaged GGUF file ({error}); fetch it again") from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        arch = self.metadata.get("general.architecture")
        rope = {name: self._dequantised(name) for name in ROPE_TENSORS.get(arch, ()) if name in self._tensors}
        self.hf_config = hf_config_from_gguf(self.metadata, "output.weight" in self._tensors, rope)
        config = config_from_hf(self.hf_config)
        names = gguf_names(config.family)
        self._name_of = {
            stored.key.format(layer): names[name].format(layer)
            for name, stored in stored_keys(config).items()
            for layer in (range(config.num_layers) if "{}" in stored.key else (0,))
        }
        self._norm_offset = config.norm_offset
        self._num_heads = {}
        if arch == "llama":
            self._num_heads = {"attn_q.weight": config.num_heads, "attn_k.weight": config.num_kv_heads}
        known = {*self._name_of.values(), *rope}
        if surplus := sorted(set(self._tensors) - known):
            raise InputError(f"{path}: the tensor {surplus[0]} is not part of a {config.family} model")

    @property
    def place(self) -> Path:
        return self.path

    def keys(self) -> set[str]:
        return {key for key, name in self._name_of.items() if name in self._tensors}

    def file_of(self, key: str) -> Path:
        return self.path

    def read(self, key: str) -> np.ndarray:
        name = self._name_of[key]
        array = self._dequantised(name)
        if heads := self._num_heads.get(name.split(".", 2)[-1]):
            # llama.cpp keeps the two halves of each rotated head interleaved.
            array = array.reshape(heads, -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        # It keeps a norm's scale as what is multiplied by.
        return array - self._norm_offset if name.endswith("norm.weight") else array

    def _dequantised(self, name: str) -> np.ndarray:
        import gguf

        tensor = self._tensors[name]
        try:
            return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(reversed(tensor.shape.tolist())))
        except (NotImplementedError, ValueError) as error:
            kind = tensor.tensor_type.name
            raise InputError(f"{self.path}: {name} of type {kind} cannot be read ({error})") from error


def open_weights(path: Path) -> SafetensorsFolder | GgufFile:
    """The reader for a folder with safetensors or a `.gguf` file."""
    if path.is_dir():
        return SafetensorsFolder(path)
    if path.suffix == ".gguf":
        return GgufFile(path)
    raise InputError(f"{path}: expected a Hugging Face folder or a .gguf file")


def check_keys(weights: SafetensorsFolder | GgufFile, config: DecoderConfig) -> None:
    """InputError unless every tensor of the config is there, and no other; no tensor is read."""
    keys = stored_keys(config)
    layers = range(config.num_layers)
    wanted = {stored.key.format(layer) for stored in keys.values() for layer in layers}
    found = weights.keys()
    if missing := sorted(wanted - found):
        name = next(name for name, stored in keys.items() for layer in layers if stored.key.format(layer) == missing[0])
        raise InputError(
            f"{weights.place}: {missing[0]} of shape {_expected(keys[name], config)} is missing "
            f"({len(missing)} of {len(wanted)} tensors are)"
        )
    # Old exports keep the tied head or the rope table as tensors of their own; neither adds anything.
    surplus = {key for key in found - wanted if not key.endswith("rotary_emb.inv_freq")}
    if config.tied_embeddings:
        surplus.discard("lm_head.weight")
    if surplus:
        key = min(surplus)
        raise InputError(f"{weights.file_of(key)}: {key} is not part of a {config.family} model with this config")


def load_parameters(
    weights: SafetensorsFolder | GgufFile, config: DecoderConfig, dtype=jnp.float32, mesh: Mesh | None = None
) -> dict[str, jax.Array]:
    """Reads every parameter, one at a time, straight to its place on the mesh.

    Raises:
      InputError: a key is missing or left over, or a shape is not the config's: key, expected, found.
    """
    check_keys(weights, config)
    keys, table, parameters = stored_keys(config), parameter_table(config), {}
    for name, stored in keys.items():
        sharding = None if mesh is None else named_sharding(mesh, table[name].axes, table[name].shape, name)
        parameters[name] = _load(weights, name, stored, config, dtype, sharding)
    return parameters


def _load(weights, name: str, stored: Stored, config: DecoderConfig, dtype, sharding) -> jax.Array:
    """One parameter; a stacked one is made on the devices and filled a layer at a time. The devices transpose."""
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
        stack_LX.block_until_ready()  # else the host runs ahead and holds many layers
    return stack_LX


@partial(jax.jit, static_argnums=1)
def _transposed(array: jax.Array, order: tuple[int, ...]) -> jax.Array:
    return array.transpose(order)


@partial(jax.jit, donate_argnums=0)
def _set_layer(stack_LX: jax.Array, layer_X: jax.Array, layer) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack_LX, layer_X, layer, 0)


def _put(array: np.ndarray, dtype, sharding: NamedSharding | None) -> jax.Array:
    """To the default device, or to those of this process, each of which is given its own part."""
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
    """One layer's share of a parameter, in the file's order of dimensions; a view wherever it can be."""
    array, sizes = weights.read(key), config.sizes | {"V": config.vocab_size}
    expected = _expected(stored, config)
    if array.shape != expected:
        raise InputError(f"{weights.file_of(key)}: {key} has shape {array.shape}, and the config asks for {expected}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise InputError(f"{weights.file_of(key)}: {key} holds {array.dtype}; expected float32, float16 or bfloat16")
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
    """Key, shape and maker of every tensor of an exported model, as the file has it, without the padding."""
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
