"""The programs of a training step: the rollout, if the method has one, and the train step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from raft_jax.progress import progress
from raft_jax.sharding import put_batch
from raft_jax.tokens import Batch
from raft_jax.train.compiled import CompiledFunction, compile_ahead
from raft_jax.train.rollout import SampleRollout
from raft_jax.train.state import TrainState
from raft_jax.train.step_metrics import StepMetrics


def compiles_ahead(mesh: Mesh) -> bool:
    """Whether all programs are compiled before the first step: on TPU and GPU.

    On a CPU each is compiled when it is first needed. Compiling takes the cores that training would use, and of the
    four train steps of a length bucket, for rollouts of different numbers of tokens, a short run needs one or two.
    """
    return mesh.devices.flat[0].platform != "cpu"


@dataclass(frozen=True)
class StepPrograms:
    """The functions of a run's steps.

    Attributes:
      sample_rollout: None for a method without rollouts.
      train_step: of the state, the teacher's parameters and a batch; see `jit_train_step`.
      mesh: the devices that batches are sharded over.
    """

    sample_rollout: SampleRollout | None
    train_step: CompiledFunction
    mesh: Mesh

    @property
    def functions(self) -> list[CompiledFunction]:
        """The functions whose programs run in a step."""
        return [self.train_step] if self.sample_rollout is None else [self.sample_rollout.sample, self.train_step]

    def compile(self, state: TrainState, teacher_params, host_batches: Sequence[Batch], key, title: str) -> None:
        """Compiles every program that batches of these shapes can need.

        Rollouts come first, as the shardings of what they return are part of the step's shapes.
        """
        batches = [put_batch(batch, self.mesh) for batch in host_batches]
        if self.sample_rollout is None:
            with progress(title, len(batches), "programs") as bar:
                compile_ahead([(self.train_step, (state, teacher_params, batch)) for batch in batches], bar.advance)
            return
        sample = self.sample_rollout
        arguments = [sample.arguments(state.params, teacher_params, batch, key) for batch in batches]
        with progress(title, len(batches) * (1 + len(sample.capacities)), "programs") as bar:
            compile_ahead([(sample.sample, sample_arguments) for sample_arguments in arguments], bar.advance)
            compile_ahead(
                [
                    (self.train_step, (state, teacher_params, batch._replace(rollout=rollout)))
                    for batch, sample_arguments in zip(batches, arguments, strict=True)
                    for rollout in sample.results(*sample_arguments)
                ],
                bar.advance,
            )

    def dispatch(
        self, state: TrainState, teacher_params, host_batch: Batch, key: jax.Array, steps: StepMetrics
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Puts a step's work on the devices, and reads the metrics of the step before as soon as they have some."""
        batch = put_batch(host_batch, self.mesh)
        if self.sample_rollout is None:
            state, metrics = self.train_step(state, teacher_params, batch)
            steps.read()
            return state, metrics
        rollout = self.sample_rollout(state.params, teacher_params, batch, key, meanwhile=steps.read)
        if complete := rollout.max_tokens is not None:  # the number of its tokens has been waited for
            steps.rollout_sampled()
        state, metrics = self.train_step(state, teacher_params, batch._replace(rollout=rollout))
        if not complete:
            jax.block_until_ready(rollout)
            steps.rollout_sampled()
        return state, metrics
