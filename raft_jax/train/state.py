"""The training state: one pytree, owned by the caller and passed from step to step."""

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
    """The student's parameters, the optimiser's state, and the running averages of the two losses."""

    step: jax.Array  # int32 scalar: number of updates so far
    params: Any
    opt_state: optax.OptState
    balance: BalanceState


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step.

    The state is donated to every step, so `params` must not share buffers with a teacher: pass a copy.
    """
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), init_balance())


def is_matrix(name: str) -> bool:
    """Whether a parameter is a weight matrix (or one per layer), by its name, which ends in its dimensions.

    Example:
      >>> [is_matrix(name) for name in ("query_LDNH", "embedding_VD", "attention_norm_LD", "query_bias_LNH")]
      [True, True, False, False]
    """
    return len(name.rpartition("_")[2].removeprefix("L")) > 1 and "bias" not in name


def make_optimizer(
    learning_rate: float | optax.Schedule,
    *,
    weight_decay: float = 0.01,
    b1: float = 0.9,
    b2: float = 0.999,
    epsilon: float = 1e-8,
    max_gradient_norm: float | None = None,
) -> optax.GradientTransformation:
    """AdamW. Norms and biases have no weight decay."""

    def decays(params):
        return {name: is_matrix(name) for name in params}

    adamw = optax.adamw(learning_rate, b1=b1, b2=b2, eps=epsilon, weight_decay=weight_decay, mask=decays)
    if max_gradient_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(max_gradient_norm), adamw)


def state_shardings(state: TrainState, parameter_shardings: dict[str, NamedSharding]) -> TrainState:
    """Shardings of a whole state: optimiser moments are sharded like their parameters, everything else is replicated.

    Args:
      state: arrays or `jax.ShapeDtypeStruct`.
      parameter_shardings: the sharding of each parameter, by name.
    """
    mesh = next(iter(parameter_shardings.values())).mesh
    replicated = NamedSharding(mesh, PartitionSpec())

    def of(path, _):
        names = (getattr(entry, "key", None) for entry in reversed(path))
        return next((parameter_shardings[name] for name in names if name in parameter_shardings), replicated)

    return jax.tree_util.tree_map_with_path(of, state)
