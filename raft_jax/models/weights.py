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
from jax.sharding import Mesh

from raft_jax.errors import InputError
from raft_jax.models.decoder import DecoderConfig, parameter_table
from raft_jax.models.families import GGUF_KEYS, Stored, config_from_hf, hf_config_from_gguf, stored_keys
from raft_jax.sharding import named_sharding, to_host

INDEX_NAME = "model.safetensors.index.json"


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
        self.hf_config = read_object(folder / "config.json")
        self._file_of = self._index()

    def _index(self) -> dict[str, Path]:
        index_path = self.folder / INDEX_NAME
        if index_path.exists():
            weight_map = read_object(index_path).get("weight_map")
            if not isinstance(weight_map, dict):
                raise InputError(f"{index_path}: the key weight_map is missing or not an object")
            for name in weight_map.values():
                if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
                    raise InputError(f"{index_path}: the shard {name!r} does not lie in the folder")
            return {key: self.folder / name for key, name in weight_map.items()}
        path = self.folder / "model.safetensors"
        if not path.exists():
            found = ", ".join(sorted(p.name for p in self.folder.iterdir())) or "nothing"
            raise InputError(f"{self.folder}: neither model.safetensors nor {INDEX_NAME} is there (found {found})")
        with self._open(path) as file:
            return dict.fromkeys(file.keys(), path)

    @staticmethod
    def _open(path: Path):
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a whole safetensors file ({error}); fetch it again") from error

    def keys(self) -> set[str]:
        return set(self._file_of)

    def read(self, key: str) -> np.ndarray:
        path = self._file_of[key]
        with self._open(path) as file:
            if key not in set(file.keys()):
                raise InputError(f"{path}: the index says that {key} is here, and it is not")
            return file.get_tensor(key)


class GgufFile:
    """The tensors of a GGUF file under their Hugging Face keys, dequantised and as transformers stores them."""

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
        self.hf_config = hf_config_from_gguf(self.metadata, "output.weight" in self._tensors)
        config = config_from_hf(self.hf_config)
        self._name_of = {
            stored.key.format(layer): GGUF_KEYS[name].format(layer)
            for name, stored in stored_keys(config).items()
            for layer in (range(config.num_layers) if "{}" in stored.key else (0,))
        }
        self._num_heads = {"attn_q.weight": config.num_heads, "attn_k.weight": config.num_kv_heads}
        self._permuted = config.family == "llama"
        known = set(self._name_of.values())
        if surplus := sorted(set(self._tensors) - known):
            raise InputError(f"{path}: the tensor {surplus[0]} is not part of a {config.family} model")

    def keys(self) -> set[str]:
        return {key for key, name in self._name_of.items() if name in self._tensors}

    def read(self, key: str) -> np.ndarray:
        import gguf

        name = self._name_of[key]
        tensor = self._tensors[name]
        try:
            array = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(reversed(tensor.shape.tolist())))
        except (NotImplementedError, ValueError) as error:
            kind = tensor.tensor_type.name
            raise InputError(f"{self.path}: {name} of type {kind} cannot be read ({error})") from error
        heads = self._num_heads.get(name.split(".", 2)[-1])
        if heads and self._permuted:
            # llama.cpp keeps the two halves of each rotated head interleaved.
            array = array.reshape(heads, -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        return array


def open_weights(path: Path) -> SafetensorsFolder | GgufFile:
    """The reader for a folder with safetensors or a `.gguf` file."""
    if path.is_dir():
        return SafetensorsFolder(path)
    if path.suffix == ".gguf":
        return GgufFile(path)
    raise InputError(f"{path}: expected a Hugging Face folder or a .gguf file")


def load_parameters(
    weights: SafetensorsFolder | GgufFile, config: DecoderConfig, dtype=jnp.float32, mesh: Mesh | None = None
) -> dict[str, jax.Array]:
    """Reads every parameter, one at a time, straight to its place on the mesh.

    Raises:
      InputError: a key is missing or left over, or a shape is not the config's: key, expected, found.
    """
    keys, table = stored_keys(config), parameter_table(config)
    layers = range(config.num_layers)
    wanted = {stored.key.format(layer) for stored in keys.values() for layer in layers}
    found = weights.keys()
    if missing := sorted(wanted - found):
        raise InputError(f"{_place(weights)}: {missing[0]} is missing ({len(missing)} of {len(wanted)} tensors are)")
    # Old exports keep the tied head or the rope table as tensors of their own; neither adds anything.
    surplus = {key for key in found - wanted if not key.endswith("rotary_emb.inv_freq")}
    if config.tied_embeddings:
        surplus.discard("lm_head.weight")
    if surplus:
        raise InputError(f"{_place(weights)}: {min(surplus)} is not part of a {config.family} model with this config")
    parameters = {}
    for name, stored in keys.items():
        info = table[name]
        shape = info.shape[1:] if "{}" in stored.key else info.shape
        array = np.empty(info.shape, dtype)
        targets = [array[layer] for layer in layers] if "{}" in stored.key else [array]
        for layer, target in enumerate(targets):
            key = stored.key.format(layer)
            target[...] = _from_stored(weights, key, name, stored, shape, config)
        sharding = named_sharding(mesh, info.axes, info.shape, name) if mesh else None
        parameters[name] = jax.device_put(array, sharding)
    return parameters


def _place(weights: SafetensorsFolder | GgufFile) -> Path:
    return weights.folder if isinstance(weights, SafetensorsFolder) else weights.path


def _letters(name: str) -> str:
    return name.rpartition("_")[2].removeprefix("L")


def _from_stored(weights, key: str, name: str, stored: Stored, shape: tuple[int, ...], config: DecoderConfig):
    """One tensor of the file in our order of dimensions."""
    array, sizes = weights.read(key), config.sizes
    expected = tuple(int(np.prod([sizes[letter] for letter in dim])) for dim in stored.dims)
    if array.shape != expected:
        raise InputError(f"{_place(weights)}: {key} has shape {array.shape}, and the config asks for {expected}")
    letters = "".join(stored.dims)
    array = array.reshape([sizes[letter] for letter in letters])
    return array.transpose([letters.index(letter) for letter in _letters(name)]).reshape(shape)


def stored_tensors(
    params: Mapping[str, Any], config: DecoderConfig
) -> Iterator[tuple[str, int, Callable[[], np.ndarray]]]:
    """Key, number of elements and maker of every tensor of an exported model, in the file's order of dimensions."""
    sizes, table = config.sizes, parameter_table(config)

    def make(array, name: str, stored: Stored) -> np.ndarray:
        ours, letters = _letters(name), "".join(stored.dims)
        array = to_host(array).transpose([ours.index(letter) for letter in letters])
        return np.ascontiguousarray(array.reshape([math.prod(sizes[letter] for letter in dim) for dim in stored.dims]))

    for name, stored in stored_keys(config).items():
        elements = math.prod(table[name].shape)
        if "{}" not in stored.key:
            yield stored.key, elements, partial(make, params[name], name, stored)
            continue
        for layer in range(config.num_layers):
            of_layer = lambda name=name, stored=stored, layer=layer: make(params[name][layer], name, stored)  # noqa: E731
            yield stored.key.format(layer), elements // config.num_layers, of_layer
