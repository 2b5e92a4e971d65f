"""One layer of the decoder: queries, keys and values of its input, and what it adds to it.

Letters as in raft_jax.models.decoder; a config is a DecoderConfig, `weights` are those of one layer. Where tokens are
unpadded, [B, T] is [R, U] of raft_jax.unpadding.
"""

from __future__ import annotations

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from raft_jax.models.attention import KEPT
from raft_jax.models.rope import rotate
from raft_jax.models.tiles import Tiled, joined, product, tiled_alike
from raft_jax.sharding import constrain

QKV, OUTPUT = ("query_LDNH", "key_LDKH", "value_LDKH"), ("output_LNHD",)
GATE_UP, DOWN = ("gate_LDF", "up_LDF"), ("down_LFD",)
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": partial(jax.nn.gelu, approximate=True)}


def rms_norm(config, x: jax.Array, scale: jax.Array) -> jax.Array:
    """x / rms(x) · (offset + scale) over the last axis, computed in float32."""
    return _rms_norm(config.norm_epsilon, x, config.norm_offset + scale.astype(jnp.float32))


def _rms_norm(epsilon: float, x: jax.Array, weight_D: jax.Array) -> jax.Array:
    """The rule below has both of its sums as products of a matrix and a vector: the fused sums that XLA makes of the
    derived one on CPU took 3 % of the whole train step."""
    return (x.astype(jnp.float32) * _inverse_rms(epsilon, x) * weight_D).astype(x.dtype)


def _inverse_rms(epsilon: float, x: jax.Array) -> jax.Array:
    return jax.lax.rsqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True) + epsilon)


def _rms_norm_backward(epsilon, saved, slope):
    x, weight_D = saved
    x32, slope32, inverse = x.astype(jnp.float32), slope.astype(jnp.float32), _inverse_rms(epsilon, x)
    pull = slope32 * x32
    total = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    along = total("...d,d->...", pull, weight_D)[..., None] / x.shape[-1]
    x_slope = inverse * (slope32 * weight_D - x32 * jnp.square(inverse) * along)
    return x_slope.astype(x.dtype), total("...,...d->d", inverse[..., 0], pull)


_rms_norm = jax.custom_vjp(_rms_norm, nondiff_argnums=(0,))
_rms_norm.defvjp(lambda epsilon, x, weight_D: (_rms_norm(epsilon, x, weight_D), (x, weight_D)), _rms_norm_backward)


def project(config, x_BTD, weights, rope):
    """Query `[B,T,N,H]`, scaled, key and value `[B,T,K,H]` of one layer, rotated."""
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


def residual(config, x_BTD, mixed_BTNH, weights) -> jax.Array:
    """x plus the attention's output plus the gated feed-forward, each normed behind where the config asks for it."""

    def behind(out_BTD, name):
        return rms_norm(config, out_BTD, weights[name]) if config.post_norms else out_BTD

    adapted = partial(_adapted, config, weights)
    mixed_BTI = mixed_BTNH.reshape(*x_BTD.shape[:2], -1)
    output_BTD = adapted(*OUTPUT, *_products(config, mixed_BTI, weights, OUTPUT), mixed_BTNH)
    x_BTD = x_BTD + behind(output_BTD, "attention_post_norm_LD")
    normed = rms_norm(config, x_BTD, weights["mlp_norm_LD"])
    gate, up = (
        checkpoint_name(adapted(name, y, normed), KEPT)
        for name, y in zip(GATE_UP, _products(config, normed, weights, GATE_UP, _product), strict=True)
    )
    inner_BTF = ACTIVATIONS[config.activation](gate) * up
    output_BTD = adapted(*DOWN, *_products(config, inner_BTF, weights, DOWN, _product), inner_BTF)
    return constrain(x_BTD + behind(output_BTD, "mlp_post_norm_LD"), "batch", None, None)


def _products(config, x_BTI, weights, names: tuple[str, ...], multiply=jnp.matmul) -> list[jax.Array]:
    """x W for matrices of one input, in one product where they lie side by side."""
    shapes = [tuple(config.sizes[letter] for letter in _letters(name)[1 + _num_inputs(name) :]) for name in names]
    joined = weights.get(_joined_name(names))
    if joined is None:
        parts = [multiply(x_BTI, _as_matrix(name, weights[name])) for name in names]
    else:
        ends = list(itertools.accumulate(map(math.prod, shapes)))
        parts = jnp.split(product(x_BTI, joined), ends[:-1], axis=-1)
    return [part.reshape(*part.shape[:2], *shape) for part, shape in zip(parts, shapes, strict=True)]


def side_by_side(stacked: dict[str, jax.Array], num_rows: int) -> list[dict[str, jax.Array | Tiled]]:
    """Each layer's weights for decoding: matrices of one input joined, in the layout for so many rows."""
    rest = dict(stacked)
    parts = {
        _joined_name(names): [jax.vmap(partial(_as_matrix, name))(rest.pop(name)) for name in names]
        for names in (QKV, OUTPUT, GATE_UP, DOWN)
    }
    layouts = {name: tiled_alike(matrices_LIO, num_rows) for name, matrices_LIO in parts.items()}

    def layer(i: int) -> dict[str, jax.Array | Tiled]:
        of_layer = partial(jax.tree.map, lambda array: array[i])
        return {name: joined(of_layer(layout)) for name, layout in layouts.items()} | of_layer(rest)

    return [layer(i) for i in range(len(next(iter(stacked.values()))))]


def _joined_name(names: tuple[str, ...]) -> str:
    """Of a product: "gate+up"."""
    return "+".join(name.partition("_")[0] for name in names)


def _letters(parameter: str) -> str:
    return parameter.rpartition("_")[2]


def _as_matrix(name: str, weight: jax.Array) -> jax.Array:
    """`[inputs, outputs]` of a weight of one layer, heads and their width as one dimension."""
    num_inputs = _num_inputs(name)
    return weight.reshape(math.prod(weight.shape[:num_inputs]), -1)


def _num_inputs(parameter: str) -> int:
    """How many of a weight's dimensions are summed over; they come first."""
    return 2 if parameter.startswith("output") else 1


def adapter_names(parameter: str) -> tuple[str, str]:
    """The two arrays of the low-rank adapter (raft_jax.models.lora) that adds to a parameter of the layers.

    >>> adapter_names("query_LDNH")
    ('query_a_LDR', 'query_b_LRNH')
    """
    stem, _, letters = parameter.rpartition("_")
    num_inputs = _num_inputs(parameter)
    return f"{stem}_a_L{letters[1 : 1 + num_inputs]}R", f"{stem}_b_LR{letters[1 + num_inputs :]}"


def _adapted(config, weights, parameter: str, y, x) -> jax.Array:
    """y = x W plus what an adapter beside W adds, scale x a b."""
    down, up = adapter_names(parameter)
    if down not in weights:
        return y
    num_inputs = weights[down].ndim - 1
    return y + config.adapter_scale * jnp.tensordot(jnp.tensordot(x, weights[down], num_inputs), weights[up], 1)


@jax.custom_vjp
def _product(x_BTI, weight_IO) -> jax.Array:
    """x W. In the rule that JAX derives XLA on CPU transposes the wider factor of the weight's gradient, and with it
    computes SiLU or its slope in a strided copy, a tenth of the whole train step. This one has the narrower transposed.
    """
    return jnp.einsum("bti,io->bto", x_BTI, weight_IO)


def _product_backward(saved, slope_BTO):
    x_BTI, weight_IO = saved
    if x_BTI.shape[-1] > slope_BTO.shape[-1]:
        weight = jnp.einsum("bto,bti->oi", slope_BTO, x_BTI).T
    else:
        weight = jnp.einsum("bti,bto->io", x_BTI, slope_BTO)
    return jnp.einsum("bto,io->bti", slope_BTO, weight_IO), weight


_product.defvjp(lambda x_BTI, weight_IO: (_product(x_BTI, weight_IO), (x_BTI, weight_IO)), _product_backward)
