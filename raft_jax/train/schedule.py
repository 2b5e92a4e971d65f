"""The learning rate of each step: optax's schedules, by name, after a linear warm-up."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from raft_jax.config import TrainConfig


def make_schedule(settings: TrainConfig, num_steps: int) -> float | optax.Schedule:
    """The learning rate as optax takes it: a number, or a function of the number of updates so far.

    With w warm-up steps of n, step s = 0, 1, ... has the rate

        s < w:   learning_rate (s + 1) / w
        s >= w:  constant: learning_rate
                 linear:   final + (learning_rate - final) (1 - t),    t = (s - w) / (n - w)
                 cosine:   final + (learning_rate - final) (1 + cos(pi t)) / 2

    so that `final_learning_rate` would be that of step n, after the last one. A constant rate without warm-up is a
    number: then the optimiser's state has no counter, as in checkpoints from before there were schedules.

    Example:
      >>> schedule = make_schedule(TrainConfig(learning_rate=1.0, schedule="linear", warmup_steps=2), num_steps=6)
      >>> [round(float(schedule(step)), 2) for step in range(6)]
      [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    rate, final, warmup = settings.learning_rate, settings.final_learning_rate, settings.warmup_steps
    num_decaying = max(num_steps - warmup, 1)
    if settings.schedule == "constant":
        if not warmup:
            return rate
        after = optax.constant_schedule(rate)
    elif settings.schedule == "linear":
        after = optax.linear_schedule(rate, final, num_decaying)
    else:
        after = optax.cosine_decay_schedule(rate, num_decaying, alpha=final / rate)
    if not warmup:
        return after
    rising = optax.linear_schedule(rate / warmup, rate, warmup - 1) if warmup > 1 else optax.constant_schedule(rate)
    return optax.join_schedules([rising, after], [warmup])


def learning_rates(schedule: float | optax.Schedule, num_steps: int) -> np.ndarray:
    """The rate of each step, `[num_steps]`, as the optimiser has it."""
    if not callable(schedule):
        return np.full(num_steps, schedule)
    return np.asarray(jax.vmap(schedule)(jnp.arange(num_steps)))
