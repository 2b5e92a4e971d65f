"""Converts a GGUF file's metadata to the config.json of the same model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from raft_jax.errors import InputError
from raft_jax.models.families import FAMILIES, keys
from raft_jax.models.families.rope import llama3_factors, plain_frequencies

ARCHITECTURES = {  # llama.cpp's name: transformers'
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
ROPE_TENSORS = {"llama": ("rope_freqs.weight",), "phi3": ("rope_factors_long.weight", "rope_factors_short.weight")}
# Number of layers of the 27B models, whose queries are scaled by width / heads, not by the head width. GGUF files do
# not store this.
SCALED_BY_MODEL_WIDTH = {"gemma2": 46, "gemma3_text": 62}


def gguf_names(family: str) -> Mapping[str, str]:
    """llama.cpp's name of each of our parameters."""
    return keys.GGUF_PHI3 if family == "phi3" else keys.GGUF


def hf_config_from_gguf(
    metadata: Mapping[str, Any], has_output: bool, rope_tensors: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The `config.json` that a GGUF file describes.

    Args:
      metadata: the file's fields.
      has_output: whether it has a separate unembedding.
      rope_tensors: the tensors of ROPE_TENSORS that it has.

    Raises:
      InputError: an architecture or a kind of rope that is not supported, or a field that is missing.
    """
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise InputError(f"GGUF architecture {arch!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}")
    family = ARCHITECTURES[arch]

    def get(key: str, default=None):
        value = metadata.get(f"{arch}.{key}", default)
        if value is None:
            raise InputError(f"GGUF metadata lacks {arch}.{key}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0 or not math.isfinite(value):
            raise InputError(f"GGUF metadata: {arch}.{key} must be one number of 0 or more, got {_brief(value)}")
        return value

    if not isinstance(metadata.get("tokenizer.ggml.tokens"), list):
        raise InputError("GGUF metadata lacks tokenizer.ggml.tokens")
    heads, width = get("attention.head_count"), get("embedding_length")
    head_width = get("attention.key_length", width // max(heads, 1))
    _refuse_other_arithmetic(metadata, arch, head_width)
    config = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_width,
        "num_hidden_layers": get("block_count"),
        "intermediate_size": get("feed_forward_length"),
        "max_position_embeddings": get("context_length"),
        "rope_theta": get("rope.freq_base", 10_000.0),
        # GGUF stores 1e-5 as the nearest float32; rounding to six digits restores the original value.
        "rms_norm_eps": _shortest(get("attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": not has_output,
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
    }
    if family == "qwen2":
        del config["head_dim"]  # transformers has no head_dim for this family
        if head_width != width // heads:
            config["head_dim"] = head_width
    if not family.startswith("gemma"):
        config["hidden_act"] = "silu"
    if family == "phi3":
        config |= _phi3(get, metadata, arch, head_width, rope_tensors)
    elif family.startswith("gemma"):
        config |= _gemma(get, metadata, arch, family, config)
    else:
        if scaling := _rope_scaling(get, metadata, arch, config, rope_tensors):
            config["rope_scaling"] = scaling
    return config | _special_token_ids(metadata)


def _special_token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {ours: metadata.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in names.items()}
    return {name: value for name, value in ids.items() if value is not None}


def _brief(value) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + " …"


def _shortest(value: float) -> float:
    return float(f"{value:.6g}")


def _rope_scaling(get, metadata, arch: str, config, rope_tensors) -> dict[str, Any] | None:
    # As llama.cpp reads them: the default type is linear, the factor has an older name, and 0 means no scaling.
    kind = metadata.get(f"{arch}.rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise InputError(f"GGUF rope scaling {kind!r} is not supported; supported: none, linear")
    factor = get("rope.scaling.factor", get("rope.scale_linear", 0.0)) if kind == "linear" else 0.0
    linear = {"rope_type": "linear", "factor": _shortest(factor)} if factor not in (0, 1) else None
    if get("rope.scaling.attn_factor", 1.0) not in (0, 1):
        raise InputError(f"GGUF metadata: {arch}.rope.scaling.attn_factor is not supported")
    if "rope_freqs.weight" not in rope_tensors:
        return linear
    if linear:
        raise InputError(f"GGUF file: rope_freqs.weight and a linear factor of {factor} together are not supported")
    # GGUF stores only the divisors of Llama 3's frequencies; the settings behind them are known for all Llama 3 models.
    factors, low_and_high = rope_tensors["rope_freqs.weight"], {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    plain, original = plain_frequencies(config["rope_theta"], config["head_dim"]), 8192
    factor = _shortest(float(factors.max()))
    if factors.shape != plain.shape or not np.allclose(
        factors, llama3_factors(plain, factor, *low_and_high.values(), original), rtol=1e-3
    ):
        raise InputError("GGUF tensor rope_freqs.weight: not the rope of Llama 3.x (low 1, high 4, length 8192)")
    return {"rope_type": "llama3", "factor": factor, **low_and_high, "original_max_position_embeddings": original}


def _refuse_other_arithmetic(metadata, arch: str, head_width: int) -> None:
    """Raises InputError for fields that make llama.cpp compute differently from this decoder."""
    for key, usual in {
        "rope.dimension_count": head_width,
        "rope.dimension_count_swa": head_width,
        "expert_count": 0,
        "attention.value_length": head_width,
        "attention.value_length_swa": head_width,
        "attention.key_length_swa": head_width,
        "attention.causal": True,
        "attention.clamp_kqv": 0,
        "attention.max_alibi_bias": 0,
        "logit_scale": 1,
        "residual_scale": 1,
        "embedding_scale": 1,
    }.items():
        if key == "rope.dimension_count" and arch == "phi3":
            continue  # _phi3 reads it
        if (value := metadata.get(f"{arch}.{key}", usual)) not in (usual, 0):
            raise InputError(f"GGUF metadata: {arch}.{key} = {value} is not supported; supported: {usual}")


def _phi3(get, metadata, arch: str, head_width: int, rope_tensors) -> dict[str, Any]:
    if metadata.get(f"{arch}.rope.scaling.type", "none") not in ("none", "longrope") or (
        get("rope.scaling.factor", get("rope.scale_linear", 0.0)) not in (0, 1) and not rope_tensors
    ):
        raise InputError(
            "GGUF rope scaling of phi3 is supported by its tensors rope_factors_long.weight and "
            "rope_factors_short.weight only"
        )
    rotary_width, maximum = get("rope.dimension_count", head_width), get("context_length")
    original = get("rope.scaling.original_context_length", maximum)
    config = {
        "partial_rotary_factor": rotary_width / head_width,
        "original_max_position_embeddings": original,
        "sliding_window": get("attention.sliding_window", 0) or None,
    }
    if rope_tensors:
        short, long = (rope_tensors.get(f"rope_factors_{kind}.weight") for kind in ("short", "long"))
        if short is None or long is None:
            raise InputError("GGUF file: rope_factors_long.weight and rope_factors_short.weight belong together")
        config["rope_scaling"] = {
            "rope_type": "longrope",
            "short_factor": [_shortest(float(x)) for x in short],
            "long_factor": [_shortest(float(x)) for x in long],
        }
        usual = math.sqrt(1 + math.log(maximum / original) / math.log(original)) if maximum > original else 1.0
        if abs((scale := get("rope.scaling.attn_factor", usual)) - usual) > 1e-4:
            config["rope_scaling"]["attention_factor"] = _shortest(scale)
    return config


def _gemma(get, metadata, arch: str, family: str, config) -> dict[str, Any]:
    width, heads, layers = config["hidden_size"], config["num_attention_heads"], config["num_hidden_layers"]
    scaled_by = width // heads if layers == SCALED_BY_MODEL_WIDTH[family] else config["head_dim"]
    fields = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scaled_by,
        "sliding_window": get("attention.sliding_window"),
    }
    scaling = _rope_scaling(get, metadata, arch, config, {})
    if scaling:
        fields["rope_scaling"] = scaling
    if family == "gemma2":
        return fields | {
            "attn_logit_softcapping": _shortest(get("attn_logit_softcapping", 50.0)),
            "final_logit_softcapping": _shortest(get("final_logit_softcapping", 30.0)),
        }
    fields["rope_local_base_freq"] = get("rope.freq_base_swa", 10_000.0)
    if (cap := metadata.get(f"{arch}.final_logit_softcapping")) is not None:
        fields["final_logit_softcapping"] = _shortest(cap)
    return fields
