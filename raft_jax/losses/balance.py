"""Two losses kept at the same weight by their running averages."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from raft_jax.losses import checks


class BalanceState(NamedTuple):
    """Running averages of the two losses: what `update_balance` carries from step to step."""

    count: jax.Array  # int32 scalar: updates so far (s)
    sft_average: jax.Array  # float32 scalar, not bias-corrected (m_SFT)
    kl_average: jax.Array  # float32 scalar, not bias-corrected (m_KL)

    def corrected(self, *, decay: float = 0.9) -> tuple[jax.Array, jax.Array]:
        """The bias-corrected averages (m / (1 - decay**s)) of SFT and KL; 0 before the first update."""
        correction = jnp.where(self.count > 0, 1 - jnp.asarray(decay, jnp.float32) ** self.count, 1)
        return self.sft_average / correction, self.kl_average / correction


def init_balance() -> BalanceState:
    """Averages before the first step: all zero."""
    return BalanceState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))


def update_balance(
    state: BalanceState,
    sft_loss: jax.Array,
    kl_loss: jax.Array,
    *,
    decay: float = 0.9,
    epsilon: float = 1e-8,
    floor: float = 1e-9,
) -> tuple[jax.Array, BalanceState]:
    """Weight of the KL term at which both terms weigh the same, and the averages behind it.

        m_k = decay m_k + (1 - decay) L_k,    weight = m̂_SFT / (m̂_KL + epsilon),    m̂ = m / (1 - decay**s)

    Args:
        state: from `init_balance` or the previous step.
        sft_loss, kl_loss: scalars, nats, of the whole batch (not of a micro-batch or of one device).
        decay: in [0, 1).
        epsilon: > 0, nats.
        floor: >= 0, nats. While m̂_KL is no more than this the weight is 0: so much is left of a KL of 0 where float32
            models round differently (a student that still is its teacher, cut over devices), and the ratio would
            make a gradient of it that drowns cross entropy's.

    Returns:
        (weight, state): a float32 scalar that carries no gradient, and the next state. The current losses
        are in the averages, so at the first step the weight is their ratio.

    RAFT (arXiv:2606.00147), Eqs. 11 and 12.

    >>> weight, state = update_balance(init_balance(), 2.0, 0.5)
    >>> round(float(weight), 4), int(state.count)
    (4.0, 1)
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay}")
    if not epsilon > 0:
        raise ValueError(f"epsilon must be > 0, got {epsilon}")
    if not floor >= 0:
        raise ValueError(f"floor must be >= 0, got {floor}")
    checks.scalar("sft_loss", sft_loss)
    checks.scalar("kl_loss", kl_loss)

    def average(old: jax.Array, loss: jax.Array) -> jax.Array:
        return decay * old + (1 - decay) * jax.lax.stop_gradient(jnp.asarray(loss, jnp.float32))

    state = BalanceState(state.count + 1, average(state.sft_average, sft_loss), average(state.kl_average, kl_loss))
    sft_average, kl_average = state.corrected(decay=decay)
    return jnp.where(kl_average <= floor, 0, sft_average / (kl_average + epsilon)), state
