"""A tuned model out, as the folder that transformers, vLLM and llama.cpp's converter read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from raft_jax.models import Model
from raft_jax.models.weights import stored_tensors

SHARD_BYTES = 4 << 30


def export_hf(
    model: Model, params: Mapping[str, jax.Array], folder: Path, *, dtype=jnp.float32, card: str = ""
) -> Path:
    """Writes config.json, generation_config.json, the tokenizer, its chat template, the weights and a model card.

    The folder appears whole or not at all; one that is there is replaced.

    Args:
      model: gives config and tokenizer.
      params: the weights to write.
      folder: where to.
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
    config = {**model.hf_config, "dtype": jnp.dtype(dtype).name}
    config.pop("torch_dtype", None)  # the older name of dtype
    _write_json(work / "config.json", config)
    generation = {"eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
    if config.get("bos_token_id") is not None:
        generation["bos_token_id"] = config["bos_token_id"]
    _write_json(work / "generation_config.json", generation)
    tokenizer.save(work)
    (work / "README.md").write_text(card, "utf-8")
    _write_weights(model, params, work, dtype)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(work, folder)
    return folder


def _write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def _write_weights(model: Model, params, folder: Path, dtype) -> None:
    """One model.safetensors, or shards of at most 4 GiB with an index."""
    from safetensors.numpy import save_file

    shards: list[dict[str, int]] = [{}]
    width = jnp.dtype(dtype).itemsize
    tensors = {key: (size * width, make) for key, size, make in stored_tensors(params, model.config)}
    for key, (size, _) in tensors.items():
        if shards[-1] and sum(shards[-1].values()) + size > SHARD_BYTES:
            shards.append({})
        shards[-1][key] = size
    names = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]
    for name, shard in zip(names, shards, strict=True):
        # Every process takes part in making the tensors; one writes them.
        made = {key: tensors[key][1]().astype(dtype) for key in shard}
        if jax.process_index() == 0:
            save_file(made, folder / name, metadata={"format": "pt"})
    if len(shards) > 1 and jax.process_index() == 0:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        _write_json(folder / "model.safetensors.index.json",
                    {"metadata": {"total_size": sum(size for size, _ in tensors.values())}, "weight_map": weight_map})
