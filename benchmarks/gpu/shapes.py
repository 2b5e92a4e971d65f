"""Shapes of models with random weights, and the floating-point operations of their passes.

Letters as in raft_jax.models.decoder.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp

from raft_jax.models import Model
from raft_jax.models.attention import best_kernel
from raft_jax.models.config import DecoderConfig, parameter_table
from raft_jax.models.decoder import init_parameters
from raft_jax.models.families.rope import plain_rope

ROPE_THETA = 500_000.0


def _shape(vocab_size, num_layers, width, num_heads, num_kv_heads, head_width, ffn_width, tied=True):
    return DecoderConfig(
        family="llama",
        vocab_size=vocab_size,
        num_layers=num_layers,
        width=width,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_width=head_width,
        ffn_width=ffn_width,
        max_positions=8192,
        ropes=(plain_rope(ROPE_THETA, head_width),),
        tied_embeddings=tied,
    )


SHAPES = {
    "tiny": _shape(512, 2, 32, 4, 2, 8, 64),
    "smollm2": _shape(49_152, 30, 576, 9, 3, 64, 1536),
    "llama-1b": _shape(128_256, 16, 2048, 32, 8, 64, 8192),
    "llama-3b": _shape(128_256, 28, 3072, 24, 8, 128, 8192),
    "llama-8b": _shape(128_256, 32, 4096, 32, 8, 128, 14_336, tied=False),
}


def random_model(name: str, dtype, *, remat: bool = False) -> Model:
    """A model of a shape whose weights are made on the device; no token ends its answers."""
    config = SHAPES[name]
    kernel = best_kernel(dtype, config.attention_softcap, config.head_width)
    config = replace(config, remat=remat, kernel=kernel)
    params = jax.jit(init_parameters, static_argnums=(0, 2))(config, jax.random.key(0), jnp.dtype(dtype))
    return Model(config, params, SimpleNamespace(stop_ids=(-1,), pad_id=0))


def hf_config(name: str) -> dict:
    """The same shape as a config.json, for the other side."""
    config = SHAPES[name]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.ffn_width,
        "rms_norm_eps": config.norm_epsilon,
        "max_position_embeddings": config.max_positions,
        "rope_theta": ROPE_THETA,
        "tie_word_embeddings": config.tied_embeddings,
    }


def num_parameters(config: DecoderConfig) -> int:
    return sum(math.prod(info.shape) for info in parameter_table(config).values())


def forward_flops(config: DecoderConfig, tokens: int, pairs: int, predicted: int) -> float:
    """Operations of a forward pass: two a weight and token, four a pair of query and key, head and its width.

    Args:
      tokens: that go through the layers.
      pairs: of a query and a key that it sees, in one layer, over all rows.
      predicted: tokens that go through the unembedding.
    """
    table = parameter_table(config)
    layers = sum(math.prod(info.shape) for name, info in table.items() if "_L" in name and info.fan_in)
    attention = 4 * pairs * config.num_heads * config.head_width * config.num_layers
    return 2.0 * layers * tokens + attention + 2.0 * config.width * config.vocab_size * predicted


def causal_pairs(length: int, before: int = 0) -> int:
    """Pairs of a text of so many tokens that also see `before` others."""
    return length * before + length * (length + 1) // 2
