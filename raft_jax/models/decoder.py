"""One decoder for every family: parameter table, forward pass, and the same pass with a cache.

Letters: B batch, T time, S cache length, D model width, N query heads, K key/value heads, G = N/K,
H head width, F feed-forward, V vocabulary, L layers. A parameter's name ends in its dimensions.

Families differ in numbers only, and layers too: each layer's window and kind of rotary positions are scanned along
with its weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from raft_jax.models.attention import attend, attend_one
from raft_jax.models.rope import Rope, of_kind, rope_tables, rotate
from raft_jax.sharding import constrain

# What the backward pass finds where there is memory for it: products of matrices, and those behind `_product`'s rule.
KEPT = "product"
POLICY = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, jax.checkpoint_policies.save_only_these_names(KEPT)
)
QKV, GATE_UP = ("query_LDNH", "key_LDKH", "value_LDKH"), ("gate_LDF", "up_LDF")
JOINED = (QKV, GATE_UP)
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": partial(jax.nn.gelu, approximate=True)}


@dataclass(frozen=True)
class DecoderConfig:
    """What fixes the shapes and the arithmetic of a decoder."""

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
    layer_ropes: tuple[int, ...] | None = None  # which of them each layer has; None: the first
    windows: tuple[int, ...] | None = None  # how many tokens each layer sees, itself among them; None: all
    norm_epsilon: float = 1e-5
    norm_offset: float = 0.0  # norms multiply by offset + scale
    post_norms: bool = False  # attention and feed-forward are normed behind, too
    qk_norm: bool = False  # queries and keys are normed within each head
    activation: str = "silu"  # of ACTIVATIONS
    embedding_scale: float = 1.0
    query_scale: float | None = None  # None: H^-1/2
    attention_softcap: float | None = None  # scores become cap tanh(score / cap)
    logit_softcap: float | None = None
    tied_embeddings: bool = False
    qkv_bias: bool = False
    vocab_padding: int = 0  # rows of the embedding beyond the vocabulary, so that it divides over a mesh
    adapter_scale: float = 1.0  # of low-rank adapters, where the parameters have some
    kernel: str = "plain"  # of raft_jax.models.attention
    remat: bool = False  # keep nothing inside a layer for the backward pass: less memory, a quarter more work

    @property
    def sizes(self) -> dict[str, int]:
        """The size behind each letter of a parameter's name."""
        return {
            "L": self.num_layers, "V": self.vocab_size + self.vocab_padding, "D": self.width, "F": self.ffn_width,
            "N": self.num_heads, "K": self.num_kv_heads, "H": self.head_width,
        }


LOGICAL_AXES = {"V": "vocabulary", "D": "width", "N": "heads", "K": "kv_heads", "F": "ffn", "L": None, "H": None}


class ParameterInfo(NamedTuple):
    """Shape, logical axes (for sharding) and fan-in (for random weights) of one parameter."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    fan_in: int | None  # None: a norm's scale, which begins as multiplying by one; 0: a bias, made of zeros


def parameter_table(config: DecoderConfig) -> dict[str, ParameterInfo]:
    """Every parameter of the decoder; init, import, export and sharding all read this one table."""
    fan_in = {
        "embedding_VD": config.width, "attention_norm_LD": None, "query_LDNH": config.width,
        "key_LDKH": config.width, "value_LDKH": config.width,
        "output_LNHD": config.num_heads * config.head_width, "mlp_norm_LD": None, "gate_LDF": config.width,
        "up_LDF": config.width, "down_LFD": config.ffn_width, "final_norm_D": None,
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
        # A vector is too small to be worth cutting.
        axes = tuple(LOGICAL_AXES[letter] if fan else None for letter in letters)
        table[name] = ParameterInfo(shape, axes, fan)
    return table


def init_parameters(config: DecoderConfig, key: jax.Array, dtype=jnp.float32) -> dict[str, jax.Array]:
    """Random weights: normal with standard deviation fan_in^-1/2; norms are one, biases zero."""

    def init(name: str, info: ParameterInfo, key: jax.Array) -> jax.Array:
        if info.fan_in is None or info.fan_in == 0:
            return jnp.full(info.shape, 1 - config.norm_offset if info.fan_in is None else 0, dtype)
        return jax.random.normal(key, info.shape, dtype) / math.sqrt(info.fan_in)

    table = parameter_table(config)
    keys = jax.random.split(key, len(table))
    return {name: init(name, info, key) for (name, info), key in zip(table.items(), keys, strict=True)}


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far. All rows write at the same place, so prompts are left-padded."""

    key_LBKHS: jax.Array  # positions last: the scores of one new token are then a sum over rows of this, not columns
    value_LBKSH: jax.Array
    mask_BS: jax.Array  # bool: a real token lies here
    length: jax.Array  # int32 scalar: how many places are written


def positions_from_mask(mask_BT: jax.Array, fork: tuple[int, int] | None = None) -> jax.Array:
    """Position of each real token within its row, counted from 0; padding gets 0 before, the last one after.

    After a fork (P, A) the count goes on from the first P places, as if the A behind them were not there.
    """
    count_BT = jnp.cumsum(mask_BT.astype(jnp.int32), axis=-1)
    if fork is not None:
        end = sum(fork)
        passed_B1 = count_BT[:, end - 1 : end] - count_BT[:, fork[0] - 1 : fork[0]]
        count_BT = jnp.concatenate([count_BT[:, :end], count_BT[:, end:] - passed_B1], axis=-1)
    return jnp.maximum(count_BT - 1, 0)


class Decoder(nnx.Module):
    """Parameters of the decoder, stacked over layers, and the two ways to run it."""

    def __init__(self, config: DecoderConfig, parameters: Mapping[str, jax.Array]):
        self.config = config
        self._stacked = tuple(name for name in parameters if name.rpartition("_")[2].startswith("L"))
        for name, value in parameters.items():
            setattr(self, name, nnx.Param(value))

    def hidden(self, tokens_BT, positions_BT=None, mask_BT=None, fork: tuple[int, int] | None = None) -> jax.Array:
        """Final hidden states, after the last norm, of whole sequences.

        Args:
          tokens_BT: int32.
          positions_BT: int32; default counts the real tokens of each row.
          mask_BT: bool, True on real tokens; padding may stand on either side. Default all real.
          fork: (P, A): the rows hold two continuations of their first P places. What stands behind P + A does not
            see the A in between; it follows the P.

        Returns:
          hidden_BTD in the parameters' dtype; what stands at padding means nothing.
        """
        mask_BT = jnp.ones(tokens_BT.shape, bool) if mask_BT is None else mask_BT
        return self._forward(tokens_BT, positions_BT, mask_BT, fork)[0]

    def prefill(self, tokens_BT, mask_BT, length: int) -> tuple[jax.Array, Cache]:
        """Hidden states of whole prompts, padded on the left, and a cache of `length` places that begins with them."""
        room = length - tokens_BT.shape[1]
        hidden_BTD, (keys, values) = self._forward(tokens_BT, None, mask_BT, keep=True, room=room)
        keys = jnp.pad(keys, ((0, 0),) * 4 + ((0, room),))
        values = jnp.pad(values, ((0, 0),) * 3 + ((0, room), (0, 0)))
        return hidden_BTD, Cache(keys, values, jnp.pad(mask_BT, ((0, 0), (0, room))), jnp.int32(tokens_BT.shape[1]))

    def step(self, token_B1, mask_B1, cache: Cache, layers=None) -> tuple[jax.Array, Cache]:
        """Hidden states `[B, 1, D]` of the next token, and the cache with it in it.

        With `layers` from `unstacked` they are run one by one instead of in a loop.
        """
        config, positions_BS = self.config, positions_from_mask(cache.mask_BS)
        position_B1 = jnp.sum(cache.mask_BS, axis=-1, keepdims=True, dtype=jnp.int32)
        ropes = rope_tables(config.ropes, position_B1, position_B1[:, 0] + cache.mask_BS.shape[1] - cache.length)

        def layer(x_BTD, scanned):
            # The layers only read the cache; it is written once, below. Written here it would be copied.
            (weights, numbers), past_key_BKHS, past_value_BKSH = scanned
            query, key, value = _project(config, x_BTD, weights, of_kind(ropes, numbers.get("rope", 0)))
            visible_BS = cache.mask_BS
            if "window" in numbers:
                visible_BS &= position_B1 - positions_BS < numbers["window"]
            mixed = attend_one(config, query, key, value, past_key_BKHS, past_value_BKSH, visible_BS)
            return _residual(config, x_BTD, mixed, weights), (key, value)

        x_BTD = self._embed(token_B1)
        if layers is None:
            x_BTD, (key, value) = jax.lax.scan(layer, x_BTD, (self._layers(), cache.key_LBKHS, cache.value_LBKSH))
        else:
            new = []
            for i, weights in enumerate(layers):
                numbers = {name: of_L[i] for name, of_L in self._numbers().items()}
                x_BTD, key_value = layer(x_BTD, ((weights, numbers), cache.key_LBKHS[i], cache.value_LBKSH[i]))
                new.append(key_value)
            key, value = (jnp.stack(arrays) for arrays in zip(*new, strict=True))
        place = cache.length
        cache = Cache(
            jax.lax.dynamic_update_slice(cache.key_LBKHS, key.astype(cache.key_LBKHS.dtype), (0, 0, 0, 0, place)),
            jax.lax.dynamic_update_slice(cache.value_LBKSH, value.astype(cache.value_LBKSH.dtype), (0, 0, 0, place, 0)),
            jax.lax.dynamic_update_slice(cache.mask_BS, mask_B1, (0, place)),
            place + 1,
        )
        return rms_norm(config, x_BTD, self.final_norm_D[...]), cache

    def unstacked(self) -> list[dict[str, jax.Array]]:
        """The weights layer by layer. A loop over layers copies each slice at every token, which XLA on CPU does
        in memory: made once, before decoding, the slices cost one copy of the weights and save a third of the time.
        Matrices of one input are laid side by side, for one larger product."""
        stacked, _ = self._layers()
        L, D = self.config.num_layers, self.config.width
        for names in JOINED:
            parts = [stacked.pop(name).reshape(L, D, -1) for name in names]
            stacked["+".join(names)] = jnp.concatenate(parts, axis=-1)
        layers = [{name: array[layer] for name, array in stacked.items()} for layer in range(L)]
        return jax.lax.optimization_barrier(layers)

    def unembedding(self) -> jax.Array:
        """The matrix `[D, V]` that turns hidden states into logits; tied models give their embedding transposed."""
        return self.embedding_VD[...].T if self.config.tied_embeddings else self.unembedding_DV[...]

    def _forward(self, tokens_BT, positions_BT, mask_BT, fork=None, *, keep: bool = False, room: int = 0):
        """Hidden states, and each layer's keys `[L,B,K,H,T]` and values `[L,B,K,T,H]` if they are to be kept."""
        config = self.config
        positions_BT = positions_from_mask(mask_BT, fork) if positions_BT is None else positions_BT
        length_B = jnp.max(jnp.where(mask_BT, positions_BT + 1, 0), axis=-1)
        ropes = rope_tables(config.ropes, positions_BT, length_B + room)

        def layer(x_BTD, scanned):
            weights, numbers = scanned
            query, key, value = _project(config, x_BTD, weights, of_kind(ropes, numbers.get("rope", 0)))
            mixed = attend(config, query, key, value, positions_BT, mask_BT, fork, numbers.get("window"))
            return _residual(config, x_BTD, mixed, weights), (key, value) if keep else None

        # Without remat most matrix products are kept for the backward pass, and all that is cheap is made again.
        policy = None if config.remat else POLICY
        layer = jax.checkpoint(layer, policy=policy)
        x_BTD, kept = jax.lax.scan(layer, self._embed(tokens_BT), self._layers())
        return rms_norm(config, x_BTD, self.final_norm_D[...]), kept

    def _embed(self, tokens_BT) -> jax.Array:
        x_BTD = self.embedding_VD[...][tokens_BT]
        x_BTD = x_BTD * jnp.asarray(self.config.embedding_scale, x_BTD.dtype)
        return constrain(x_BTD, "batch", None, None)

    def _layers(self) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """What is scanned: each layer's weights, and the numbers in which layers differ."""
        return (
            {name: getattr(self, name)[...] for name in self._stacked},
            {name: jnp.array(of_L, jnp.int32) for name, of_L in self._numbers().items()},
        )

    def _numbers(self) -> dict[str, tuple[int, ...]]:
        numbers = {"rope": self.config.layer_ropes, "window": self.config.windows}
        return {name: of_L for name, of_L in numbers.items() if of_L is not None}


def rms_norm(config: DecoderConfig, x: jax.Array, scale: jax.Array) -> jax.Array:
    """x / rms(x) · (offset + scale) over the last axis, computed in float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + config.norm_epsilon)
    return (x32 * (config.norm_offset + scale.astype(jnp.float32))).astype(x.dtype)


def _project(config: DecoderConfig, x_BTD, weights, rope):
    """Query `[B,T,N,H]`, scaled, key `[B,K,H,T]` and value `[B,K,T,H]` of one layer, rotated."""
    x_BTD = rms_norm(config, x_BTD, weights["attention_norm_LD"])
    adapted = partial(_adapted, config, weights)
    query, key, value = (
        adapted(name, product, x_BTD) for name, product in _products(config, x_BTD, weights, QKV).items()
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
    return query * scale, key.transpose(0, 2, 3, 1), value.swapaxes(1, 2)


def _residual(config: DecoderConfig, x_BTD, mixed_BTNH, weights) -> jax.Array:
    """x plus the attention's output plus the gated feed-forward, each normed behind where the config asks for it."""

    def behind(out_BTD, name):
        return rms_norm(config, out_BTD, weights[name]) if config.post_norms else out_BTD

    adapted = partial(_adapted, config, weights)
    output_BTD = jnp.einsum("btnh,nhd->btd", mixed_BTNH, weights["output_LNHD"])
    output_BTD = adapted("output_LNHD", output_BTD, mixed_BTNH)
    x_BTD = x_BTD + behind(output_BTD, "attention_post_norm_LD")
    normed = rms_norm(config, x_BTD, weights["mlp_norm_LD"])
    gate, up = (
        checkpoint_name(adapted(name, product, normed), KEPT)
        for name, product in _products(config, normed, weights, GATE_UP).items()
    )
    inner_BTF = ACTIVATIONS[config.activation](gate) * up
    output_BTD = adapted("down_LFD", _product(inner_BTF, weights["down_LFD"]), inner_BTF)
    return constrain(x_BTD + behind(output_BTD, "mlp_post_norm_LD"), "batch", None, None)


def _products(config: DecoderConfig, x_BTD, weights, names: tuple[str, ...]) -> dict[str, jax.Array]:
    """x W for matrices of one input, in one product where `unstacked` has joined them."""
    joined_DO = weights.get("+".join(names))
    if joined_DO is None:
        return {
            name: _product(x_BTD, weights[name]) if weights[name].ndim == 2 else jnp.tensordot(x_BTD, weights[name], 1)
            for name in names
        }
    shapes = [tuple(config.sizes[letter] for letter in name.rpartition("_")[2][2:]) for name in names]
    ends = list(itertools.accumulate(map(math.prod, shapes)))
    parts = jnp.split(_product(x_BTD, joined_DO), ends[:-1], axis=-1)
    return {
        name: part.reshape(*part.shape[:2], *shape) for name, part, shape in zip(names, parts, shapes, strict=True)
    }


def adapter_names(parameter: str) -> tuple[str, str]:
    """The two arrays of the low-rank adapter (raft_jax.models.lora) that adds to a parameter of the layers.

    >>> adapter_names("query_LDNH")
    ('query_a_LDR', 'query_b_LRNH')
    """
    stem, _, letters = parameter.rpartition("_")
    num_inputs = 2 if stem == "output" else 1
    return f"{stem}_a_L{letters[1 : 1 + num_inputs]}R", f"{stem}_b_LR{letters[1 + num_inputs :]}"


def _adapted(config: DecoderConfig, weights, parameter: str, y, x) -> jax.Array:
    """y = x W plus what an adapter beside W adds, scale x a b."""
    down, up = adapter_names(parameter)
    if down not in weights:
        return y
    num_inputs = weights[down].ndim - 1
    return y + config.adapter_scale * jnp.tensordot(jnp.tensordot(x, weights[down], num_inputs), weights[up], 1)


@jax.custom_vjp
def _product(x_BTI, weight_IO) -> jax.Array:
    """x W. The rule that JAX derives forms the weight's gradient transposed, and XLA then computes the slope of SiLU in
    a strided copy, on CPU a tenth of the whole train step."""
    return jnp.einsum("bti,io->bto", x_BTI, weight_IO)


def _product_backward(saved, slope_BTO):
    x_BTI, weight_IO = saved
    return jnp.einsum("bto,io->bti", slope_BTO, weight_IO), jnp.einsum("bti,bto->io", x_BTI, slope_BTO)


_product.defvjp(lambda x_BTI, weight_IO: (_product(x_BTI, weight_IO), (x_BTI, weight_IO)), _product_backward)
