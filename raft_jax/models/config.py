"""A decoder's config, and the table of its parameters, which initialisation, import, export and sharding read.

Letters as in raft_jax.models.decoder. A parameter's name ends in its dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from raft_jax.models.rope import Rope


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that determines the shapes and the arithmetic of a decoder."""

    family: str
    vocab_size: int
    num_layers: int
    width: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    ffn_width: int
    max_positions: int
    ropes: tuple[Rope, ...]  # all of one width
    layer_ropes: tuple[int, ...] | None = None  # each layer's index into ropes; None: 0
    windows: tuple[int, ...] | None = None  # per layer: tokens that a token attends to, itself included; None: all
    norm_epsilon: float = 1e-5
    norm_offset: float = 0.0  # norms multiply by offset + scale
    post_norms: bool = False  # the outputs of attention and feed-forward are normed, too
    qk_norm: bool = False  # queries and keys are normed within each head
    activation: str = "silu"  # a key of raft_jax.models.layer.ACTIVATIONS
    embedding_scale: float = 1.0
    query_scale: float | None = None  # None: H^-1/2
    attention_softcap: float | None = None  # scores become cap tanh(score / cap)
    logit_softcap: float | None = None
    tied_embeddings: bool = False
    qkv_bias: bool = False
    vocab_padding: int = 0  # extra rows of the embedding, so that it divides over a mesh
    adapter_scale: float = 1.0  # alpha / rank of low-rank adapters, if the parameters have any
    kernel: str = "plain"  # one of raft_jax.models.attention.KERNELS
    remat: bool = False  # save nothing inside a layer for the backward pass: less memory, a quarter more work

    @property
    def ropes_depend_on_length(self) -> bool:
        """Whether equal prefixes of a short and a long sequence are rotated differently, as by LongRoPE."""
        return any(rope.long_frequencies is not None for rope in self.ropes)

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each letter in a parameter's name."""
        return {
            "L": self.num_layers,
            "V": self.vocab_size + self.vocab_padding,
            "D": self.width,
            "F": self.ffn_width,
            "N": self.num_heads,
            "K": self.num_kv_heads,
            "H": self.head_width,
        }


LOGICAL_AXES = {"V": "vocabulary", "D": "width", "N": "heads", "K": "kv_heads", "F": "ffn", "L": None, "H": None}


class ParameterInfo(NamedTuple):
    """Shape, logical axes (for sharding) and fan-in (for random weights) of one parameter."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    fan_in: int | None  # None: a norm's scale, initialised to multiply by one; 0: a bias, initialised to zero


def parameter_table(config: DecoderConfig) -> dict[str, ParameterInfo]:
    """Every parameter of the decoder; initialisation, import, export and sharding all read this table."""
    fan_in = {
        "embedding_VD": config.width,
        "attention_norm_LD": None,
        "query_LDNH": config.width,
        "key_LDKH": config.width,
        "value_LDKH": config.width,
        "output_LNHD": config.num_heads * config.head_width,
        "mlp_norm_LD": None,
        "gate_LDF": config.width,
        "up_LDF": config.width,
        "down_LFD": config.ffn_width,
        "final_norm_D": None,
    }
    if config.qkv_bias:
        fan_in |= {"query_bias_LNH": 0, "key_bias_LKH": 0, "value_bias_LKH": 0}
    if config.qk_norm:
        fan_in |= {"query_norm_LH": None, "key_norm_LH": None}
    if config.post_norms:
        fan_in |= {"attention_post_norm_LD": None, "mlp_post_norm_LD": None}
    if not config.tied_embeddings:
        fan_in["unembedding_DV"] = config.width
    table = {}
    for name, fan in fan_in.items():
        letters = name.rpartition("_")[2]
        shape = tuple(config.sizes[letter] for letter in letters)
        # Norms and biases are too small to be worth sharding. Tables are sharded along the vocabulary alone: the losses
        # then move hidden states, not the table.
        sharded = "" if not fan else "V" if "V" in letters else letters
        axes = tuple(LOGICAL_AXES[letter] if letter in sharded else None for letter in letters)
        table[name] = ParameterInfo(shape, axes, fan)
    return table


def unpadded_shape(config: DecoderConfig, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of an array named like a parameter (a parameter or its moments), without the vocabulary's padding.

    `path` may have other names before the parameter's, separated by slashes.
    """
    name = path.rpartition("/")[2]
    if name not in parameter_table(config):
        return shape
    letters = name.rpartition("_")[2]
    return tuple(config.vocab_size if letter == "V" else size for letter, size in zip(letters, shape, strict=True))
