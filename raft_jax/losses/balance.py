"""RAFT's objective: cross entropy plus distillation, balanced by the running averages of the two losses."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from raft_jax.losses import checks


class BalanceState(NamedTuple):
    """Running averages of the two losses: the state of `update_balance`."""

    count: jax.Array  # int32 scalar: updates so far (s)
    sft_average: jax.Array  # float32 scalar, not bias-corrected (m_SFT)
    kl_average: jax.Array  # float32 scalar, not bias-corrected (m_KL)

    def corrected(self, *, decay: float | jax.Array = 0.9) -> tuple[jax.Array, jax.Array]:
        """The bias-corrected averages (m / (1 - decay**s)) of SFT and KL; 0 before the first update."""
        power = jnp.asarray(decay, jnp.float32) ** self.count.astype(jnp.float32)
        correction = jnp.where(self.count > 0, 1 - power, 1)
        return self.sft_average / correction, self.kl_average / correction


def init_balance() -> BalanceState:
    """The state before the first step: all zeros."""
    return BalanceState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))


def update_balance(
    state: BalanceState,
    sft_loss: jax.Array,
    kl_loss: jax.Array,
    *,
    decay: float | jax.Array = 0.9,
    epsilon: float | jax.Array = 1e-8,
    floor: float | jax.Array = 1e-9,
    max_weight: float | None = None,
) -> tuple[jax.Array, BalanceState]:
    """Computes the weight λ of the KL term that makes both terms equally large, and updates the running averages.

        m_k = decay m_k + (1 - decay) L_k,    weight = m̂_SFT / (m̂_KL + epsilon),    m̂ = m / (1 - decay**s)

    Call it once per optimiser step with the losses of the whole batch, not once per micro-batch or per device.

    Args:
        state: from `init_balance` or the previous step.
        sft_loss, kl_loss: scalars, nats. If one is not finite, the state is returned unchanged.
        decay: in [0, 1).
        epsilon: > 0, nats.
        floor: >= 0, nats. The weight is 0 while m̂_KL <= floor. A student that still equals its teacher has a KL of
            about 1e-13, from rounding differences between the float32 models; dividing by it would scale the gradient
            of these rounding errors above that of the cross entropy.
        max_weight: > 0. Default: no limit.

    Returns:
        (weight, state): a float32 scalar without gradient, and the next state. The averages include the current
        losses, so the weight of the first step is their ratio. The weight is NaN if a loss is not finite.

    Raises:
        ValueError: a loss is not a scalar or a setting is out of range; raised while tracing. Traced settings are not
            checked.

    RAFT (arXiv:2606.00147), Eqs. 11 and 12.

    >>> weight, state = update_balance(init_balance(), 2.0, 0.5)
    >>> round(float(weight), 4), int(state.count)
    (4.0, 1)
    """
    _check("decay", decay, "in [0, 1)", lambda x: 0 <= x < 1)
    _check("epsilon", epsilon, "> 0", lambda x: x > 0)
    _check("floor", floor, ">= 0", lambda x: x >= 0)
    if max_weight is not None:
        _check("max_weight", max_weight, "> 0", lambda x: x > 0)
    checks.scalar("sft_loss", sft_loss)
    checks.scalar("kl_loss", kl_loss)
    losses = [jax.lax.stop_gradient(jnp.asarray(loss)).astype(jnp.float32) for loss in (sft_loss, kl_loss)]
    finite = jnp.isfinite(losses[0]) & jnp.isfinite(losses[1])
    decay, epsilon, floor = (jnp.asarray(x, jnp.float32) for x in (decay, epsilon, floor))
    averages = [
        jnp.where(finite, decay * old + (1 - decay) * loss, old) for old, loss in zip(state[1:], losses, strict=True)
    ]
    state = BalanceState(state.count + finite.astype(jnp.int32), *averages)
    sft_average, kl_average = state.corrected(decay=decay)
    weight = jnp.where(kl_average <= floor, 0, sft_average / (kl_average + epsilon))
    if max_weight is not None:
        weight = jnp.minimum(weight, jnp.asarray(max_weight, jnp.float32))
    return jnp.where(finite, weight, jnp.nan), state


def raft_objective(sft_loss: jax.Array, kl_loss: jax.Array, weight: jax.Array) -> jax.Array:
    """Cross entropy on the fused answers plus the weighted distillation loss on the rollouts.

        L = L_SFT + stop_gradient(weight) L_KL

    Args:
        sft_loss, kl_loss, weight: scalars; the losses in nats, the weight from `update_balance`.

    Returns:
        A scalar, nats. No gradient flows to the weight.

    Raises:
        ValueError: an argument is not a scalar.

    RAFT (arXiv:2606.00147), Eq. 12.

    >>> raft_objective(2.0, 0.5, 4.0)
    4.0
    """
    checks.scalar("sft_loss", sft_loss)
    checks.scalar("kl_loss", kl_loss)
    checks.scalar("weight", weight)
    return sft_loss + jax.lax.stop_gradient(weight) * kl_loss


def _check(name: str, value, words: str, holds) -> None:
    if not checks.is_traced(value) and not holds(float(value)):
        raise ValueError(f"{name} must be {words}, got {value}")
