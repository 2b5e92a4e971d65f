"""The time of a training step, measured on the first batches without training for good: nothing is saved."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import jax

from raft_jax.config import TrainConfig
from raft_jax.data.batches import TokenRow
from raft_jax.methods import Method
from raft_jax.models import Model
from raft_jax.progress import progress
from raft_jax.sharding import num_shards, put_batch
from raft_jax.train.loop import first_state, jit_train_step, make_batches, optimizer_of
from raft_jax.train.rollout import SampleRollout
from raft_jax.train.schedule import make_schedule
from raft_jax.train.student import make_student


def step_seconds(
    model: Model, rows: Sequence[TokenRow], method: Method, settings: TrainConfig, mesh: jax.sharding.Mesh, steps=3
) -> float:
    """The median time of `steps` steps after a first one, which compiles; in seconds.

    Args:
      model, rows, method, settings, mesh: as for `raft_jax.train.loop.train`.
    """
    with jax.set_mesh(mesh):
        shards = num_shards("batch")
        batches = make_batches(model, rows, settings, seed=0, num_shards=shards)
        student = make_student(model, settings.lora, mesh)
        optimizer = optimizer_of(settings, make_schedule(settings, steps))
        state = first_state(student, optimizer, model.params, jax.random.key(0))
        sample = SampleRollout(student, settings, shards) if method.distils else None
        train_step = jit_train_step(student, optimizer, method, settings)
        seconds = []
        with progress(f"measure {method.name}", steps + 1, "steps") as bar:
            for step in range(steps + 1):
                began = time.perf_counter()
                batch = put_batch(batches.at(step), mesh)
                if sample is not None:
                    batch = batch._replace(rollout=sample(state.params, model.params, batch, jax.random.key(step)))
                state, metrics = train_step(state, model.params, batch)
                jax.block_until_ready(metrics)
                seconds.append(time.perf_counter() - began)
                bar.advance()
    return median(seconds[1:])
