"""One layer of the decoder: its query, key and value projections, and its attention output and feed-forward.

Letters as in raft_jax.models.decoder; `weights` are those of one layer. With unpadded tokens, [B, T] is [R, U] of
raft_jax.unpadding.
"""

from __future__ import annotations

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from raft_jax.models import xla_cpu
from raft_jax.models.attention import SAVED
from raft_jax.models.config import DecoderConfig
from raft_jax.models.rope import rotate
from raft_jax.sharding import constrain

QKV, OUTPUT = ("query_LDNH", "key_LDKH", "value_LDKH"), ("output_LNHD",)
GATE_UP, DOWN = ("gate_LDF", "up_LDF"), ("down_LFD",)
SAME_INPUT = (QKV, OUTPUT, GATE_UP, DOWN)  # each group has one input; decoding may fuse it
# Logical axes of the activations [B, T, D] between layers. Over whole sequences the rows are sharded, and each layer's
# weights are gathered. For one token per row it is cheaper to move the activations: their width is sharded as the
# weights are, so that every device multiplies by its own part of a weight, and the partial products are summed.
BATCH, DECODE = ("batch", None, None), ("decode_batch", None, "width")
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": partial(jax.nn.gelu, approximate=True)}


def rms_norm(config: DecoderConfig, x: jax.Array, scale: jax.Array) -> jax.Array:
    """x / rms(x) · (offset + scale) over the last axis, computed in float32."""
    return xla_cpu.normalize(config.norm_epsilon, x, config.norm_offset + scale.astype(jnp.float32))


def project(config: DecoderConfig, x_BTD, weights, rope):
    """Query `[B,T,N,H]`, rotated and scaled, key `[B,T,K,H]`, rotated, and value `[B,T,K,H]` of one layer."""
    x_BTD = rms_norm(config, x_BTD, weights["attention_norm_LD"])
    adapted = partial(_adapted, config, weights)
    query, key, value = (
        adapted(name, y, x_BTD) for name, y in zip(QKV, _products(config, x_BTD, weights, QKV), strict=True)
    )
    if config.qkv_bias:
        query = query + weights["query_bias_LNH"]
        key = key + weights["key_bias_LKH"]
        value = value + weights["value_bias_LKH"]
    if config.qk_norm:
        query = rms_norm(config, query, weights["query_norm_LH"])
        key = rms_norm(config, key, weights["key_norm_LH"])
    query, key = rotate(query, rope), rotate(key, rope)
    scale = config.head_width**-0.5 if config.query_scale is None else config.query_scale
    return query * scale, key, value


def attention_output_and_mlp(
    config: DecoderConfig, x_BTD, mixed_BTNH, weights, axes: tuple[str | None, ...] = BATCH
) -> jax.Array:
    """x plus the attention output plus the gated feed-forward; with `post_norms` each is normed before it is added.

    `axes` are the logical axes of x and of the result.
    """

    def behind(out_BTD, name):
        return rms_norm(config, out_BTD, weights[name]) if config.post_norms else out_BTD

    adapted = partial(_adapted, config, weights)
    mixed_BTI = mixed_BTNH.reshape(*x_BTD.shape[:2], -1)
    output_BTD = adapted(*OUTPUT, *_products(config, mixed_BTI, weights, OUTPUT), mixed_BTNH)
    x_BTD = constrain(x_BTD + behind(output_BTD, "attention_post_norm_LD"), *axes)
    normed = rms_norm(config, x_BTD, weights["mlp_norm_LD"])
    gate, up = (
        checkpoint_name(adapted(name, y, normed), SAVED)
        for name, y in zip(GATE_UP, _products(config, normed, weights, GATE_UP, xla_cpu.matmul), strict=True)
    )
    inner_BTF = constrain(ACTIVATIONS[config.activation](gate) * up, axes[0], None, "ffn")
    output_BTD = adapted(*DOWN, *_products(config, inner_BTF, weights, DOWN, xla_cpu.matmul), inner_BTF)
    return constrain(x_BTD + behind(output_BTD, "mlp_post_norm_LD"), *axes)


def _products(config: DecoderConfig, x_BTI, weights, names: tuple[str, ...], multiply=jnp.matmul) -> list[jax.Array]:
    """x W for each of several matrices with the same input, in one product if they are fused."""
    shapes = [tuple(config.sizes[letter] for letter in _letters(name)[1 + _num_inputs(name) :]) for name in names]
    fused = weights.get(xla_cpu.fused_name(names))
    if fused is None:
        parts = [multiply(x_BTI, as_matrix(name, weights[name])) for name in names]
    else:
        ends = list(itertools.accumulate(map(math.prod, shapes)))
        parts = jnp.split(xla_cpu.product(x_BTI, fused), ends[:-1], axis=-1)
    return [part.reshape(*part.shape[:2], *shape) for part, shape in zip(parts, shapes, strict=True)]


def _letters(parameter: str) -> str:
    return parameter.rpartition("_")[2]


def as_matrix(name: str, weight: jax.Array) -> jax.Array:
    """One layer's weight as `[inputs, outputs]`, with heads and head width merged into one dimension."""
    num_inputs = _num_inputs(name)
    return weight.reshape(math.prod(weight.shape[:num_inputs]), -1)


def _num_inputs(parameter: str) -> int:
    """Number of a weight's leading dimensions that are summed over."""
    return 2 if parameter.startswith("output") else 1


def adapter_names(parameter: str) -> tuple[str, str]:
    """Names of the two arrays of a layer parameter's low-rank adapter (raft_jax.models.lora).

    >>> adapter_names("query_LDNH")
    ('query_a_LDR', 'query_b_LRNH')
    """
    stem, _, letters = parameter.rpartition("_")
    num_inputs = _num_inputs(parameter)
    return f"{stem}_a_L{letters[1 : 1 + num_inputs]}R", f"{stem}_b_LR{letters[1 + num_inputs :]}"


def _adapted(config: DecoderConfig, weights, parameter: str, y, x) -> jax.Array:
    """y = x W, plus scale x a b if W has an adapter."""
    down, up = adapter_names(parameter)
    if down not in weights:
        return y
    num_inputs = weights[down].ndim - 1
    return y + config.adapter_scale * jnp.tensordot(jnp.tensordot(x, weights[down], num_inputs), weights[up], 1)
