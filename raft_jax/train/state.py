"""What training carries from step to step, as one pytree that the caller owns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from raft_jax.losses import BalanceState, init_balance


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The student, its optimiser, and the running averages of the two losses."""

    step: jax.Array  # int32 scalar: updates made
    params: Any
    opt_state: optax.OptState
    balance: BalanceState


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step.

    The state is donated to every step, so `params` must not be shared with a teacher: give it a copy.
    """
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), init_balance())


def make_optimizer(
    learning_rate: float,
    *,
    weight_decay: float = 0.01,
    b1: float = 0.9,
    b2: float = 0.999,
    epsilon: float = 1e-8,
    warmup_steps: int = 0,
    max_gradient_norm: float | None = None,
) -> optax.GradientTransformation:
    """AdamW at a constant rate, after a linear warm-up if one is asked for; norms and biases do not decay."""

    def is_matrix(params):
        # A parameter's name ends in its dimensions; without the layers, a matrix has at least two.
        return {name: len(name.rpartition("_")[2].removeprefix("L")) > 1 and "bias" not in name for name in params}

    schedule = learning_rate
    if warmup_steps:
        schedule = optax.linear_schedule(learning_rate / warmup_steps, learning_rate, warmup_steps - 1)
    adamw = optax.adamw(schedule, b1=b1, b2=b2, eps=epsilon, weight_decay=weight_decay, mask=is_matrix)
    if max_gradient_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(max_gradient_norm), adamw)


def state_shardings(state: TrainState, parameter_shardings: dict[str, NamedSharding]) -> TrainState:
    """The layout of a whole state: optimiser moments lie as their parameters do, everything else on every device.

    Args:
      state: arrays or `jax.ShapeDtypeStruct`.
      parameter_shardings: of each parameter, by name.
    """
    mesh = next(iter(parameter_shardings.values())).mesh
    replicated = NamedSharding(mesh, PartitionSpec())

    def of(path, _):
        names = (getattr(entry, "key", None) for entry in reversed(path))
        return next((parameter_shardings[name] for name in names if name in parameter_shardings), replicated)

    return jax.tree_util.tree_map_with_path(of, state)
