"""Rollouts: answers that the current student samples in every step (Eq. 6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from raft_jax.config import TrainConfig
from raft_jax.data.batches import token_capacities, token_capacity
from raft_jax.sampling.decode import make_generate
from raft_jax.tokens import Batch, Tokens
from raft_jax.train.compiled import CompiledFunction
from raft_jax.train.student import Student


class SampleRollout:
    """Samples the rollout of a batch.

    `max_tokens` of the result is the largest number of real rollout tokens that a device has in one micro-batch,
    rounded up to one of a few values to limit recompilation. It is None where each of several devices has one row: the
    longest of all rows would decide, which is rarely short, and each value would be another program.
    """

    def __init__(self, student: Student, settings: TrainConfig, num_batch_shards: int):
        self._num_micro_batches, self._max_new_tokens = settings.num_micro_batches, settings.rollout.max_new_tokens
        self._rows = settings.batch_size // (num_batch_shards * settings.num_micro_batches)
        self._most = self._rows * self._max_new_tokens
        counts = self._rows > 1 or num_batch_shards == 1
        self.capacities = token_capacities(self._most) if counts else [None]  # values of max_tokens
        # The program runs in every step, so the longer compilation of the unrolled one pays off.
        generate = make_generate(student.model, self._max_new_tokens, top_p=settings.rollout.top_p, unroll=True)

        @student.model.jit
        def sample(params, teacher_params, prompt, row_ids, key, temperature):
            with jax.named_scope("rollout"):
                tokens = generate(student.forward_params(params, teacher_params), prompt, row_ids, key, temperature)
            shape = (num_batch_shards, self._rows, self._num_micro_batches, -1)
            return tokens, jnp.max(jnp.sum(tokens.mask.reshape(shape), axis=(1, 3)))

        self.sample = CompiledFunction(sample)
        self._temperature = np.float32(settings.rollout.temperature)

    def arguments(self, params, teacher_params, batch: Batch, key: jax.Array) -> tuple:
        """The arguments of `sample`."""
        # Rollouts of all micro-batches are sampled together.
        prompt = replace(batch.prompt, max_tokens=self._num_micro_batches * batch.prompt.max_tokens)
        return params, teacher_params, prompt, batch.row_ids, key, self._temperature

    def __call__(
        self, params, teacher_params, batch: Batch, key: jax.Array, meanwhile: Callable[[], None] = lambda: None
    ) -> Tokens:
        """The rollout. `meanwhile` is called once the sampling is dispatched, before anything waits for it."""
        tokens, count = self.sample(*self.arguments(params, teacher_params, batch, key))
        meanwhile()
        if self.capacities == [None]:
            return tokens
        return replace(tokens, max_tokens=token_capacity(int(count), self._most))

    def results(self, *arguments) -> list[Tokens]:
        """The results that can occur, as `jax.ShapeDtypeStruct`, once the program for these arguments is compiled."""
        sharding, _ = self.sample.program(*arguments).output_shardings
        shape = (arguments[3].shape[0], self._max_new_tokens)
        tokens = Tokens(
            jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding.ids),
            jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=sharding.mask),
        )
        return [replace(tokens, max_tokens=capacity) for capacity in self.capacities]
