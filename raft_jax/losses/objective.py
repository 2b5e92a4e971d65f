"""The loss that RAFT trains on."""

from __future__ import annotations

import jax

from raft_jax.losses import checks


def raft_objective(sft_loss: jax.Array, kl_loss: jax.Array, weight: jax.Array) -> jax.Array:
    """Cross entropy on the fused answers plus the weighted distillation loss on the rollouts.

        L = L_SFT + stop_gradient(weight) L_KL

    Args:
        sft_loss, kl_loss, weight: scalars; the losses in nats, the weight from `update_balance`.

    Returns:
        A scalar, nats. The weight carries no gradient.

    RAFT (arXiv:2606.00147), Eq. 12.

    >>> raft_objective(2.0, 0.5, 4.0)
    4.0
    """
    checks.scalar("sft_loss", sft_loss)
    checks.scalar("kl_loss", kl_loss)
    checks.scalar("weight", weight)
    return sft_loss + jax.lax.stop_gradient(weight) * kl_loss
