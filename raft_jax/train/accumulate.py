"""Gradient accumulation: losses and gradients of a batch, computed one micro-batch at a time to save memory."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from raft_jax.tokens import Batch


def accumulated_vjp(losses: Callable, names: tuple[str, ...], params, batch: Batch, num_micro_batches: int):
    """Like `jax.vjp(..., has_aux=True)`: returns each sum over all micro-batches, the pullback, and the sums of the
    auxiliary outputs. `losses(params, part, name)` computes one of `names` on one micro-batch.

    Micro-batch m of M takes rows m, m + M, m + 2M, ..., so that each micro-batch is sharded like the batch.
    """

    def split(array):
        if array.shape[0] % num_micro_batches:
            raise ValueError(f"{array.shape[0]} rows do not divide into {num_micro_batches} micro-batches")
        return array.reshape(-1, num_micro_batches, *array.shape[1:]).swapaxes(0, 1)

    def sums_and_grads(part):
        def of(name):
            total, pullback, metrics = jax.vjp(lambda params: losses(params, part, name), params, has_aux=True)
            (grads,) = pullback(jax.tree.map(jnp.ones_like, total))
            return total[name], grads, metrics

        return {name: of(name) for name in names}

    parts = jax.tree.map(split, batch)
    shapes = jax.eval_shape(sums_and_grads, jax.tree.map(lambda array: array[0], parts))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, sums_and_grads(part)), None), zeros, parts)

    def pullback(cotangents):
        def joined(*grads):
            return sum((cotangents[name] * grad).astype(grad.dtype) for name, grad in zip(names, grads, strict=True))

        return (jax.tree.map(joined, *(total[name][1] for name in names)),)

    metrics = {key: value for name in names for key, value in total[name][2].items()}
    return {name: total[name][0] for name in names}, pullback, metrics
