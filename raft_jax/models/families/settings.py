"""What each family makes of its config.json: the fields of DecoderConfig in which it is not a plain llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raft_jax.errors import InputError
from raft_jax.models.families.rope import make_rope, no_rope

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}  # theirs: ours
FULL, SLIDING = "full_attention", "sliding_attention"
Config = Mapping[str, Any]  # config.json over the family's defaults
Fields = dict[str, Any]  # of DecoderConfig


def size(hf: Config, key: str) -> int:
    """A whole number above 0, or an InputError that names the key."""
    value = hf.get(key)
    if value is None:
        raise InputError(f"config.json: {hf['model_type']} needs the key {key}")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"config.json: {key} must be a whole number above 0, got {value!r}")
    return value


def number(hf: Config, key: str) -> float:
    """A number above 0, or an InputError that names the key."""
    value = hf.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise InputError(f"config.json: {key} must be a number above 0, got {value!r}")
    return float(value)


def plain(hf: Config) -> Fields:
    """What all families read alike."""
    heads = size(hf, "num_attention_heads")
    kv_heads = heads if hf.get("num_key_value_heads") is None else size(hf, "num_key_value_heads")
    if heads % kv_heads:
        raise InputError(f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads "
                         f"{kv_heads}")
    head_width = size(hf, "hidden_size") // heads if hf.get("head_dim") is None else size(hf, "head_dim")
    activation = hf.get("hidden_activation") or hf.get("hidden_act")
    if activation not in ACTIVATIONS:
        raise InputError(f"config.json: the activation {activation!r} is not supported; supported: "
                         + ", ".join(ACTIVATIONS))
    return {
        "vocab_size": size(hf, "vocab_size"), "num_layers": size(hf, "num_hidden_layers"),
        "width": size(hf, "hidden_size"), "num_heads": heads, "num_kv_heads": kv_heads, "head_width": head_width,
        "ffn_width": size(hf, "intermediate_size"), "max_positions": size(hf, "max_position_embeddings"),
        "norm_epsilon": number(hf, "rms_norm_eps"), "activation": ACTIVATIONS[activation],
        "tied_embeddings": bool(hf["tie_word_embeddings"]),
    }


def llama(hf: Config, fields: Fields) -> Fields:
    rope = rope_settings(hf)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"config.json: partial_rotary_factor is not supported for {hf['model_type']}")
    return {"ropes": (make_rope(rope, fields["head_width"], fields["max_positions"]),)}


def smollm3(hf: Config, fields: Fields) -> Fields:
    """Every fourth layer knows no positions (arXiv:2501.18795)."""
    layers = fields["num_layers"]
    turns = hf.get("no_rope_layers") or [(layer + 1) % size(hf, "no_rope_layer_interval") != 0
                                         for layer in range(layers)]
    if not isinstance(turns, list) or len(turns) < layers or not set(turns) <= {0, 1}:
        raise InputError(f"config.json: no_rope_layers must be a list of {layers} times 0 or 1")
    turns = turns[:layers]
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    kinds = hf.get("layer_types") or [SLIDING if window and not turn else FULL for turn in turns]
    rope = llama(hf, fields)["ropes"][0]
    chosen = {"layer_ropes": tuple(0 if turn else 1 for turn in turns), "ropes": (rope, no_rope(fields["head_width"]))}
    return (chosen if 0 in turns else {"ropes": (rope,)}) | windows(hf, fields, kinds, window)


def qwen(hf: Config, fields: Fields) -> Fields:
    """Layers from max_window_layers on slide, where use_sliding_window asks for it."""
    window = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    kinds = hf.get("layer_types") or [
        SLIDING if window and layer >= hf["max_window_layers"] else FULL for layer in range(fields["num_layers"])
    ]
    return llama(hf, fields) | windows(hf, fields, kinds, window)


def qwen2(hf: Config, fields: Fields) -> Fields:
    return qwen(hf, fields) | {"qkv_bias": True}


def qwen3(hf: Config, fields: Fields) -> Fields:
    return qwen(hf, fields) | {"qk_norm": True}


def mistral(hf: Config, fields: Fields) -> Fields:
    """All layers slide, if there is a window."""
    return llama(hf, fields) | windows(hf, fields, [SLIDING] * fields["num_layers"], hf.get("sliding_window"))


def phi3(hf: Config, fields: Fields) -> Fields:
    """Part of each head turns, and LongRoPE goes by two names besides its own."""
    rope = rope_settings(hf) | {"original_max_position_embeddings": hf["original_max_position_embeddings"]}
    if rope.get("rope_type") in ("su", "yarn"):
        rope["rope_type"] = "longrope"
    if rope.get("rope_type", "default") not in ("default", "longrope"):
        raise InputError(f"config.json: rope_type {rope['rope_type']!r} is not supported for phi3; supported: "
                         "default, longrope")
    rotary_width = int(fields["head_width"] * number({"partial_rotary_factor": 1.0} | rope, "partial_rotary_factor"))
    if rotary_width % 2 or not 0 < rotary_width <= fields["head_width"]:
        raise InputError(f"config.json: partial_rotary_factor turns {rotary_width} of {fields['head_width']} numbers; "
                         "it must turn an even part of them")
    ropes = {"ropes": (make_rope(rope, rotary_width, fields["max_positions"]),)}
    return ropes | windows(hf, fields, [SLIDING] * fields["num_layers"], hf.get("sliding_window"))


def gemma2(hf: Config, fields: Fields) -> Fields:
    """Every other layer slides; attention scores and logits are capped."""
    kinds = hf.get("layer_types") or [
        FULL if (layer + 1) % 2 == 0 else SLIDING for layer in range(fields["num_layers"])
    ]
    caps = {"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"}
    return _gemma(hf, fields, kinds) | llama(hf, fields) | {
        ours: None if hf.get(theirs) is None else number(hf, theirs) for ours, theirs in caps.items()
    }


def gemma3(hf: Config, fields: Fields) -> Fields:
    """Every sixth layer is global and turns by another base than the local ones."""
    if hf.get("attn_logit_softcapping") is not None:  # transformers reads it and does not apply it
        raise InputError("config.json: attn_logit_softcapping is not supported for gemma3_text; remove it")
    period = size(hf, "sliding_window_pattern")
    kinds = hf.get("layer_types") or [
        FULL if (layer + 1) % period == 0 else SLIDING for layer in range(fields["num_layers"])
    ]
    nested = hf.get("rope_parameters") or {}
    if not all(isinstance(value, Mapping) for value in nested.values()):
        raise InputError("config.json: gemma3_text needs rope_parameters by layer type "
                         f"({FULL}, {SLIDING}), got {sorted(nested)}")
    everywhere = {FULL: {"rope_theta": hf["rope_theta"]} | (nested.get(FULL) or {}) | (hf.get("rope_scaling") or {}),
                  SLIDING: {"rope_theta": hf["rope_local_base_freq"]} | (nested.get(SLIDING) or {})}
    ropes = tuple(
        make_rope(_typed(settings), fields["head_width"], fields["max_positions"]) for settings in everywhere.values()
    )
    cap = None if hf.get("final_logit_softcapping") is None else number(hf, "final_logit_softcapping")
    chosen = {"ropes": ropes, "layer_ropes": tuple(int(kind == SLIDING) for kind in kinds)}
    return _gemma(hf, fields, kinds) | chosen | {"qk_norm": True, "logit_softcap": cap}


def _gemma(hf: Config, fields: Fields, kinds: list[str]) -> Fields:
    return {
        "norm_offset": 1.0, "post_norms": True, "embedding_scale": fields["width"] ** 0.5,
        "query_scale": number(hf, "query_pre_attn_scalar") ** -0.5,
    } | windows(hf, fields, kinds, hf.get("sliding_window"))


def windows(hf: Config, fields: Fields, kinds: list[str], window: int | None) -> Fields:
    """How many tokens, itself among them, each layer sees; a window as wide as the longest text is none."""
    layers = fields["num_layers"]
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= {FULL, SLIDING}:
        raise InputError(f"config.json: layer_types must be a list of {layers} times {FULL} or {SLIDING}")
    if window is None or SLIDING not in kinds or size(hf, "sliding_window") >= fields["max_positions"]:
        return {}
    return {"windows": tuple(window if kind == SLIDING else fields["max_positions"] for kind in kinds)}


def rope_settings(hf: Config) -> dict[str, Any]:
    """transformers 5 writes the rope's settings as one group, earlier releases as several keys."""
    group = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(group, Mapping) or any(isinstance(value, Mapping) for value in group.values()):
        raise InputError(f"config.json: rope_parameters by layer type is not supported for {hf['model_type']}")
    alone = {key: hf[key] for key in ("rope_theta", "partial_rotary_factor") if hf.get(key) is not None}
    return _typed(alone | group)


def _typed(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"rope_type": settings.get("type", "default"), **settings}
