"""The same losses from hidden states and the unembedding, never holding [B, T, V] for either model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from raft_jax.losses import checks, tokens, truncation
from raft_jax.losses.truncation import TopK


class _Head(NamedTuple):
    """Hidden states to logits: cap * tanh(scale * (h W + bias) / cap)."""

    unembedding_DV: jax.Array
    bias_V: jax.Array | None


class _Shape(NamedTuple):
    """What is static about a head and its chunks."""

    scale: float
    cap: float | None
    vocab_size: int
    padded: bool
    chunk_size: int


def _finish(raw, columns, shape: _Shape):
    """Raw products to logits: scale, cap, -inf in the padding."""
    logits = raw * shape.scale
    if shape.cap is not None:
        logits = shape.cap * jnp.tanh(logits / shape.cap)
    return jnp.where(columns < shape.vocab_size, logits, -jnp.inf) if shape.padded else logits


def _finish_slope(logits, shape: _Shape):
    """d logits / d raw, from the logits."""
    if shape.cap is None:
        return shape.scale
    inside = jnp.where(jnp.isneginf(logits), 0, logits / shape.cap)
    return shape.scale * (1 - inside**2)


def _logits(hidden_BTD, head: _Head, shape: _Shape):
    wide = jnp.promote_types(hidden_BTD.dtype, jnp.float32)
    batch, time, width = hidden_BTD.shape
    raw = jnp.einsum("nd,dv->nv", hidden_BTD.reshape(-1, width), head.unembedding_DV, preferred_element_type=wide)
    raw = raw.reshape(batch, time, -1)
    if head.bias_V is not None:
        raw = raw + head.bias_V.astype(wide)
    return _finish(raw, jnp.arange(raw.shape[-1]), shape)


def _over_tokens(function: Callable, chunk_size: int, hidden_BTD, *others):
    """function(hidden, *others) on chunks of about chunk_size tokens, joined again on [B, T].

    Chunks are cut along time, and along the batch only where one time step of it is too much, so that a batch
    sharded over devices stays where it is.
    """
    batch, time = hidden_BTD.shape[:2]
    if batch > chunk_size:
        rows = next(n for n in range(1, batch + 1) if batch % n == 0 and batch // n <= chunk_size)
        split = [x.reshape(batch // rows, rows, *x.shape[1:]).swapaxes(0, 1) for x in (hidden_BTD, *others)]
        parts = jax.lax.map(lambda xs: _over_tokens(function, chunk_size, *xs), tuple(split))
        return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch, time, *x.shape[3:]), parts)
    num_chunks = math.ceil(batch * time / chunk_size)
    steps = math.ceil(time / num_chunks) if time else 0
    if steps == time:
        return function(hidden_BTD, *others)
    num_chunks = math.ceil(time / steps)

    def chunk(index):
        # The last chunk is moved back to end with the last token; what it repeats is cut off below.
        start = jnp.minimum(index * steps, time - steps)
        return function(*(_slice(x, start, steps, 1) for x in (hidden_BTD, *others)))

    def join(x):
        last = x[-1, :, num_chunks * steps - time :]
        head = jnp.moveaxis(x[:-1], 0, 1).reshape(batch, (num_chunks - 1) * steps, *x.shape[3:])
        return jnp.concatenate([head, last], axis=1)

    return jax.tree.map(join, jax.lax.map(chunk, jnp.arange(num_chunks)))


def _slice(values, start, size, axis):
    def plain(values, start):
        return jax.lax.dynamic_slice_in_dim(values, start, size, axis)

    def bits(values, start):
        values, start = jax.lax.optimization_barrier((values, start))
        return jax.lax.bitcast_convert_type(plain(_bits(values), start), values.dtype)

    if values.dtype.itemsize != 2:
        return plain(values, start)
    return jax.lax.platform_dependent(values, start, cpu=bits, default=plain)


def _bits(values):
    return jax.lax.bitcast_convert_type(values, jnp.uint16) if values.dtype.itemsize == 2 else values


def _backward(hidden_BTD, head: _Head, shape: _Shape, slope: Callable):
    """Cotangents of hidden states and head from those of the logits, block by block of the vocabulary.

    Every block meets all tokens in one product, so the unembedding's gradient is summed inside the product and
    needs no accumulator. The vocabulary is cut into S groups and a block takes a piece of each, so that a
    vocabulary sharded over devices stays where it is.

    slope(piece_DM, bias_M, columns_SR): the cotangent of the raw products, [N, M] with N = B T, M = S R.
    """
    batch, time, width = hidden_BTD.shape
    vocabulary = head.unembedding_DV.shape[-1]
    groups = math.gcd(vocabulary, jax.device_count())
    rows = vocabulary // groups
    size = math.ceil(rows * shape.chunk_size / max(batch * time, 1))
    size = min(rows, math.ceil(size / 128) * 128)
    num_blocks = math.ceil(rows / size)
    wide = jnp.promote_types(hidden_BTD.dtype, jnp.float32)
    hidden_ND = hidden_BTD.reshape(batch * time, width)

    def split(values):
        return values if groups == 1 else values.reshape(*values.shape[:-1], groups, rows)

    def cut(values, start):
        piece = _slice(values, start, size, values.ndim - 1)
        return piece if groups == 1 else piece.reshape(*piece.shape[:-2], groups * size)

    def paste(values, piece, start):
        piece = piece if groups == 1 else piece.reshape(*piece.shape[:-1], groups, size)
        return jax.lax.dynamic_update_slice_in_dim(values, _bits(piece), start, values.ndim - 1)

    head_split = jax.tree.map(split, head)

    def block(carry, index):
        hidden_grad, grads = carry
        start = jnp.minimum(index * size, rows - size)
        piece = jax.tree.map(lambda x: cut(x, start), head_split)
        columns = jnp.arange(groups)[:, None] * rows + start + jnp.arange(size)
        raw_grad = slope(*piece, columns)
        narrow = raw_grad.astype(hidden_BTD.dtype)
        piece_grad = jnp.einsum("nd,nm->dm", hidden_ND, narrow, preferred_element_type=wide)
        piece_grad = _Head(piece_grad, None if head.bias_V is None else raw_grad.sum(0))
        grads = jax.tree.map(lambda g, p, v: paste(g, p.astype(v.dtype), start), grads, piece_grad, head)
        fresh = jnp.tile(start + jnp.arange(size) >= index * size, groups)
        hidden_grad += jnp.einsum(
            "nm,dm->nd", jnp.where(fresh, narrow, 0), piece.unembedding_DV, preferred_element_type=wide
        )
        return (hidden_grad, grads), None

    carry = (
        jnp.zeros_like(hidden_ND, dtype=wide), jax.tree.map(lambda x: _bits(jnp.zeros_like(x)), head_split)
    )
    (hidden_grad, grads), _ = jax.lax.scan(block, carry, jnp.arange(num_blocks))
    grads = jax.tree.map(lambda g, v: jax.lax.bitcast_convert_type(g, v.dtype).reshape(v.shape), grads, head)
    return hidden_grad.astype(hidden_BTD.dtype).reshape(hidden_BTD.shape), grads


# --- cross entropy ---


def _cross_entropy(shape, hidden_BTD, head, labels_BT):
    return _cross_entropy_forward(shape, hidden_BTD, head, labels_BT)[0]


def _cross_entropy_forward(shape, hidden_BTD, head, labels_BT):
    def chunk(hidden, labels):
        logits = _logits(hidden, head, shape)
        normalizer = truncation.log_normalizer(logits)
        return jnp.where(labels < 0, 0, normalizer - tokens.pick_label(logits, labels)), normalizer

    nats_BT, normalizer_BT = _over_tokens(chunk, shape.chunk_size, hidden_BTD, labels_BT)
    return nats_BT, (hidden_BTD, head, labels_BT, normalizer_BT)


def _cross_entropy_backward(shape, residuals, cotangent_BT):
    hidden_BTD, head, labels_BT, normalizer_BT = residuals

    hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    labels_N1, normalizer_N1 = labels_BT.reshape(-1, 1), normalizer_BT.reshape(-1, 1)
    weight_N1 = jnp.where(labels_N1 < 0, 0, cotangent_BT.reshape(-1, 1))

    def slope(piece, bias, columns):
        raw = jnp.einsum("nd,dm->nm", hidden_ND, piece, preferred_element_type=cotangent_BT.dtype)
        if bias is not None:
            raw = raw + bias.astype(raw.dtype)
        logits = _finish(raw, columns.reshape(-1), shape)
        slope = jnp.exp(logits - normalizer_N1) - (columns.reshape(-1) == labels_N1)
        return slope * weight_N1 * _finish_slope(logits, shape)

    return *_backward(hidden_BTD, head, shape, slope), None


_cross_entropy = jax.custom_vjp(_cross_entropy, nondiff_argnums=(0,))
_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def linear_cross_entropy(
    hidden_BTD: jax.Array,
    unembedding_DV: jax.Array,
    labels_BT: jax.Array,
    *,
    bias_V: jax.Array | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    chunk_size: int = 512,
) -> jax.Array:
    """`cross_entropy` of the logits h W, of which only chunk_size tokens' worth exists at a time.

    Args:
        hidden_BTD: [B, T, D], float.
        unembedding_DV: [D, V], float.
        labels_BT: [B, T], int; negative means no target.
        bias_V: [V], added to h W.
        logit_scale: multiplies h W + bias.
        logit_softcap: c in c tanh(logit / c), after the scale.
        vocab_size: columns beyond it pad the vocabulary and do not exist. Default: V.
        chunk_size: tokens whose logits are held at a time.

    Returns:
        nats_BT: [B, T], float32.

    RAFT (arXiv:2606.00147), Eq. 5.
    """
    checks.integers("labels_BT", labels_BT)
    head, shape = _head("", hidden_BTD, unembedding_DV, bias_V, logit_scale, logit_softcap, vocab_size, chunk_size)
    checks.shape("labels_BT", labels_BT, hidden_BTD.shape[:2], "[B, T] of hidden_BTD")
    return _cross_entropy(shape, hidden_BTD, head, labels_BT)


# --- logits at given tokens ---


def _logits_at(shape, temperature, hidden_BTD, head, indices_BTK):
    return _logits_at_forward(shape, temperature, hidden_BTD, head, indices_BTK)[0]


def _logits_at_forward(shape, temperature, hidden_BTD, head, indices_BTK):
    def chunk(hidden, indices):
        logits = _logits(hidden, head, shape)
        picked = jnp.take_along_axis(logits, indices, axis=-1)
        return picked, None if temperature is None else truncation.distribution_stats(logits, temperature)

    picked_BTK, stats = _over_tokens(chunk, shape.chunk_size, hidden_BTD, indices_BTK)
    return (picked_BTK, stats), (hidden_BTD, head, indices_BTK, picked_BTK if shape.cap is not None else None)


def _logits_at_backward(shape, temperature, residuals, cotangents):
    hidden_BTD, head, indices_BTK, picked_BTK = residuals
    raw_grad_BTK = cotangents[0] * _finish_slope(picked_BTK, shape)
    k = indices_BTK.shape[-1]
    indices_NK, raw_grad_NK = indices_BTK.reshape(-1, k), raw_grad_BTK.reshape(-1, k)

    def slope(piece, bias, columns):
        groups, size = columns.shape
        rows = head.unembedding_DV.shape[-1] // groups
        group_NK, row_NK = indices_NK // rows, indices_NK % rows - columns[0, 0]
        row_NK = jnp.where(row_NK < 0, size, row_NK)
        zeros = jnp.zeros((len(indices_NK), groups, size), raw_grad_NK.dtype)
        dense = zeros.at[jnp.arange(len(indices_NK))[:, None], group_NK, row_NK].set(
            raw_grad_NK, mode="drop", unique_indices=True
        )
        return dense.reshape(-1, groups * size)

    return *_backward(hidden_BTD, head, shape, slope), None


_logits_at = jax.custom_vjp(_logits_at, nondiff_argnums=(0, 1))
_logits_at.defvjp(_logits_at_forward, _logits_at_backward)


def linear_top_k(
    hidden_BTD: jax.Array,
    unembedding_DV: jax.Array,
    k: int = 512,
    *,
    temperature: float = 1.5,
    bias_V: jax.Array | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    chunk_size: int = 512,
) -> TopK:
    """`top_k` of the logits h W, of which only chunk_size tokens' worth exists at a time. No gradient."""
    checks.positive("k", k)
    checks.temperature(temperature)
    head, shape = _head("", hidden_BTD, unembedding_DV, bias_V, logit_scale, logit_softcap, vocab_size, chunk_size)
    return _linear_top_k(hidden_BTD, head, shape, k, temperature, with_stats=True)


def _linear_top_k(hidden_BTD, head, shape, k, temperature, with_stats):
    hidden_BTD, head = jax.lax.stop_gradient((hidden_BTD, head))

    def chunk(hidden):
        return truncation.select(_logits(hidden, head, shape), min(k, shape.vocab_size), temperature, with_stats)

    return _over_tokens(chunk, shape.chunk_size, hidden_BTD)


def linear_top_k_forward_kl(
    student_hidden_BTD: jax.Array,
    student_unembedding_DV: jax.Array,
    teacher_hidden_BTD: jax.Array | TopK,
    teacher_unembedding_DV: jax.Array | None = None,
    *,
    k: int = 512,
    temperature: float = 1.5,
    student_bias_V: jax.Array | None = None,
    teacher_bias_V: jax.Array | None = None,
    logit_scale: float | tuple[float, float] = 1.0,
    logit_softcap: float | tuple[float | None, float | None] | None = None,
    vocab_size: int | None = None,
    chunk_size: int = 512,
    return_metrics: bool = False,
) -> jax.Array | tuple[jax.Array, dict[str, jax.Array]]:
    """`top_k_forward_kl` of the logits h W, of which only chunk_size tokens' worth exists at a time.

    Args:
        student_hidden_BTD: [B, T, D], float.
        student_unembedding_DV: [D, V], float.
        teacher_hidden_BTD: [B, T, D'], float, of any width; or a `TopK` computed before. No gradient.
        teacher_unembedding_DV: [D', V], float; None with a `TopK`. No gradient.
        k, temperature, vocab_size, return_metrics: as in `top_k_forward_kl`.
        student_bias_V, teacher_bias_V, logit_scale, logit_softcap: as in `linear_cross_entropy`; the last two
            one value for both models or a pair (student, teacher).
        chunk_size: tokens whose logits are held at a time.

    Returns:
        nats_BT: [B, T], float32; with metrics (nats_BT, {name: values_BT}).

    RAFT (arXiv:2606.00147), Eqs. 8 to 10.
    """
    checks.positive("k", k)
    checks.temperature(temperature)
    scales = logit_scale if isinstance(logit_scale, tuple) else (logit_scale, logit_scale)
    caps = logit_softcap if isinstance(logit_softcap, tuple) else (logit_softcap, logit_softcap)
    if isinstance(teacher_hidden_BTD, TopK):
        teacher = TopK(*(x if x is None else x[..., :k] if x.ndim == 3 else x for x in teacher_hidden_BTD))
    else:
        vocab_size = checks.vocab_size(
            vocab_size,
            student_unembedding_DV=student_unembedding_DV.shape[-1],
            teacher_unembedding_DV=teacher_unembedding_DV.shape[-1],
        )
        checks.shape("teacher_hidden_BTD", teacher_hidden_BTD[..., 0], student_hidden_BTD.shape[:2], "the student's")
        head, shape = _head(
            "teacher_", teacher_hidden_BTD, teacher_unembedding_DV, teacher_bias_V, scales[1], caps[1], vocab_size, chunk_size
        )
        teacher = _linear_top_k(teacher_hidden_BTD, head, shape, k, temperature, return_metrics)
    head, shape = _head(
        "student_", student_hidden_BTD, student_unembedding_DV, student_bias_V, scales[0], caps[0], vocab_size, chunk_size
    )
    teacher = jax.lax.stop_gradient(teacher)
    picked_BTK, stats = _logits_at(
        shape, temperature if return_metrics else None, student_hidden_BTD, head, teacher.indices_BTK
    )
    nats_BT = truncation.truncated_forward_kl(
        picked_BTK, checks.widen(teacher.logits_BTK), jnp.asarray(temperature, picked_BTK.dtype)
    )
    if not return_metrics:
        return nats_BT
    return nats_BT, truncation.metrics(teacher, picked_BTK, stats, temperature)


def _head(who, hidden_BTD, unembedding_DV, bias_V, scale, cap, vocab_size, chunk_size) -> tuple[_Head, _Shape]:
    checks.floating(f"{who}hidden_BTD", hidden_BTD, 3)
    checks.floating(f"{who}unembedding_DV", unembedding_DV, 2)
    width, vocabulary = unembedding_DV.shape
    if width != hidden_BTD.shape[-1]:
        raise ValueError(
            f"{who}unembedding_DV has {width} rows for {who}hidden_BTD of width {hidden_BTD.shape[-1]}; "
            "pass it as [D, V] (transpose an embedding table)"
        )
    if bias_V is not None:
        checks.floating(f"{who}bias_V", bias_V, 1)
        checks.shape(f"{who}bias_V", bias_V, (vocabulary,), f"the vocabulary of {who}unembedding_DV")
    if cap is not None and not cap > 0:
        raise ValueError(f"logit_softcap must be > 0 or None, got {cap}")
    checks.positive("chunk_size", chunk_size)
    vocab_size = checks.vocab_size(vocab_size, **{f"{who}unembedding_DV": vocabulary})
    return _Head(unembedding_DV, bias_V), _Shape(scale, cap, vocab_size, vocab_size < vocabulary, chunk_size)
