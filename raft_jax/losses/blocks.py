"""The machinery behind the linear losses: never all the logits.

Forward, the tokens are cut into chunks: each meets the whole vocabulary, as a top-K and a softmax need.
Backward, the vocabulary is cut into blocks: each meets all the tokens, so the unembedding's gradient is
summed inside one product and needs no accumulator of its own. Both hold about chunk_size * V logits at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from raft_jax.losses import placement


class Head(NamedTuple):
    """The arrays between hidden states and logits."""

    unembedding_DV: jax.Array
    bias_V: jax.Array | None


class Form(NamedTuple):
    """The numbers: logits = softcap tanh(scale (h W + bias) / softcap) in the first vocab_size columns."""

    scale: float
    softcap: float | None
    vocab_size: int
    padded: bool  # whether there are columns beyond vocab_size
    chunk_size: int
    shards: int  # devices over which the vocabulary is split


def logits(hidden_ND: jax.Array, head: Head, form: Form, columns_V: jax.Array | None = None) -> jax.Array:
    """Logits [N, V] of the head's columns, which are the vocabulary's first unless said otherwise."""
    wide = jnp.promote_types(hidden_ND.dtype, jnp.float32)
    values_NV = jnp.einsum("nd,dv->nv", hidden_ND, head.unembedding_DV, preferred_element_type=wide)
    if head.bias_V is not None:
        values_NV = values_NV + head.bias_V.astype(wide)
    values_NV = values_NV * form.scale
    if form.softcap is not None:
        values_NV = form.softcap * jnp.tanh(values_NV / form.softcap)
    if form.padded:
        columns_V = jnp.arange(values_NV.shape[-1]) if columns_V is None else columns_V
        values_NV = jnp.where(columns_V < form.vocab_size, values_NV, -jnp.inf)
    return values_NV


def logits_slope(values: jax.Array, form: Form) -> jax.Array | float:
    """d logit / d (h W + bias), from the logit."""
    if form.softcap is None:
        return form.scale
    inside = jnp.where(jnp.isneginf(values), 0, values / form.softcap)
    return form.scale * (1 - inside**2)


def over_tokens(function: Callable, chunk_size: int, *arrays_BT: jax.Array):
    """function(*[N, ...]) -> pytree of [N, ...] on chunks of about chunk_size tokens, joined to [B, T, ...].

    Chunks are cut along time, so that a batch split over devices stays where it is. A batch of more rows than that
    is first folded, whole rows behind one another.
    """
    shape = arrays_BT[0].shape[:2]
    rows = max(n for n in range(1, max(1, min(shape[0], chunk_size)) + 1) if shape[0] % n == 0)
    time = math.prod(shape) // rows
    arrays = [x.reshape(rows, time, *x.shape[2:]) for x in arrays_BT]
    num_chunks = math.ceil(time / max(1, chunk_size // rows))
    size = math.ceil(time / max(1, num_chunks))

    def chunk(arrays):
        values = function(*(x.reshape(-1, *x.shape[2:]) for x in arrays))
        return jax.tree.map(lambda x: x.reshape(rows, -1, *x.shape[1:]), values)

    def chunk_at(index):
        # The last chunk is moved back to end with the last token; what it repeats is dropped in `join`.
        start = jnp.minimum(index * size, time - size)
        return chunk([_slice(x, start, size, axis=1) for x in arrays])

    def join(x):
        whole = jnp.moveaxis(x[:-1], 0, 1).reshape(rows, (num_chunks - 1) * size, *x.shape[3:])
        return jnp.concatenate([whole, x[-1, :, num_chunks * size - time :]], axis=1)

    if num_chunks <= 1:
        values = chunk(arrays)
    else:
        values = jax.tree.map(join, jax.lax.map(chunk_at, jnp.arange(num_chunks)))
    return jax.tree.map(lambda x: x.reshape(*shape, *x.shape[2:]), values)


def backward(form: Form, slope: Callable, hidden_BTD: jax.Array, heads: tuple[Head, ...]) -> tuple[jax.Array, Head]:
    """Cotangents of the hidden states and of heads[0].

    slope(pieces, columns_M) is the cotangent [N, M] of the products h W + bias at some columns of the
    vocabulary, given every head cut to them.
    """
    hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    run = functools.partial(_backward, form, slope)
    if heads[0].unembedding_DV.dtype.itemsize == 2:
        run = functools.partial(jax.lax.platform_dependent, cpu=functools.partial(run, bits=True), default=run)
    hidden_grad, head_grad = run(hidden_ND, heads)
    return hidden_grad.reshape(hidden_BTD.shape), head_grad


def _backward(form, slope, hidden_ND, heads, bits=False):
    num_tokens = len(hidden_ND)
    vocabulary = heads[0].unembedding_DV.shape[-1]
    shards, rows = form.shards, vocabulary // form.shards
    size = math.ceil(rows * form.chunk_size / max(num_tokens, 1))
    size = min(rows, 128 * math.ceil(size / 128))
    num_blocks = math.ceil(rows / size)
    exact = jnp.promote_types(hidden_ND.dtype, jnp.float32)
    factor = jnp.result_type(hidden_ND, heads[0].unembedding_DV)
    factor = exact if factor == jnp.float16 else factor  # float16 has no room for the slope of a mean

    # A vocabulary split over devices is cut within each shard: every block holds a piece of all of them.
    def split(x):
        return x if shards == 1 else x.reshape(*x.shape[:-1], shards, rows)

    def cut(x, start):
        piece = _slice(x, start, size, axis=x.ndim - 1, bits=bits)
        return piece if shards == 1 else piece.reshape(*piece.shape[:-2], shards * size)

    def paste(x, piece, start):
        piece = piece if shards == 1 else piece.reshape(*piece.shape[:-1], shards, size)
        return jax.lax.dynamic_update_slice_in_dim(x, piece, start, x.ndim - 1)

    def as_stored(x):
        return jax.lax.bitcast_convert_type(x, jnp.uint16) if bits and x.dtype.itemsize == 2 else x

    split_heads = jax.tree.map(split, heads)

    def block(carry, index):
        hidden_grad, head_grad = carry
        start = jnp.minimum(index * size, rows - size)
        pieces = jax.tree.map(lambda x: cut(x, start), split_heads)
        columns_M = (jnp.arange(shards)[:, None] * rows + start + jnp.arange(size)).reshape(-1)
        raw_grad = slope(pieces, columns_M)
        narrow = raw_grad.astype(factor)
        grad = Head(
            jnp.einsum("nd,nm->dm", hidden_ND, narrow, preferred_element_type=exact),
            None if heads[0].bias_V is None else raw_grad.sum(0),
        )
        head_grad = jax.tree.map(
            lambda x, piece, like: paste(x, as_stored(piece.astype(like.dtype)), start),
            head_grad,
            grad,
            heads[0],
        )
        if rows % size:  # the last block is moved back to end with the vocabulary
            narrow = jnp.where(columns_M % rows >= index * size, narrow, 0)
        hidden_grad += jnp.einsum("nm,dm->nd", narrow, pieces[0].unembedding_DV, preferred_element_type=exact)
        return (hidden_grad, head_grad), None

    carry = (
        jnp.zeros_like(hidden_ND, dtype=exact),
        jax.tree.map(lambda x: as_stored(jnp.zeros_like(x)), split_heads[0]),
    )
    carry = jax.tree.map(lambda x: placement.vary_like(x, hidden_ND), carry)
    if num_blocks == 1:
        carry, _ = block(carry, 0)
    else:
        carry, _ = jax.lax.scan(block, carry, jnp.arange(num_blocks))
    hidden_grad, head_grad = carry
    head_grad = jax.tree.map(
        lambda x, like: jax.lax.bitcast_convert_type(x, like.dtype).reshape(like.shape), head_grad, heads[0]
    )
    return hidden_grad.astype(hidden_ND.dtype), head_grad


def spread(
    values_NK: jax.Array, indices_NK: jax.Array, columns_M: jax.Array, vocabulary: int, shards: int
) -> jax.Array:
    """[N, M]: the values whose vocabulary indices are among the block's columns, at their places; else 0."""
    rows, size = vocabulary // shards, len(columns_M) // shards
    within_NK = indices_NK % rows - columns_M[0]
    inside_NK = (within_NK >= 0) & (within_NK < size)
    # Beyond the end, where what is outside is dropped; each at its own place, as unique indices must be.
    outside_NK = shards * size + jnp.arange(indices_NK.shape[-1])
    places_NK = jnp.where(inside_NK, indices_NK // rows * size + within_NK, outside_NK)

    def one(places_K, values_K):
        empty_M = jnp.zeros(shards * size, values_K.dtype)
        return empty_M.at[places_K].set(values_K, mode="drop", unique_indices=True)

    return jax.vmap(one)(places_NK, values_NK)


def _slice(x, start, size, axis, bits=None):
    """dynamic_slice_in_dim; by bits for XLA's CPU backend, which would widen a 16-bit array whole to slice it."""

    def plain(x, start):
        return jax.lax.dynamic_slice_in_dim(x, start, size, axis)

    def by_bits(x, start):
        # Without the barrier the whole array's bits would be copied ahead of the loop.
        x, start = jax.lax.optimization_barrier((x, start))
        return jax.lax.bitcast_convert_type(plain(jax.lax.bitcast_convert_type(x, jnp.uint16), start), x.dtype)

    if x.dtype.itemsize != 2 or bits is False:
        return plain(x, start)
    return by_bits(x, start) if bits else jax.lax.platform_dependent(x, start, cpu=by_bits, default=plain)
