"""Losses from hidden states, without ever holding all logits [B, T, V].

The forward pass loops over chunks of tokens, each with the whole vocabulary, which the softmax needs. The backward pass
loops over blocks of the vocabulary, each with all tokens, so that a block of the unembedding's gradient is summed
inside one matrix product and needs no accumulator. Both passes hold about chunk_size * V logits at a time.

There are two custom VJPs. `linear_losses` returns unreduced losses, for several sets of tokens at once
(`linear_raft_losses`). `weighted_linear_loss` returns a weighted sum and computes its gradient in the forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from raft_jax.losses import checks, sharding, xla_cpu
from raft_jax.losses.lm_head import LMHead, LogitConfig
from raft_jax.losses.pointwise import any_nonzero

SYMBOLIC_ROWS = 64  # chunks are sized for this many rows where the batch size is symbolic (`jax.export`)


class Term(NamedTuple):
    """The static part of one loss; `Targets` has the arrays."""

    loss: Any  # a loss of pointwise.py
    student: LogitConfig
    teacher: LogitConfig | None = None  # None unless the targets are logits computed from a teacher's hidden states


class Targets(NamedTuple):
    """The arrays that a loss compares the student with. They get no gradient."""

    tokens: Any  # [B, T, ...]: labels, a TopK, or the teacher's hidden states
    teacher_head: LMHead | None = None
    temperature: jax.Array | None = None

    def compared(self, term: Term, tokens_N, head: LMHead | None, columns_M=None):
        """The argument `targets` of pointwise.py, for some tokens and some columns of the vocabulary."""
        if term.teacher is None or head is None:  # both or neither
            targets = tokens_N
        else:
            targets = head.logits(tokens_N, term.teacher, columns_M)
        return targets if self.temperature is None else (targets, self.temperature)


# ------------------------------------------------------------------ forward: chunks of tokens


class TokenChunks(NamedTuple):
    """Splits tokens of shape [B, T] (or any other shape) into chunks of about chunk_size tokens.

    The split is along time, so that a batch sharded over devices needs no resharding. A batch with more than chunk_size
    rows is first reshaped to fewer, longer rows, by concatenating whole rows.
    """

    shape: tuple[int, ...]
    rows: int
    time: int
    size: int  # time steps of a chunk
    num_chunks: int

    @classmethod
    def of(cls, shape: tuple[int, ...], chunk_size: int) -> TokenChunks:
        *batch, time = shape if len(shape) > 1 else (*shape, 1)
        batch = math.prod(batch)
        if not isinstance(batch, int):
            rows, row_steps = batch, max(1, chunk_size // SYMBOLIC_ROWS)
        else:
            rows = max(n for n in range(1, max(1, min(batch, chunk_size)) + 1) if batch % n == 0)
            time, row_steps = time * (batch // rows), max(1, chunk_size // rows)
        num_chunks = max(1, math.ceil(time / row_steps))
        return cls(shape, rows, time, math.ceil(time / num_chunks), num_chunks)

    def start(self, index):
        """First time step of a chunk. The last chunk starts earlier, to end at the last token; `join` drops repeats."""
        return jnp.minimum(index * self.size, self.time - self.size)

    def chunk(self, arrays, index):
        """The tokens of one chunk, [N, ...]."""

        def one(x):
            rest = x.shape[len(self.shape) :]
            x = x.reshape(self.rows, self.time, *rest)
            if self.num_chunks > 1:
                x = xla_cpu.slice_in_dim(x, self.start(index), self.size, axis=1)
            return x.reshape(self.rows * self.size, *rest)

        return jax.tree.map(one, arrays)

    def is_new(self, index):
        """Mask [N] of the chunk's tokens that were in no earlier chunk."""
        is_new = self.start(index) + jnp.arange(self.size) >= index * self.size
        return jnp.broadcast_to(is_new[None], (self.rows, self.size)).reshape(self.rows * self.size)

    def join(self, chunks):
        """[chunks, N, ...] → [B, T, ...]."""

        def one(x):
            rest = x.shape[2:]
            x = x.reshape(self.num_chunks, self.rows, self.size, *rest)
            whole = jnp.moveaxis(x[:-1], 0, 1).reshape(self.rows, (self.num_chunks - 1) * self.size, *rest)
            whole = jnp.concatenate([whole, x[-1, :, self.num_chunks * self.size - self.time :]], axis=1)
            return whole.reshape(*self.shape, *rest)

        return jax.tree.map(one, chunks)


def over_tokens(function: Callable, shape: tuple[int, ...], chunk_size: int, *arrays):
    """Applies function(*[N, ...]) -> pytree of [N, ...] to chunks of tokens and joins the results to [B, T, ...]."""
    chunks = TokenChunks.of(shape, chunk_size)
    if chunks.num_chunks == 1:  # no loop, so that the compiler can share computations of forward and backward
        return chunks.join(jax.tree.map(lambda x: x[None], function(*chunks.chunk(arrays, 0))))
    return chunks.join(jax.lax.map(lambda index: function(*chunks.chunk(arrays, index)), jnp.arange(chunks.num_chunks)))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def linear_losses(terms: tuple[Term, ...], chunk_size: int, hidden: tuple, head: LMHead, targets: tuple[Targets, ...]):
    """The outputs [B, T] of each term's loss. Each term has its own hidden states [B, T, D]; all share one head.

    The head's gradient is computed in one product over the tokens of all terms.
    """
    return _linear_losses_forward(terms, chunk_size, hidden, head, targets)[0]


def _linear_losses_forward(terms, chunk_size, hidden, head, targets):
    def evaluate(term, hidden_BTD, target):
        def chunk(hidden_ND, tokens_N):
            logits_NV = head.logits(hidden_ND, term.student)
            return term.loss.value(logits_NV, target.compared(term, tokens_N, target.teacher_head))

        return over_tokens(chunk, hidden_BTD.shape[:-1], chunk_size, hidden_BTD, target.tokens)

    outputs, residuals = zip(*map(evaluate, terms, hidden, targets), strict=True)
    return outputs, (hidden, head, targets, residuals)


def _linear_losses_backward(terms, chunk_size, saved, cotangents):
    hidden, head, targets, residuals = saved
    # The terms' tokens are concatenated row by row, so that a batch sharded over devices needs no resharding.
    rows = [x.shape[0] if x.ndim > 1 else 1 for x in hidden]
    num_rows = max(1, math.gcd(*rows)) if all(isinstance(n, int) for n in rows) else 1
    parts = tuple(map(TermArrays.by_token, terms, hidden, targets, residuals, cotangents))
    plain = partial(_over_vocabulary, terms, chunk_size, num_rows, False)
    if xla_cpu.is_16_bit(head.matrix):
        by_bits = partial(_over_vocabulary, terms, chunk_size, num_rows, True)
        hidden_grads, head_grad = xla_cpu.on_cpu(by_bits, plain, head, parts)
    else:
        hidden_grads, head_grad = plain(head, parts)
    hidden_grads = (g.astype(x.dtype).reshape(x.shape) for g, x in zip(hidden_grads, hidden, strict=True))
    return tuple(hidden_grads), head_grad, None


linear_losses.defvjp(_linear_losses_forward, _linear_losses_backward)


def linear_loss(term: Term, chunk_size: int, hidden_BTD, head: LMHead, targets: Targets):
    """The outputs [B, T] of one loss."""
    outputs: Any = linear_losses((term,), chunk_size, (hidden_BTD,), head, (targets,))
    return outputs[0]


# ------------------------------------------------------------------ backward: blocks of the vocabulary


class VocabBlocks(NamedTuple):
    """Splits the vocabulary into blocks. If it is sharded over devices, each block has columns of every shard."""

    shards: int
    rows: int  # columns of a shard
    size: int  # columns of a block in each shard
    num_blocks: int

    @classmethod
    def of(cls, vocabulary: int, shards: int, num_tokens, chunk_size: int) -> VocabBlocks:
        rows = vocabulary // shards
        size = min(rows, 128 * math.ceil(rows * chunk_size / max(num_tokens, 1) / 128))
        return cls(shards, rows, size, math.ceil(rows / size))

    def start(self, index):
        """First column of a block in each shard. The last block starts earlier, to end at the shard's last column."""
        return jnp.minimum(index * self.size, self.rows - self.size)

    def columns(self, index):
        """Indices [M] of the block's columns in the vocabulary."""
        within = jnp.arange(self.size) + self.start(index)
        return (self.rows * jnp.arange(self.shards)[:, None] + within[None]).reshape(self.shards * self.size)

    def is_new(self, index):
        """Mask [1, M] of the columns that were in no earlier block."""
        return (self.columns(index) % self.rows >= index * self.size)[None]

    def split(self, x, axis: int, size: int | None = None):
        """Reshapes the vocabulary axis to two axes, [shards, columns of a shard]."""
        size = self.rows if size is None else size
        return x if self.shards == 1 else x.reshape(*x.shape[:axis], self.shards, size, *x.shape[axis + 1 :])

    def read(self, x, axis: int, index):
        """A block of an array from `split`, with one vocabulary axis again."""
        if self.num_blocks > 1:
            x = xla_cpu.slice_in_dim(x, self.start(index), self.size, axis + (self.shards > 1))
        return x if self.shards == 1 else x.reshape(*x.shape[:axis], self.shards * self.size, *x.shape[axis + 2 :])

    def write(self, x, piece, axis: int, index):
        piece, axis_within = self.split(piece, axis, self.size), axis + (self.shards > 1)
        return jax.lax.dynamic_update_slice_in_dim(x, piece, self.start(index), axis_within)


class TermArrays(NamedTuple):
    """The arrays that the backward pass of one term needs, with all tokens on one axis."""

    hidden_ND: jax.Array
    keep_N: jax.Array  # tokens with a nonzero cotangent; the others may hold NaN, so hidden_ND is 0 there
    targets: Targets
    residuals: Any
    cotangent: Any

    @classmethod
    def by_token(cls, term: Term, hidden, targets: Targets, residuals, cotangent) -> TermArrays:
        shape = hidden.shape[:-1]

        def flat(tree):
            return jax.tree.map(lambda x: x.reshape(math.prod(shape), *x.shape[len(shape) :]), tree)

        targets = targets._replace(tokens=flat(targets.tokens))
        cotangent = term.loss.cotangent(targets.tokens, flat(cotangent))
        keep_N = any_nonzero(cotangent)
        hidden_ND = jnp.where(keep_N[:, None], flat(hidden), 0)
        return cls(hidden_ND, keep_N, targets, flat(residuals), cotangent)

    def dlogits(self, term: Term, head: LMHead, teacher_head: LMHead | None, columns_M) -> jax.Array:
        """Gradient [N, M] with respect to h W + bias, at the columns M that both heads have been sliced to."""
        logits, derivative = None, 1
        if term.loss.needs_logits:
            logits = head.logits(self.hidden_ND, term.student, columns_M)
            derivative = term.student.derivative(logits)
        compared = self.targets.compared(term, self.targets.tokens, teacher_head, columns_M)
        dlogits_NM = term.loss.dlogits(logits, compared, self.residuals, self.cotangent, columns_M) * derivative
        return term.student.sharding.constrain(jnp.where(self.keep_N[:, None], dlogits_NM, 0))


def _over_vocabulary(terms, chunk_size, num_rows, bits, head, parts: tuple[TermArrays, ...]):
    """Gradients of each term's hidden states ([N, D], in the accumulation dtype) and of the head.

    `bits` keeps the head's gradient as integers in the loop (see `xla_cpu.as_bits`).
    """
    hidden_ND, config = _join(num_rows, [part.hidden_ND for part in parts]), terms[0].student
    num_tokens = hidden_ND.shape[0] if isinstance(hidden_ND.shape[0], int) else SYMBOLIC_ROWS * 16
    blocks = VocabBlocks.of(head.vocabulary, config.sharding.shards, num_tokens, chunk_size)
    bits = bits and blocks.num_blocks > 1
    accumulated = checks.accumulation_dtype(hidden_ND.dtype, head.dtype)

    def split(head: LMHead) -> LMHead:
        return jax.tree.map(blocks.split, head, head.axes)

    def read(split_head: LMHead, index) -> LMHead:
        return jax.tree.map(lambda x, axis: blocks.read(x, axis, index), split_head, split_head.axes)

    teachers = [part.targets.teacher_head for part in parts]
    split_head, split_teachers = split(head), [None if teacher is None else split(teacher) for teacher in teachers]

    def block(carry, index):
        hidden_grad, head_grad = carry
        columns_M, piece = blocks.columns(index), read(split_head, index)
        dlogits_NM = _join(
            num_rows,
            [
                part.dlogits(term, piece, None if teacher is None else read(teacher, index), columns_M)
                for term, part, teacher in zip(terms, parts, split_teachers, strict=True)
            ],
        )
        update = piece.gradient(hidden_ND, dlogits_NM, head.dtype, config)
        if bits:
            update = jax.tree.map(xla_cpu.as_bits, update)
        head_grad = jax.tree.map(lambda x, u, axis: blocks.write(x, u, axis, index), head_grad, update, head.axes)
        if blocks.rows % blocks.size:
            dlogits_NM = jnp.where(blocks.is_new(index), dlogits_NM, 0)
        grad = piece.hidden_gradient(dlogits_NM, config, columns_M, like=hidden_ND)
        return (hidden_grad + grad.astype(accumulated), head_grad), None

    head_grad = jax.tree.map(jnp.zeros_like, split_head)
    if bits:
        head_grad = jax.tree.map(xla_cpu.as_bits, head_grad)
    carry = sharding.vary_like((jnp.zeros_like(hidden_ND, dtype=accumulated), head_grad), hidden_ND)
    if blocks.num_blocks == 1:
        carry, _ = block(carry, 0)
    else:
        carry, _ = jax.lax.scan(block, carry, jnp.arange(blocks.num_blocks))
    hidden_grad, head_grad = carry
    head_grad = jax.tree.map(lambda x, like: xla_cpu.from_bits(x, like.dtype).reshape(like.shape), head_grad, head)
    return _split(num_rows, hidden_grad, [part.hidden_ND.shape[0] for part in parts]), head_grad


def _join(num_rows: int, arrays):
    """Concatenates [N, X] and [N', X] to [N + N', X], within each of the num_rows rows that both consist of."""
    if len(arrays) == 1:
        return arrays[0]
    joined = jnp.concatenate([x.reshape(num_rows, x.shape[0] // num_rows, x.shape[1]) for x in arrays], axis=1)
    return joined.reshape(num_rows * joined.shape[1], joined.shape[2])


def _split(num_rows: int, array, sizes):
    """The inverse of `_join`."""
    if len(sizes) == 1:
        return (array,)
    array, start, parts = array.reshape(num_rows, sum(sizes) // num_rows, array.shape[1]), 0, []
    for size in sizes:
        end = start + size // num_rows
        parts.append(jax.lax.slice_in_dim(array, start, end, axis=1).reshape(size, array.shape[2]))
        start = end
    return tuple(parts)


# ------------------------------------------------------------------ a weighted sum, with the gradient computed forward


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def weighted_linear_loss(term: Term, chunk_size: int, hidden_BTD, head: LMHead, weight_BT, targets: Targets):
    """(sum_bt weight_bt loss_bt, the loss's metrics [B, T] if it returns any). Tokens of weight 0 may hold NaN."""
    outputs = linear_loss(term, chunk_size, hidden_BTD, head, targets)
    loss_BT, metrics = outputs if isinstance(outputs, tuple) else (outputs, None)
    weight_BT = weight_BT.astype(loss_BT.dtype)
    return jnp.sum(jnp.where(weight_BT == 0, 0, weight_BT * loss_BT)), metrics


def _weighted_forward(term, chunk_size, hidden_BTD, head, weight_BT, targets):
    chunks = TokenChunks.of(hidden_BTD.shape[:-1], chunk_size)
    accumulated = checks.accumulation_dtype(hidden_BTD.dtype, head.dtype)
    columns_V = jnp.arange(head.vocabulary)
    gather = partial(term.student.sharding.gather, num_rows=chunks.rows)
    is_loop = chunks.num_chunks > 1
    sum_dtype = accumulated if is_loop else head.dtype
    # In a loop, the sum over devices that have different rows is completed once, after the last chunk.
    groups, head_gradient = term.student.sharding.partial_sums(
        lambda hidden_ND, dlogits_NV: head.gradient(hidden_ND, dlogits_NV, sum_dtype, term.student),
        chunks.rows if is_loop else 1,
    )

    def chunk(index):
        hidden_ND, weight_N, tokens_N = chunks.chunk((hidden_BTD, weight_BT, targets.tokens), index)
        hidden_ND = gather(hidden_ND)
        weight_N = jnp.where(chunks.is_new(index), weight_N, 0).astype(accumulated)
        logits_NV = head.logits(hidden_ND, term.student)
        compared = targets.compared(term, tokens_N, targets.teacher_head)
        outputs, residuals = term.loss.value(logits_NV, compared)
        loss_N, metrics = outputs if isinstance(outputs, tuple) else (outputs, None)
        cotangent_N = term.loss.cotangent(tokens_N, weight_N if metrics is None else (weight_N, metrics))
        keep_N1 = (cotangent_N != 0)[:, None]
        dlogits_NV = term.loss.dlogits(logits_NV, compared, residuals, cotangent_N, columns_V)
        derivative = term.student.derivative(logits_NV) if term.loss.needs_logits else 1
        dlogits_NV = term.student.sharding.constrain(jnp.where(keep_N1, dlogits_NV * derivative, 0))
        total = jnp.sum(jnp.where(weight_N == 0, 0, weight_N * loss_N))
        head_grad = head_gradient(gather(jnp.where(keep_N1, hidden_ND, 0)), dlogits_NV)
        hidden_grad_ND = head.hidden_gradient(dlogits_NV, term.student, like=hidden_ND)
        return (total, head_grad), (loss_N, metrics, hidden_grad_ND.astype(hidden_BTD.dtype))

    def add(carry, index):
        sums, values = chunk(index)
        return jax.tree.map(jnp.add, carry, sums), values

    if is_loop:
        shape = (groups,) if groups > 1 else ()
        start = jnp.zeros((), accumulated), jax.tree.map(lambda x: jnp.zeros((*shape, *x.shape), accumulated), head)
        start = sharding.vary_like(start, hidden_BTD)
        (total, head_grad), per_chunk = jax.lax.scan(add, start, jnp.arange(chunks.num_chunks))
        head_grad = jax.tree.map(lambda x, y: (x if groups == 1 else x.sum(0)).astype(y.dtype), head_grad, head)
        # Otherwise XLA would leave out the conversion, and keep the float32 sum until the backward pass.
        head_grad = jax.lax.optimization_barrier(head_grad)
    else:
        (total, head_grad), values = chunk(0)
        per_chunk = jax.tree.map(lambda x: x[None], values)
    loss_BT, metrics, hidden_grad_BTD = chunks.join(per_chunk)
    loss_BT = jnp.where((weight_BT == 0) & ~jnp.isfinite(loss_BT), 0, loss_BT)
    return (total, metrics), (hidden_grad_BTD, head_grad, loss_BT.astype(weight_BT.dtype))


def _weighted_backward(term, chunk_size, grads, cotangents):
    cotangent, _ = cotangents  # metrics have no gradient
    return *jax.tree.map(lambda x: (x.astype(cotangent.dtype) * cotangent).astype(x.dtype), grads), None


weighted_linear_loss.defvjp(_weighted_forward, _weighted_backward)
