"""Exports a trained model as a folder that transformers, vLLM and llama.cpp's converter read."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from raft_jax.files import SUMS, write_sums
from raft_jax.models import Model
from raft_jax.models.weights import SAFETENSORS_DTYPES, stored_tensors

SHARD_BYTES = 4 << 30
WEIGHTS = ".safetensors"  # in the names of the files with weights, their index included
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def export_hf(
    model: Model, params: Mapping[str, jax.Array], folder: Path, *, dtype=jnp.bfloat16, card: str = ""
) -> Path:
    """Writes config.json, generation_config.json, the tokenizer, its chat template, the weights and a model card.

    The folder appears complete or not at all; an existing one is replaced.

    Args:
      model: provides the config and the tokenizer.
      params: the weights to write.
      folder: the destination.
      dtype: of the weights on disk.
      card: text of README.md.

    Returns:
      The folder.
    """
    if jax.process_index() != 0:
        _write_weights(model, params, folder, dtype)
        return folder
    work = folder.with_name(folder.name + ".partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    tokenizer = model.tokenizer
    name = jnp.dtype(dtype).name
    config = {**model.hf_config, "dtype": name, "torch_dtype": name}  # vLLM reads the older name, or takes float32
    config.pop("auto_map", None)  # refers to code that is not exported
    _write_json(work / "config.json", config)
    # Keep the base model's sampling settings (temperature, top_p, ...).
    generation = {key: value for key, value in (model.generation or {}).items() if key != "transformers_version"}
    generation |= {"eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
    if config.get("bos_token_id") is not None:
        generation["bos_token_id"] = config["bos_token_id"]
    _write_json(work / "generation_config.json", generation)
    tokenizer.save(work)
    (work / "README.md").write_text(card, "utf-8")
    _write_weights(model, params, work, dtype)
    write_sums(work)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(work, folder)
    return folder


def as_read_back(params: dict[str, jax.Array], dtype, like: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The weights that would be read from their export in `dtype`, with the dtypes and shardings of `like`.

    `params` is emptied, so that no weight is held twice.
    """
    read = {}
    for name in list(params):  # one by one, as a single program would leave out a conversion and its inverse
        array = params.pop(name).astype(dtype).astype(like[name].dtype)
        read[name] = jax.device_put(array, like[name].sharding)
    return read


def remove_weights(folder: Path) -> None:
    """Removes the weights of an exported model, and their names from SHA256SUMS; the other files stay."""
    if (folder / SUMS).exists():
        lines = [line for line in (folder / SUMS).read_text("utf-8").splitlines() if WEIGHTS not in line]
        (folder / SUMS).write_text("".join(f"{line}\n" for line in lines), "utf-8")
    for path in folder.glob(f"*{WEIGHTS}*"):
        path.unlink()


def _write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def _write_weights(model: Model, params, folder: Path, dtype) -> None:
    """One model.safetensors, or shards of at most 4 GiB with an index."""
    dtype = jnp.dtype(dtype)
    shards: list[dict[str, tuple]] = [{}]
    room = SHARD_BYTES
    for key, shape, make in stored_tensors(params, model.config):
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and size > room:
            shards.append({})
            room = SHARD_BYTES
        room -= size
        shards[-1][key] = (shape, make)
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    )
    total = sum(_write_shard(folder / name, shard, dtype) for name, shard in zip(names, shards, strict=True))
    if len(shards) > 1 and jax.process_index() == 0:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        _write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _write_shard(path: Path, shard: dict[str, tuple], dtype) -> int:
    """Writes safetensors one tensor at a time, without a second copy of the model; returns the bytes of data."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for key, (shape, _) in shard.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    writes = jax.process_index() == 0
    with path.open("wb") if writes else nullcontext() as file:
        if writes:
            file.write(len(text).to_bytes(8, "little") + text)
        for _, make in shard.values():
            array = make()  # all processes take part in gathering the tensor; process 0 writes it
            if writes:
                file.write(np.array(array, dtype, order="C").view(np.uint8).data)
    return end
