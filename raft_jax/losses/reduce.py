"""Reductions of unreduced values to a scalar that ignore masked values, and the same reductions as weights."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from raft_jax.losses import checks


def sequence_mean(values_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Mean over the unmasked tokens of each sequence, then over the sequences.

        (1/B) sum_i (1/L_i) sum_t mask_it values_it,    L_i = sum_t mask_it

    Args:
        values_BT: [B, T], or any leading shape; float.
        mask_BT: [B, T], bool, True where a token counts; or int, nonzero where a token counts.

    Returns:
        A scalar in float32 (float64 for float64 values). A fully masked sequence adds 0 and still counts in B. Masked
        values may be inf or NaN; their gradient is 0. An empty batch gives 0.

    Raises:
        ValueError: the shapes differ, or a dtype is not allowed.

    RAFT (arXiv:2606.00147), Eqs. 5 and 10.

    >>> float(sequence_mean(jnp.array([[1.0, 3.0], [8.0, 9.0]]), jnp.array([[True, True], [True, False]])))
    5.0
    """
    checks.floating("values_BT", values_BT)
    mask_BT = checks.mask(mask_BT, values_BT.shape)
    values_BT = checks.upcast(values_BT)
    sums_B = jnp.sum(jnp.where(mask_BT, values_BT, 0), axis=-1)
    return jnp.sum(sums_B / _counts(mask_BT, sums_B.dtype, axis=-1)) / _num_rows(mask_BT, sums_B.dtype)


def token_mean(values_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Mean over all unmasked tokens of the batch, all with equal weight.

        sum_it mask_it values_it / sum_it mask_it

    Args:
        values_BT: [B, T], or any shape; float.
        mask_BT: [B, T], bool, True where a token counts; or int, nonzero where a token counts.

    Returns:
        A scalar in float32 (float64 for float64 values); 0 if everything is masked. Masked values may be inf or NaN;
        their gradient is 0.

    Raises:
        ValueError: the shapes differ, or a dtype is not allowed.

    >>> float(token_mean(jnp.array([[1.0, 3.0], [8.0, 9.0]]), jnp.array([[True, True], [True, False]])))
    4.0
    """
    checks.floating("values_BT", values_BT)
    mask_BT = checks.mask(mask_BT, values_BT.shape)
    values_BT = checks.upcast(values_BT)
    return jnp.sum(jnp.where(mask_BT, values_BT, 0)) / _counts(mask_BT, values_BT.dtype)


def sequence_weight(mask_BT: jax.Array) -> jax.Array:
    """Weights [B, T], float32, for `weight_BT` of the linear losses: the weighted sum equals `sequence_mean`.

    >>> sequence_weight(jnp.array([[True, True], [True, False]])).tolist()
    [[0.25, 0.25], [0.5, 0.0]]
    """
    mask_BT = checks.mask(mask_BT)
    counts_B1 = _counts(mask_BT, jnp.float32, axis=-1, keepdims=True)
    return mask_BT.astype(jnp.float32) / (counts_B1 * _num_rows(mask_BT, jnp.float32))


def token_weight(mask_BT: jax.Array) -> jax.Array:
    """Weights [B, T], float32, for `weight_BT` of the linear losses: the weighted sum equals `token_mean`.

    >>> token_weight(jnp.array([[True, True], [True, False]])).tolist()
    [[0.3333333432674408, 0.3333333432674408], [0.3333333432674408, 0.0]]
    """
    mask_BT = checks.mask(mask_BT)
    return mask_BT.astype(jnp.float32) / _counts(mask_BT, jnp.float32)


def _counts(mask_BT, dtype, **settings):
    return jnp.maximum(jnp.sum(mask_BT, **settings), 1).astype(dtype)


def _num_rows(mask_BT, dtype):
    return jnp.maximum(jnp.asarray(math.prod(mask_BT.shape[:-1])), 1).astype(dtype)
