"""Low-rank adapters (LoRA, arXiv:2106.09685): W + (alpha / rank) a b, with a and b trained and W frozen.

An adapter's arrays are parameters like the matrix that they adapt; the decoder adds (alpha / rank) x a b to x W. So a
student with adapters and its teacher share one copy of the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from raft_jax.errors import InputError
from raft_jax.models.config import LOGICAL_AXES, DecoderConfig, ParameterInfo
from raft_jax.models.families import stored_keys
from raft_jax.models.layer import adapter_names
from raft_jax.sharding import named_sharding
from raft_jax.sources import resolve

# Our parameter for each of Hugging Face's module names, which users set.
TARGETS = {
    "q_proj": "query_LDNH",
    "k_proj": "key_LDKH",
    "v_proj": "value_LDKH",
    "o_proj": "output_LNHD",
    "gate_proj": "gate_LDF",
    "up_proj": "up_LDF",
    "down_proj": "down_LFD",
}


def adapter_table(config: DecoderConfig, rank: int, targets: Sequence[str]) -> dict[str, ParameterInfo]:
    """Shape, logical axes and fan-in of every adapter array."""
    sizes, axes = config.sizes | {"R": rank}, LOGICAL_AXES | {"R": None}
    table = {}
    for target in targets:
        down, up = adapter_names(TARGETS[target])
        for name in (down, up):
            letters = name.rpartition("_")[2]
            shape = tuple(sizes[letter] for letter in letters)
            fan_in = math.prod(shape[1:-1]) if name == down else 0
            table[name] = ParameterInfo(shape, tuple(axes[letter] for letter in letters), fan_in)
    return table


def adapter_shardings(config: DecoderConfig, rank: int, targets: Sequence[str], mesh: Mesh) -> dict[str, NamedSharding]:
    """The sharding of the adapters on a mesh: that of the matrices that they adapt, and never along the rank."""
    table = adapter_table(config, rank, targets)
    return {name: named_sharding(mesh, info.axes, info.shape, name) for name, info in table.items()}


def init_adapters(
    config: DecoderConfig, rank: int, targets: Sequence[str], key: jax.Array, dtype=jnp.float32
) -> dict[str, jax.Array]:
    """a is uniform within ± fan_in^-1/2, as in PEFT, and b is zero, so that adapters add nothing at first."""
    table = adapter_table(config, rank, targets)
    keys = jax.random.split(key, len(table))

    def init(info, key):
        if not info.fan_in:
            return jnp.zeros(info.shape, dtype)
        return jax.random.uniform(key, info.shape, dtype, -1, 1) / math.sqrt(info.fan_in)

    return {name: init(info, key) for (name, info), key in zip(table.items(), keys, strict=True)}


def merge(params: Mapping[str, jax.Array], adapters: Mapping[str, jax.Array], scale: float) -> dict[str, jax.Array]:
    """The parameters with the adapters added in: W + scale a b, summed in float32.

    Args:
      params: all parameters of the model.
      adapters: from `init_adapters`, trained.
      scale: alpha / rank.
    """
    merged = dict(params)
    for parameter in TARGETS.values():
        down, up = adapter_names(parameter)
        if down in adapters:
            a, b = (adapters[name].astype(jnp.float32) for name in (down, up))
            added = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1))(a, b)
            merged[parameter] = (params[parameter] + scale * added).astype(params[parameter].dtype)
    return merged


def save_peft(
    adapters: Mapping[str, jax.Array],
    config: DecoderConfig,
    folder: Path,
    *,
    alpha: float,
    base: str,
    with_vision: bool = False,
) -> None:
    """Writes adapters in PEFT's format: adapter_config.json and adapter_model.safetensors.

    Where Hugging Face stores several of our matrices as one (Phi-3's qkv_proj), their adapters become one, whose rank
    is the sum of theirs.

    Args:
      adapters: from `init_adapters`, trained.
      config: of the decoder.
      folder: created if it is missing.
      alpha: adapters are scaled by alpha / rank.
      base: source of the base model, as in `load_pretrained`.
      with_vision: whether the base is a vision-language model, whose decoder is called `language_model` and whose
        vision tower has modules of the same names.
    """
    from safetensors.numpy import save_file

    stored, modules = stored_keys(config), {}
    for parameter in TARGETS.values():
        if adapter_names(parameter)[0] in adapters:
            modules.setdefault(stored[parameter].key.removesuffix(".weight"), []).append(parameter)
    tensors, ranks = {}, {}
    for module, parameters in modules.items():
        a_LRI, b_LOR = _joined(parameters, adapters, config, stored)
        ranks[module.rpartition(".")[2]] = a_LRI.shape[1]
        for layer in range(config.num_layers):
            name = "base_model.model." + (_within_vision(module) if with_vision else module).format(layer)
            tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(a_LRI[layer])
            tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(b_LOR[layer])
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    rank = adapters[next(iter(adapters))].shape[-1]
    peft_config = _peft_config(ranks, rank, alpha, base, with_vision)
    (folder / "adapter_config.json").write_text(json.dumps(peft_config, indent=2) + "\n", "utf-8")
    if peft_config["base_model_name_or_path"] is None:
        (folder / "README.md").write_text(
            f"This adapter belongs to {base}, which PEFT cannot load by its name. Load the same model in transformers' "
            "format, and give it to PeftModel.from_pretrained together with this folder.\n",
            "utf-8",
        )


def _peft_config(ranks: Mapping[str, int], rank: int, alpha: float, base: str, with_vision: bool) -> dict[str, Any]:
    """adapter_config.json; `ranks` are those of PEFT's modules by name, `rank` that of one of our matrices."""
    smallest = min(ranks.values())
    wider = {name: size for name, size in ranks.items() if size != smallest}
    targets: list[str] | str = sorted(ranks)
    if with_vision:  # a pattern, which must match a module's whole name
        targets = rf".*\blanguage_model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(targets)})"
    name, revision = peft_base(base)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision,
        "r": smallest,
        "lora_alpha": alpha * smallest / rank,
        "rank_pattern": wider,
        "alpha_pattern": {name: alpha * size / rank for name, size in wider.items()},
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _within_vision(module: str) -> str:
    return "model.language_model." + module.removeprefix("model.")


def peft_base(source: str) -> tuple[str | None, str | None]:
    """Name and revision of a base for PEFT: the hub's, or a folder's absolute path and None; else None and None.

    Example:
      >>> peft_base("hf://owner/name@main")
      ('owner/name', 'main')
    """
    if source.startswith("hf://"):
        name, _, revision = source.removeprefix("hf://").partition("@")
        return name, revision or None
    try:
        path = resolve(source)
    except InputError:  # the source has disappeared since training began
        return None, None
    return (str(path.resolve()), None) if path.is_dir() else (None, None)


def _joined(parameters, adapters, config, stored):
    """One module's a `[L, R, I]` and b `[L, O, R]`; of several parameters, a is concatenated and b block-diagonal."""
    sizes = config.sizes
    parts = {}
    for parameter in parameters:
        a, b = (np.asarray(adapters[name], np.float32) for name in adapter_names(parameter))
        L, R = b.shape[:2]
        parts[stored[parameter].part] = a.reshape(L, -1, R).swapaxes(1, 2), b.reshape(L, R, -1).swapaxes(1, 2)
    fused = stored[parameters[0]].fused
    if not fused:
        return parts[0]
    heights = [math.prod(sizes[letter] for letter in letters) for letters in fused]
    R = next(iter(parts.values()))[0].shape[1]
    b_LOR = np.zeros((config.num_layers, sum(heights), R * len(parts)), np.float32)
    for place, (part, (_, b)) in enumerate(sorted(parts.items())):
        start = sum(heights[:part])
        b_LOR[:, start : start + heights[part], place * R : (place + 1) * R] = b
    return np.concatenate([a for _, (a, _) in sorted(parts.items())], axis=1), b_LOR
