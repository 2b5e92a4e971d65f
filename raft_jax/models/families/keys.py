"""How files store each parameter: Hugging Face's keys, llama.cpp's names, and the letters of their dimensions.

`("NH", "D")` is a matrix whose first dimension is heads × head width. Where our parameter's name has the letters in
another order, the array is transposed. For a tensor that concatenates several parameters along the first dimension,
`fused` lists the first dimension of each of them.
"""

from __future__ import annotations

from typing import NamedTuple


class Stored(NamedTuple):
    """How a file stores one parameter."""

    key: str  # `{}` is the layer
    dims: tuple[str, ...]  # letters of this parameter's dimensions
    fused: tuple[str, ...] = ()  # the first dimension of every parameter in the tensor, if there are several
    part: int = 0  # this parameter's index among them


LAYER = "model.layers.{}."
LLAMA = {
    "embedding_VD": Stored("model.embed_tokens.weight", ("V", "D")),
    "attention_norm_LD": Stored(LAYER + "input_layernorm.weight", ("D",)),
    "query_LDNH": Stored(LAYER + "self_attn.q_proj.weight", ("NH", "D")),
    "key_LDKH": Stored(LAYER + "self_attn.k_proj.weight", ("KH", "D")),
    "value_LDKH": Stored(LAYER + "self_attn.v_proj.weight", ("KH", "D")),
    "query_bias_LNH": Stored(LAYER + "self_attn.q_proj.bias", ("NH",)),
    "key_bias_LKH": Stored(LAYER + "self_attn.k_proj.bias", ("KH",)),
    "value_bias_LKH": Stored(LAYER + "self_attn.v_proj.bias", ("KH",)),
    "query_norm_LH": Stored(LAYER + "self_attn.q_norm.weight", ("H",)),
    "key_norm_LH": Stored(LAYER + "self_attn.k_norm.weight", ("H",)),
    "output_LNHD": Stored(LAYER + "self_attn.o_proj.weight", ("D", "NH")),
    "mlp_norm_LD": Stored(LAYER + "post_attention_layernorm.weight", ("D",)),
    "gate_LDF": Stored(LAYER + "mlp.gate_proj.weight", ("F", "D")),
    "up_LDF": Stored(LAYER + "mlp.up_proj.weight", ("F", "D")),
    "down_LFD": Stored(LAYER + "mlp.down_proj.weight", ("D", "F")),
    "final_norm_D": Stored("model.norm.weight", ("D",)),
    "unembedding_DV": Stored("lm_head.weight", ("V", "D")),
}
QKV, GATE_UP = ("NH", "KH", "KH"), ("F", "F")
PHI3 = LLAMA | {
    "query_LDNH": Stored(LAYER + "self_attn.qkv_proj.weight", ("NH", "D"), QKV, 0),
    "key_LDKH": Stored(LAYER + "self_attn.qkv_proj.weight", ("KH", "D"), QKV, 1),
    "value_LDKH": Stored(LAYER + "self_attn.qkv_proj.weight", ("KH", "D"), QKV, 2),
    "gate_LDF": Stored(LAYER + "mlp.gate_up_proj.weight", ("F", "D"), GATE_UP, 0),
    "up_LDF": Stored(LAYER + "mlp.gate_up_proj.weight", ("F", "D"), GATE_UP, 1),
}
GEMMA = LLAMA | {
    "attention_post_norm_LD": Stored(LAYER + "post_attention_layernorm.weight", ("D",)),
    "mlp_norm_LD": Stored(LAYER + "pre_feedforward_layernorm.weight", ("D",)),
    "mlp_post_norm_LD": Stored(LAYER + "post_feedforward_layernorm.weight", ("D",)),
}

# llama.cpp's names for the same tensors; its dimensions are the same.
GGUF = {
    "embedding_VD": "token_embd.weight",
    "attention_norm_LD": "blk.{}.attn_norm.weight",
    "query_LDNH": "blk.{}.attn_q.weight",
    "key_LDKH": "blk.{}.attn_k.weight",
    "value_LDKH": "blk.{}.attn_v.weight",
    "query_bias_LNH": "blk.{}.attn_q.bias",
    "key_bias_LKH": "blk.{}.attn_k.bias",
    "value_bias_LKH": "blk.{}.attn_v.bias",
    "query_norm_LH": "blk.{}.attn_q_norm.weight",
    "key_norm_LH": "blk.{}.attn_k_norm.weight",
    "output_LNHD": "blk.{}.attn_output.weight",
    "attention_post_norm_LD": "blk.{}.post_attention_norm.weight",
    "mlp_norm_LD": "blk.{}.ffn_norm.weight",
    "mlp_post_norm_LD": "blk.{}.post_ffw_norm.weight",
    "gate_LDF": "blk.{}.ffn_gate.weight",
    "up_LDF": "blk.{}.ffn_up.weight",
    "down_LFD": "blk.{}.ffn_down.weight",
    "final_norm_D": "output_norm.weight",
    "unembedding_DV": "output.weight",
}
GGUF_PHI3 = GGUF | {
    "query_LDNH": "blk.{}.attn_qkv.weight",
    "key_LDKH": "blk.{}.attn_qkv.weight",
    "value_LDKH": "blk.{}.attn_qkv.weight",
    "gate_LDF": "blk.{}.ffn_up.weight",
}
