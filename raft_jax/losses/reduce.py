"""From unreduced values to one number, never looking at what is masked."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from raft_jax.losses import checks


def sequence_mean(values_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Mean over each sequence's own tokens, then over the sequences.

        (1/B) sum_i (1/L_i) sum_t mask_it values_it,    L_i = sum_t mask_it

    Args:
        values_BT: [B, T], float.
        mask_BT: [B, T], bool, True where a token counts.

    Returns:
        A scalar in float32 (float64 where the values are). A sequence with nothing unmasked adds 0 and
        is still counted in B; masked values may be inf or NaN, their gradient is 0.

    RAFT (arXiv:2606.00147), Eqs. 5 and 10.

    >>> float(sequence_mean(jnp.array([[1.0, 3.0], [8.0, 9.0]]), jnp.array([[True, True], [True, False]])))
    5.0
    """
    checks.mask(values_BT, mask_BT)
    values_BT = checks.widen(values_BT)
    sums_B = jnp.sum(jnp.where(mask_BT, values_BT, 0), axis=-1)
    counts_B = jnp.sum(mask_BT, axis=-1)
    return jnp.mean(sums_B / jnp.maximum(counts_B, 1))


def token_mean(values_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Mean over all unmasked tokens of the batch, each weighing the same.

        sum_it mask_it values_it / sum_it mask_it

    Args:
        values_BT: [B, T], float.
        mask_BT: [B, T], bool, True where a token counts.

    Returns:
        A scalar in float32 (float64 where the values are); 0 with nothing unmasked. Masked values may be
        inf or NaN, their gradient is 0.

    >>> float(token_mean(jnp.array([[1.0, 3.0], [8.0, 9.0]]), jnp.array([[True, True], [True, False]])))
    4.0
    """
    checks.mask(values_BT, mask_BT)
    values_BT = checks.widen(values_BT)
    return jnp.sum(jnp.where(mask_BT, values_BT, 0)) / jnp.maximum(jnp.sum(mask_BT), 1)
