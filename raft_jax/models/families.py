"""Which decoders are known: Hugging Face and GGUF configs → ours, and where each parameter is stored.

A family is a row of `FAMILIES`: a config mapping and a key table. In a key table each of our parameters
names its tensor in the file and the letters of the file's dimensions; `("NH", "D")` is a matrix whose
first dimension is heads × head width. Letters that our name orders differently are transposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from raft_jax.errors import InputError
from raft_jax.models.decoder import DecoderConfig, parameter_table


class Stored(NamedTuple):
    """Where a file keeps one parameter: its key (`{}` is the layer) and the letters of each dimension."""

    key: str
    dims: tuple[str, ...]


LLAMA_KEYS = {
    "embedding_VD": Stored("model.embed_tokens.weight", ("V", "D")),
    "attention_norm_LD": Stored("model.layers.{}.input_layernorm.weight", ("D",)),
    "query_LDNH": Stored("model.layers.{}.self_attn.q_proj.weight", ("NH", "D")),
    "key_LDKH": Stored("model.layers.{}.self_attn.k_proj.weight", ("KH", "D")),
    "value_LDKH": Stored("model.layers.{}.self_attn.v_proj.weight", ("KH", "D")),
    "query_bias_LNH": Stored("model.layers.{}.self_attn.q_proj.bias", ("NH",)),
    "key_bias_LKH": Stored("model.layers.{}.self_attn.k_proj.bias", ("KH",)),
    "value_bias_LKH": Stored("model.layers.{}.self_attn.v_proj.bias", ("KH",)),
    "output_LNHD": Stored("model.layers.{}.self_attn.o_proj.weight", ("D", "NH")),
    "mlp_norm_LD": Stored("model.layers.{}.post_attention_layernorm.weight", ("D",)),
    "gate_LDF": Stored("model.layers.{}.mlp.gate_proj.weight", ("F", "D")),
    "up_LDF": Stored("model.layers.{}.mlp.up_proj.weight", ("F", "D")),
    "down_LFD": Stored("model.layers.{}.mlp.down_proj.weight", ("D", "F")),
    "final_norm_D": Stored("model.norm.weight", ("D",)),
    "unembedding_DV": Stored("lm_head.weight", ("V", "D")),
}

# llama.cpp's names for the same tensors.
GGUF_KEYS = {
    "embedding_VD": "token_embd.weight", "attention_norm_LD": "blk.{}.attn_norm.weight",
    "query_LDNH": "blk.{}.attn_q.weight", "key_LDKH": "blk.{}.attn_k.weight", "value_LDKH": "blk.{}.attn_v.weight",
    "query_bias_LNH": "blk.{}.attn_q.bias", "key_bias_LKH": "blk.{}.attn_k.bias",
    "value_bias_LKH": "blk.{}.attn_v.bias", "output_LNHD": "blk.{}.attn_output.weight",
    "mlp_norm_LD": "blk.{}.ffn_norm.weight", "gate_LDF": "blk.{}.ffn_gate.weight", "up_LDF": "blk.{}.ffn_up.weight",
    "down_LFD": "blk.{}.ffn_down.weight", "final_norm_D": "output_norm.weight", "unembedding_DV": "output.weight",
}

LLAMA3_ROPE = ("factor", "high_freq_factor", "low_freq_factor", "original_max_position_embeddings")


def _llama_config(hf: Mapping[str, Any], family: str, qkv_bias: bool) -> DecoderConfig:
    def need(key: str):
        if key not in hf:
            raise InputError(f"config.json: {family} needs the key {key}")
        return hf[key]

    if hf.get("hidden_act", "silu") not in ("silu", "swish"):
        raise InputError(f"config.json: hidden_act {hf['hidden_act']!r} is not supported for {family}; supported: silu")
    if hf.get("mlp_bias") or (hf.get("attention_bias") and family == "llama"):
        raise InputError("config.json: a llama with attention_bias or mlp_bias is not supported")
    if hf.get("use_sliding_window"):
        raise InputError("config.json: use_sliding_window true is not supported; set it to false for short texts")
    # transformers 5 writes the rope settings as one group, earlier releases as two keys.
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    theta = float(rope.pop("rope_theta", hf.get("rope_theta", 10_000.0)))
    if kind not in ("default", "llama3"):
        raise InputError(f"config.json: rope_type {kind!r} is not supported; supported: default, llama3")
    if kind == "llama3" and (lacking := sorted({*LLAMA3_ROPE} - set(rope))):
        raise InputError(f"config.json: rope_type 'llama3' needs the key {lacking[0]} in rope_parameters")
    heads = need("num_attention_heads")
    return DecoderConfig(
        family=family, vocab_size=need("vocab_size"), num_layers=need("num_hidden_layers"), width=need("hidden_size"),
        num_heads=heads, num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_width=hf.get("head_dim") or need("hidden_size") // heads, ffn_width=need("intermediate_size"),
        max_positions=hf.get("max_position_embeddings", 2048), rope_theta=theta,
        rope_scaling=tuple((key, float(rope[key])) for key in LLAMA3_ROPE) if kind == "llama3" else None,
        norm_epsilon=hf.get("rms_norm_eps", 1e-6), tied_embeddings=bool(hf.get("tie_word_embeddings", False)),
        qkv_bias=qkv_bias,
    )


FAMILIES = {
    "llama": lambda hf: _llama_config(hf, "llama", qkv_bias=False),
    "qwen2": lambda hf: _llama_config(hf, "qwen2", qkv_bias=True),
}


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """Maps a `config.json` to ours.

    Raises:
      InputError: the model type is not supported (named, with those that are), or a key is missing.
    """
    family = hf.get("model_type")
    if family not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise InputError(f"config.json: model_type {family!r} is not supported; supported: {known}")
    return FAMILIES[family](hf)


def hf_config_from_gguf(metadata: Mapping[str, Any], has_output: bool) -> dict[str, Any]:
    """The `config.json` that a GGUF file's metadata describes."""
    family = metadata.get("general.architecture")
    if family not in FAMILIES:
        raise InputError(f"GGUF architecture {family!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")

    def get(key: str, default=None):
        value = metadata.get(f"{family}.{key}", default)
        if value is None:
            raise InputError(f"GGUF metadata lacks {family}.{key}")
        return value

    if f"{family}.rope.scaling.type" in metadata and metadata[f"{family}.rope.scaling.type"] != "none":
        raise InputError(f"GGUF rope scaling {metadata[f'{family}.rope.scaling.type']!r} is not supported")
    if "tokenizer.ggml.tokens" not in metadata:
        raise InputError("GGUF metadata lacks tokenizer.ggml.tokens")
    heads, width = get("attention.head_count"), get("embedding_length")
    config = {
        "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[family]],
        "model_type": family, "hidden_act": "silu", "hidden_size": width, "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length", width // heads),
        "num_hidden_layers": get("block_count"), "intermediate_size": get("feed_forward_length"),
        "max_position_embeddings": get("context_length"), "rope_theta": get("rope.freq_base", 10_000.0),
        # GGUF keeps 1e-5 as the float32 next to it; the shortest text that rounds back is what was meant.
        "rms_norm_eps": float(f"{get('attention.layer_norm_rms_epsilon'):.6g}"),
        "tie_word_embeddings": not has_output, "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
    }
    for ours, theirs in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        if (value := metadata.get(f"tokenizer.ggml.{theirs}_token_id")) is not None:
            config[ours] = value
    return config


def stored_keys(config: DecoderConfig) -> dict[str, Stored]:
    """Where a Hugging Face folder keeps each parameter of this config."""
    return {name: LLAMA_KEYS[name] for name in parameter_table(config)}
