"""Weight files: a folder with safetensors or a GGUF file, with every tensor under its Hugging Face key."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from raft_jax.errors import InputError, require_train
from raft_jax.files import read_object, require_regular
from raft_jax.models.families import DECODER_OF, config_from_hf, decoder_config, decoder_key, stored_keys
from raft_jax.models.families.metadata import ROPE_TENSORS, gguf_names, hf_config_from_gguf

MODEL_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MAX_HEADER = 32 << 20
GGUF_MAGIC, LFS_MAGIC = b"GGUF", b"version https://git-lfs"
SAFETENSORS_DTYPES = {
    name: jnp.dtype(ours)
    for name, ours in (
        ("F32", "float32"),
        ("F16", "float16"),
        ("BF16", "bfloat16"),
        ("F64", "float64"),
        ("I64", "int64"),
        ("I32", "int32"),
        ("I16", "int16"),
        ("I8", "int8"),
        ("U8", "uint8"),
        ("BOOL", "bool"),
    )
}


def _refuse_other_folders(folder: Path) -> None:
    """Raises InputError for a folder with an adapter, or with a GGUF file and no config.json."""
    if (folder / "adapter_config.json").exists():
        base = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
        base = base or "a base that it does not name"
        if any((folder / name).exists() for name in (MODEL_NAME, INDEX_NAME)):
            raise InputError(
                f"{folder}: holds a whole model and, in adapter_config.json, an adapter for {base}; "
                "which of the two is meant is not clear: move one of them elsewhere"
            )
        raise InputError(
            f"{folder}: a LoRA adapter for {base}; merge it into its base first, and give the folder of "
            "the merged model"
        )
    if not (folder / "config.json").exists():
        files = sorted(path.name for path in folder.iterdir() if path.suffix.lower() == ".gguf")
        if files:
            raise InputError(f"{folder}: config.json is missing; for the GGUF file in it give {folder / files[0]}")


class SafetensorsFolder:
    """The tensors of a Hugging Face folder: one `model.safetensors`, or shards with an index."""

    def __init__(self, folder: Path):
        self.folder = folder
        _refuse_other_folders(folder)
        whole_config = read_object(folder / "config.json")
        try:
            self.hf_config = decoder_config(whole_config)
        except InputError as error:
            raise InputError(f"{folder}: {error}") from error
        self._headers: dict[Path, tuple[int, dict[str, Any]]] = {}
        self._place_of = {key: (path, key) for key, path in self._find_tensors().items()}  # its file, and its key there
        self.with_vision = str(whole_config.get("model_type")) in DECODER_OF
        if self.with_vision:
            self._place_of = {
                ours: place for key, place in self._place_of.items() if (ours := decoder_key(key)) is not None
            }
        if EMBEDDING not in self._place_of and HEAD in self._place_of and self.hf_config.get("tie_word_embeddings"):
            self._place_of[EMBEDDING] = self._place_of.pop(HEAD)  # either name may hold the tied tensor

    def _find_tensors(self) -> dict[str, Path]:
        """The file of each key. An index whose shards are all missing is ignored if `model.safetensors` exists."""
        single, index_path = self.folder / MODEL_NAME, self.folder / INDEX_NAME
        file_of = self._weight_map(index_path) if index_path.exists() else {}
        shards = sorted(set(file_of.values()))
        if single.exists() and single not in shards:
            if there := [path.name for path in shards if path.exists()]:
                raise InputError(
                    f"{self.folder}: two sets of weights, {MODEL_NAME} and the shards of {INDEX_NAME} "
                    f"({there[0]}); transformers reads the first: move one of the sets elsewhere"
                )
            return dict.fromkeys(self._header(single)[1].keys() - {"__metadata__"}, single)
        if not index_path.exists():
            names = ", ".join(sorted(p.name for p in self.folder.iterdir())) or "nothing"
            raise InputError(f"{self.folder}: neither {MODEL_NAME} nor {INDEX_NAME} is there (found {names})")
        for path in shards:
            named = {key for key, place in file_of.items() if place == path}
            if surplus := sorted(self._header(path)[1].keys() - named - {"__metadata__"}):
                raise InputError(f"{path}: holds {surplus[0]}, which {INDEX_NAME} does not name")
        return file_of

    def _weight_map(self, index_path: Path) -> dict[str, Path]:
        weight_map = read_object(index_path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InputError(f"{index_path}: the key weight_map is missing or not an object")
        for name in weight_map.values():
            if not isinstance(name, str) or Path(name).name != name or name in ("", "..") or "\0" in name:
                raise InputError(f"{index_path}: the shard {name!r} does not lie in the folder")
        return {key: self.folder / name for key, name in weight_map.items()}

    @property
    def generation_config(self) -> dict[str, Any]:
        """The model's recommended sampling settings; empty if the folder has none."""
        return read_object(self.folder / "generation_config.json", optional=True)

    @property
    def place(self) -> Path:
        return self.folder

    def keys(self) -> set[str]:
        return set(self._place_of)

    def file_of(self, key: str) -> Path:
        return self._place_of[key][0]

    def describe(self, key: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of a tensor, without reading it."""
        path, key = self._place_of[key]
        entry = self._header(path)[1].get(key)
        if entry is None:
            raise InputError(f"{path}: the index says that {key} is here, and it is not")
        return tuple(entry["shape"]), entry["dtype"]

    def read(self, key: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Reads a tensor, or its rows from `start` to `stop`, without the latter.

        It is not memory-mapped: if the file shrank meanwhile, that would end the process.
        """
        shape, dtype = self.describe(key)
        path, key = self._place_of[key]
        begin, header = self._header(path)
        if dtype not in SAFETENSORS_DTYPES:
            raise InputError(
                f"{path}: {key} has dtype {dtype}, which is not supported; supported: " + ", ".join(SAFETENSORS_DTYPES)
            )
        row = math.prod(shape[1:]) * SAFETENSORS_DTYPES[dtype].itemsize
        if shape:
            shape = (len(range(*slice(start, stop).indices(shape[0]))), *shape[1:])
        array = np.empty(shape, SAFETENSORS_DTYPES[dtype])
        try:
            with require_regular(path).open("rb") as file:
                file.seek(begin + header[key]["data_offsets"][0] + start * row)
                num_bytes = file.readinto(array.reshape(-1).view(np.uint8)) if array.size else 0
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        if num_bytes != array.nbytes:
            raise InputError(f"{path}: ends within {key}; it became shorter after it was opened")
        return array

    def _header(self, path: Path) -> tuple[int, dict[str, Any]]:
        """The offset of a shard's data, and its header, which the safetensors library validates first."""
        from safetensors import SafetensorError, safe_open

        if path in self._headers:
            return self._headers[path]
        try:
            with require_regular(path).open("rb") as file:
                begin = file.read(len(LFS_MAGIC))
                size = int.from_bytes(begin[:8], "little")
                if begin == LFS_MAGIC:
                    raise InputError(f"{path}: a pointer of Git LFS and not the weights; fetch them with git lfs pull")
                if MAX_HEADER < size < path.stat().st_size:
                    raise InputError(f"{path}: a header of {size} bytes; at most {MAX_HEADER} are read")
                with safe_open(path, framework="numpy"):
                    pass
                file.seek(8)
                self._headers[path] = 8 + size, json.loads(file.read(size))
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path}: not a whole safetensors file ({error}); fetch or export it again") from error
        return self._headers[path]


def _open_gguf(path: Path):
    """The gguf library's reader, with a check that the file is as long as its fields say, and the metadata."""
    require_train("gguf")
    import gguf

    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, override_order=None):
            # Past the end of the file the library returns empty arrays, as many times as a count in the file says.
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError("it ends too early")
            return super()._get(offset, dtype, count, override_order)

    try:
        with require_regular(path).open("rb") as file:
            if file.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
                raise InputError(f"{path}: not a GGUF file")
        reader = Reader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, TypeError, IndexError, KeyError, OSError, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: a truncated or damaged GGUF file ({error}); fetch it again") from error
    if reader.byte_order != "I":
        raise InputError(f"{path}: a big-endian GGUF file; convert it to little-endian with gguf-convert-endian")
    return reader, metadata


def _refuse_other_gguf(metadata: Mapping[str, Any], path: Path) -> None:
    """Raises InputError for one part of a split model, or a file that is not a model."""
    if isinstance(count := metadata.get("split.count"), int) and count > 1:
        number = metadata.get("split.no", 0)
        raise InputError(
            f"{path}: part {number + 1 if isinstance(number, int) else '?'} of {count}; join them with "
            "gguf-split --merge"
        )
    if metadata.get("general.type", "model") != "model":
        raise InputError(
            f"{path}: a GGUF file of type {metadata['general.type']!r}, which is not a whole model; "
            "an adapter must be merged into its base first"
        )


class GgufFile:
    """The tensors of a GGUF file under their Hugging Face keys, dequantised, in transformers' layout."""

    generation_config: Mapping[str, Any] = {}
    with_vision = False

    def __init__(self, path: Path):
        self.path = path
        reader, self.metadata = _open_gguf(path)
        _refuse_other_gguf(self.metadata, path)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._num_bytes = len(reader.data)
        arch = self.metadata.get("general.architecture")
        rope_names = ROPE_TENSORS.get(arch, ()) if isinstance(arch, str) else ()
        rope = {name: self._dequantised(name) for name in rope_names if name in self._tensors}
        try:
            self.hf_config = hf_config_from_gguf(self.metadata, "output.weight" in self._tensors, rope)
            config = config_from_hf(self.hf_config)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
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

    def describe(self, key: str) -> tuple[tuple[int, ...], str]:
        """Shape of a tensor, without reading it, and the dtype that `read` returns."""
        return tuple(reversed(self._tensors[self._name_of[key]].shape.tolist())), "F32"

    def read(self, key: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Reads a tensor, or its rows from `start` to `stop`, without the latter."""
        name = self._name_of[key]
        rows: slice | np.ndarray = slice(start, stop)
        if heads := self._num_heads.get(name.split(".", 2)[-1]):
            # llama.cpp stores the two halves of each rotated head interleaved.
            (num_rows, _), _ = self.describe(key)
            rows = np.arange(num_rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)[rows]
        array = self._dequantised(name, rows)
        # llama.cpp stores offset + scale for a norm.
        return array - self._norm_offset if name.endswith("norm.weight") else array

    def _dequantised(self, name: str, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        import gguf

        tensor = self._tensors[name]
        if self.path.stat().st_size < self._num_bytes:
            raise InputError(f"{self.path}: became shorter after it was opened; fetch it again")
        data = tensor.data[rows]
        shape = (len(data), *reversed(tensor.shape.tolist()[:-1]))
        if not len(data):
            return np.empty(shape, np.float32)
        try:
            return gguf.dequantize(data, tensor.tensor_type).reshape(shape)
        except (NotImplementedError, ValueError) as error:
            kind = tensor.tensor_type.name
            raise InputError(f"{self.path}: {name} of type {kind} cannot be read ({error})") from error


def open_weights(path: Path) -> SafetensorsFolder | GgufFile:
    """The reader for a folder with safetensors or for a GGUF file, which is known by its suffix or its first bytes.

    Raises:
      InputError: neither of the two, or damaged.
    """
    if path.is_dir():
        return SafetensorsFolder(path)
    if path.suffix.lower() == ".gguf":
        return GgufFile(path)
    with require_regular(path).open("rb") as file:
        if file.read(len(GGUF_MAGIC)) == GGUF_MAGIC:
            return GgufFile(path)
    hint = f"; give the folder {path.parent}" if path.suffix == ".safetensors" else ""
    raise InputError(f"{path}: expected a Hugging Face folder or a .gguf file{hint}")
