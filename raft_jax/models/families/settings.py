"""How each family reads its config.json: the fields of DecoderConfig that `plain` does not read for all families."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from typing import Any

from raft_jax.errors import InputError
from raft_jax.models.families.rope import make_rope, no_rope
from raft_jax.models.rope import Rope
from raft_jax.models.transformers_quietly import transformers_quietly

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}  # theirs: ours
FULL, SLIDING = "full_attention", "sliding_attention"
# Keys that every config.json must have; for a missing one transformers would take a 7B model's value.
REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers")
# Upper limits of sizes from which lists are made; a damaged or hostile number must not exhaust the memory.
LIMITS = {"num_hidden_layers": 10_000, "num_attention_heads": 65_536, "head_dim": 65_536}
IGNORED = ("dtype", "torch_dtype", "auto_map", "id2label", "label2id")  # they do not affect the arithmetic
Config = Mapping[str, Any]  # config.json as transformers reads it
Fields = dict[str, Any]  # of DecoderConfig


def as_transformers_reads(hf: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with transformers' defaults for missing keys, and with current names for older keys.

    Raises:
      InputError: a required key is missing, a size exceeds its limit, or transformers refuses a value.
    """
    for key in REQUIRED:
        size(hf, key)
    for key in ("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"):
        if hf.get(key) is not None:
            size(hf, key)
    for key in ("layer_types", "no_rope_layers"):
        value = hf.get(key)
        if value is not None and not (isinstance(value, list) and len(value) >= hf["num_hidden_layers"]):
            kinds = f"{FULL} or {SLIDING}" if key == "layer_types" else "0 or 1"
            raise InputError(f"config.json: {key} must be a list of {hf['num_hidden_layers']} times {kinds}")
    settings = {key: value for key, value in copy.deepcopy(dict(hf)).items() if key not in IGNORED}
    with transformers_quietly():  # values that it only warns of are refused below, or have no effect here
        from transformers import CONFIG_MAPPING

        try:
            return CONFIG_MAPPING[hf["model_type"]].from_dict(settings).to_dict()
        except Exception as error:  # its checks raise different types
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            line = re.sub(r"^\w+Error: ", "", lines[-1]) if lines else type(error).__name__
            raise InputError(f"config.json: {line}") from error


def size(hf: Config, key: str) -> int:
    """A whole number above 0, or an InputError that names the key."""
    value, limit = hf.get(key), LIMITS.get(key, 2**31 - 1)
    if value is None:
        raise InputError(f"config.json: {hf['model_type']} needs the key {key}")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"config.json: {key} must be a whole number above 0, got {value!r}")
    if value > limit:
        raise InputError(f"config.json: {key} must be at most {limit}, got {value}")
    return value


def number(hf: Config, key: str) -> float:
    """A finite number above 0, or an InputError that names the key."""
    value = hf.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InputError(f"config.json: {key} must be a number above 0, got {value!r}")
    return float(value)


def plain(hf: Config) -> Fields:
    """The fields that all families read in the same way."""
    heads = size(hf, "num_attention_heads")
    kv_heads = heads if hf.get("num_key_value_heads") is None else size(hf, "num_key_value_heads")
    if heads % kv_heads:
        raise InputError(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    head_width = size(hf, "hidden_size") // heads if hf.get("head_dim") is None else size(hf, "head_dim")
    if not 0 < head_width <= LIMITS["head_dim"]:
        raise InputError(f"config.json: heads of width {head_width} are not supported; at most {LIMITS['head_dim']}")
    activation = hf.get("hidden_activation") or hf.get("hidden_act")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise InputError(
            f"config.json: the activation {activation!r} is not supported; supported: " + ", ".join(ACTIVATIONS)
        )
    return {
        "vocab_size": size(hf, "vocab_size"),
        "num_layers": size(hf, "num_hidden_layers"),
        "width": size(hf, "hidden_size"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_width": head_width,
        "ffn_width": size(hf, "intermediate_size"),
        "max_positions": size(hf, "max_position_embeddings"),
        "norm_epsilon": number(hf, "rms_norm_eps"),
        "activation": ACTIVATIONS[activation],
        "tied_embeddings": bool(hf["tie_word_embeddings"]),
    }


def llama(hf: Config, fields: Fields) -> Fields:
    return {"ropes": (whole_rope(rope_settings(hf), hf, fields),)}


def whole_rope(settings: Mapping[str, Any], hf: Config, fields: Fields) -> Rope:
    """The rope of a family that rotates the whole width of each head."""
    for key in ("partial_rotary_factor", "rotary_dim"):
        whole = fields["head_width"] if key == "rotary_dim" else 1.0
        if (settings | hf).get(key, whole) not in (whole, None):
            raise InputError(f"config.json: {key} is not supported for {hf['model_type']}")
    if fields["head_width"] % 2:
        raise InputError(f"config.json: heads of the odd width {fields['head_width']} are not supported")
    return make_rope(settings, fields["head_width"], fields["max_positions"])


def smollm3(hf: Config, fields: Fields) -> Fields:
    """Every fourth layer has no position encoding (arXiv:2501.18795)."""
    turns = hf["no_rope_layers"]
    if not all(turn in (0, 1) for turn in turns):
        raise InputError(f"config.json: no_rope_layers must be a list of {fields['num_layers']} times 0 or 1")
    turns = turns[: fields["num_layers"]]
    window = hf["sliding_window"] if hf["use_sliding_window"] else None
    rope = llama(hf, fields)["ropes"][0]
    chosen = {"layer_ropes": tuple(0 if turn else 1 for turn in turns), "ropes": (rope, no_rope(fields["head_width"]))}
    return (chosen if 0 in turns else {"ropes": (rope,)}) | windows(hf, fields, hf["layer_types"], window)


def qwen(hf: Config, fields: Fields) -> Fields:
    """With use_sliding_window, the layers from max_window_layers on have a sliding window."""
    return llama(hf, fields) | windows(hf, fields, hf["layer_types"], hf["sliding_window"])


def qwen2(hf: Config, fields: Fields) -> Fields:
    return qwen(hf, fields) | {"qkv_bias": True}


def qwen3(hf: Config, fields: Fields) -> Fields:
    return qwen(hf, fields) | {"qk_norm": True}


def mistral(hf: Config, fields: Fields) -> Fields:
    """All layers have a sliding window, if the config has one."""
    return llama(hf, fields) | windows(hf, fields, [SLIDING] * fields["num_layers"], hf.get("sliding_window"))


def phi3(hf: Config, fields: Fields) -> Fields:
    """Only a part of each head is rotated."""
    rope = rope_settings(hf)
    rotary_width = int(fields["head_width"] * number(rope, "partial_rotary_factor"))
    if rotary_width % 2 or not 0 < rotary_width <= fields["head_width"]:
        raise InputError(
            f"config.json: partial_rotary_factor turns {rotary_width} of {fields['head_width']} numbers; "
            "it must turn an even part of them"
        )
    ropes = {"ropes": (make_rope(rope, rotary_width, fields["max_positions"]),)}
    return ropes | windows(hf, fields, [SLIDING] * fields["num_layers"], hf["sliding_window"])


def gemma2(hf: Config, fields: Fields) -> Fields:
    """Every other layer has a sliding window; attention scores and logits are soft-capped."""
    caps = {"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"}
    return (
        _gemma(hf, fields)
        | llama(hf, fields)
        | {ours: None if hf[theirs] is None else number(hf, theirs) for ours, theirs in caps.items()}
    )


def gemma3(hf: Config, fields: Fields) -> Fields:
    """Every sixth layer is global and has another rope base than the local layers."""
    if hf["attn_logit_softcapping"] is not None:  # transformers reads it and does not apply it
        raise InputError("config.json: attn_logit_softcapping is not supported for gemma3_text; remove it")
    nested = hf["rope_parameters"]
    if nested.keys() != {FULL, SLIDING}:
        raise InputError(
            f"config.json: gemma3_text needs rope_parameters by layer type ({FULL}, {SLIDING}), got {sorted(nested)}"
        )
    ropes = tuple(whole_rope(nested[kind], hf, fields) for kind in (FULL, SLIDING))
    cap = None if hf["final_logit_softcapping"] is None else number(hf, "final_logit_softcapping")
    chosen = {"ropes": ropes, "layer_ropes": tuple(int(kind == SLIDING) for kind in hf["layer_types"])}
    return _gemma(hf, fields) | chosen | {"qk_norm": True, "logit_softcap": cap}


def _gemma(hf: Config, fields: Fields) -> Fields:
    return {
        "norm_offset": 1.0,
        "post_norms": True,
        "embedding_scale": fields["width"] ** 0.5,
        "query_scale": number(hf, "query_pre_attn_scalar") ** -0.5,
    } | windows(hf, fields, hf["layer_types"], hf["sliding_window"])


def windows(hf: Config, fields: Fields, kinds: list[str], window: int | None) -> Fields:
    """Each layer's window: the tokens that a token attends to, itself included. One of max_positions or more is left
    out."""
    layers = fields["num_layers"]
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= {FULL, SLIDING}:
        raise InputError(f"config.json: layer_types must be a list of {layers} times {FULL} or {SLIDING}")
    if window is None and SLIDING in (hf.get("layer_types") or ()):
        raise InputError(
            f"config.json: layer_types has {SLIDING} and there is no sliding_window"
            + (" (use_sliding_window is false)" if hf.get("use_sliding_window") is False else "")
        )
    if window is None or SLIDING not in kinds or size(hf, "sliding_window") >= fields["max_positions"]:
        return {}
    return {"windows": tuple(window if kind == SLIDING else fields["max_positions"] for kind in kinds)}


def rope_settings(hf: Config) -> dict[str, Any]:
    """The settings of the one rope of all layers; transformers groups several keys of its earlier releases in them."""
    group = hf["rope_parameters"]
    if any(isinstance(value, Mapping) for value in group.values()):
        raise InputError(f"config.json: rope_parameters by layer type is not supported for {hf['model_type']}")
    return dict(group)
