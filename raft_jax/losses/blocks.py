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
from raft_jax.losses.head import Form, Head, dtypes


class Cut(NamedTuple):
    """How [B, T] falls into chunks of about chunk_size tokens.

    Chunks are cut along time, so that a batch split over devices stays where it is. A batch of more rows than that
    is first folded, whole rows behind one another.
    """

    shape: tuple[int, int]
    rows: int
    time: int
    size: int  # time steps of a chunk
    num_chunks: int

    @classmethod
    def of(cls, shape: tuple[int, int], chunk_size: int) -> Cut:
        rows = max(n for n in range(1, max(1, min(shape[0], chunk_size)) + 1) if shape[0] % n == 0)
        time = math.prod(shape) // rows
        num_chunks = max(1, math.ceil(time / max(1, chunk_size // rows)))
        return cls(shape, rows, time, math.ceil(time / num_chunks), num_chunks)

    def start(self, index):
        """The last chunk is moved back to end with the last token; what it repeats `join` drops."""
        return jnp.minimum(index * self.size, self.time - self.size)

    def chunk(self, arrays_BT, index):
        """The tokens of one chunk, [N, ...]."""
        folded = jax.tree.map(lambda x: x.reshape(self.rows, self.time, *x.shape[2:]), arrays_BT)
        if self.num_chunks > 1:
            folded = jax.tree.map(lambda x: _slice(x, self.start(index), self.size, axis=1), folded)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), folded)

    def is_new(self, index):
        """Which of a chunk's tokens [N] no chunk before it had."""
        return jnp.tile(self.start(index) + jnp.arange(self.size) >= index * self.size, self.rows)

    def join(self, chunks):
        """From [chunks, N, ...] to [B, T, ...]."""

        def one(x):
            x = x.reshape(self.num_chunks, self.rows, self.size, *x.shape[2:])
            whole = jnp.moveaxis(x[:-1], 0, 1).reshape(self.rows, -1, *x.shape[3:])
            whole = jnp.concatenate([whole, x[-1, :, self.num_chunks * self.size - self.time :]], axis=1)
            return whole.reshape(*self.shape, *x.shape[3:])

        return jax.tree.map(one, chunks)


def over_tokens(function: Callable, chunk_size: int, *arrays_BT: jax.Array):
    """function(*[N, ...]) -> pytree of [N, ...] on chunks of tokens, joined to [B, T, ...]."""
    cut = Cut.of(arrays_BT[0].shape[:2], chunk_size)
    if cut.num_chunks == 1:  # without a loop: the compiler then sees what forward and backward share
        return cut.join(jax.tree.map(lambda x: x[None], function(*cut.chunk(arrays_BT, 0))))
    return cut.join(jax.lax.map(lambda index: function(*cut.chunk(arrays_BT, index)), jnp.arange(cut.num_chunks)))


def weighted_sum(form: Form, evaluate: Callable, hidden_BTD: jax.Array, head: Head, weight_BT: jax.Array, *arrays_BT):
    """sum weight * nats with its gradients, formed chunk by chunk while the logits are there.

    evaluate(hidden_ND, *arrays_N) -> (nats_N, slope_NV): nats and their cotangent of the products h W + bias.
    Returns (sum, nats_BT, gradients of (hidden_BTD, head)).
    """
    cut = Cut.of(hidden_BTD.shape[:2], form.chunk_size)
    exact, factor = dtypes(hidden_BTD, head)

    def chunk(index, dtype):
        hidden, weight, *arrays = cut.chunk((hidden_BTD, weight_BT, *arrays_BT), index)
        nats, slope = evaluate(hidden, *arrays)
        weight = jnp.where(cut.is_new(index), weight, 0).astype(exact)
        slope = jnp.where(weight[:, None] == 0, 0, slope * weight[:, None])
        narrow = slope.astype(factor)
        total = jnp.sum(jnp.where(weight == 0, 0, weight * nats))
        head_grad = head.gradient(hidden, narrow, slope, dtype, form.shards == 1)
        return (total, head_grad), (nats, head.hidden_gradient(narrow).astype(hidden_BTD.dtype))

    def add(carry, index):
        sums, values = chunk(index, exact)
        return jax.tree.map(jnp.add, carry, sums), values

    if cut.num_chunks == 1:
        (total, head_grad), values = chunk(0, head.dtype)
        chunks = jax.tree.map(lambda x: x[None], values)
    else:
        start = jnp.zeros((), exact), jax.tree.map(lambda x: jnp.zeros_like(x, dtype=exact), head)
        start = jax.tree.map(lambda x: placement.vary_like(x, hidden_BTD), start)
        (total, head_grad), chunks = jax.lax.scan(add, start, jnp.arange(cut.num_chunks))
    nats_BT, hidden_grad = cut.join(chunks)
    return total, nats_BT, (hidden_grad, jax.tree.map(lambda x, like: x.astype(like.dtype), head_grad, head))


def backward(form: Form, slope: Callable, hidden_BTD: jax.Array, heads: tuple[Head, ...]) -> tuple[jax.Array, Head]:
    """Cotangents of the hidden states and of heads[0].

    slope(pieces, columns_M) is the cotangent [N, M] of the products h W + bias at some columns of the
    vocabulary, given every head cut to them.
    """
    hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    run = functools.partial(_backward, form, slope)
    if heads[0].matrix.dtype.itemsize == 2:
        run = functools.partial(jax.lax.platform_dependent, cpu=functools.partial(run, bits=True), default=run)
    hidden_grad, head_grad = run(hidden_ND, heads)
    return hidden_grad.reshape(hidden_BTD.shape), head_grad


def _backward(form, slope, hidden_ND, heads, bits=False):
    num_tokens = len(hidden_ND)
    shards, rows = form.shards, heads[0].vocabulary // form.shards
    size = math.ceil(rows * form.chunk_size / max(num_tokens, 1))
    size = min(rows, 128 * math.ceil(size / 128))
    num_blocks = math.ceil(rows / size)
    bits = bits and num_blocks > 1
    exact, factor = dtypes(hidden_ND, heads[0])
    axes = tuple(head.axes for head in heads)

    # A vocabulary split over devices is cut within each shard: every block holds a piece of all of them.
    def split(x, axis, size=rows):
        return x if shards == 1 else x.reshape(*x.shape[:axis], shards, size, *x.shape[axis + 1 :])

    def cut(x, axis, start):
        if num_blocks == 1:  # as it lies: the compiler then sees that the forward pass has made its products
            return x if shards == 1 else x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
        piece = _slice(x, start, size, axis=axis + (shards > 1), bits=bits)
        return piece if shards == 1 else piece.reshape(*piece.shape[:axis], shards * size, *piece.shape[axis + 2 :])

    def paste(x, piece, axis, start):
        return jax.lax.dynamic_update_slice_in_dim(x, split(piece, axis, size), start, axis + (shards > 1))

    def as_stored(x):
        return jax.lax.bitcast_convert_type(x, jnp.uint16) if bits and x.dtype.itemsize == 2 else x

    split_heads = jax.tree.map(split, heads, axes)

    def block(carry, index):
        hidden_grad, head_grad = carry
        start = jnp.minimum(index * size, rows - size)
        pieces = jax.tree.map(lambda x, axis: cut(x, axis, start), split_heads, axes)
        columns_M = (jnp.arange(shards)[:, None] * rows + start + jnp.arange(size)).reshape(-1)
        slope_NM = slope(pieces, columns_M)
        narrow_NM = slope_NM.astype(factor)
        head_grad = jax.tree.map(
            lambda x, piece, like, axis: paste(x, as_stored(piece.astype(like.dtype)), axis, start),
            head_grad,
            pieces[0].gradient(hidden_ND, narrow_NM, slope_NM, heads[0].dtype, shards == 1),
            heads[0],
            axes[0],
        )
        if rows % size:  # the last block is moved back to end with the vocabulary
            narrow_NM = jnp.where(columns_M % rows >= index * size, narrow_NM, 0)
        return (hidden_grad + pieces[0].hidden_gradient(narrow_NM), head_grad), None

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
