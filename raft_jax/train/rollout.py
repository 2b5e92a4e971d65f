"""Rollouts: answers that the current student samples in every step (Eq. 6)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp

from raft_jax.config import TrainConfig
from raft_jax.data.batches import token_capacity
from raft_jax.sampling.decode import make_generate
from raft_jax.sharding import platform
from raft_jax.tokens import Batch, Tokens
from raft_jax.train.student import Student


def make_sample_rollout(student: Student, settings: TrainConfig, num_batch_shards: int) -> Callable[..., Tokens]:
    """Builds `sample_rollout(params, teacher_params, batch, key) -> Tokens`.

    `max_tokens` of the result is the largest number of real rollout tokens that a device has in one micro-batch,
    rounded up to one of a few values to limit recompilation. It is None where each of several devices has one row: the
    longest of all rows would decide, which is rarely short, and each value would be another program.
    """
    num_micro_batches, rollout = settings.num_micro_batches, settings.rollout
    rows = settings.batch_size // (num_batch_shards * num_micro_batches)
    # The program runs in every step, so the longer compilation of the unrolled one pays off.
    generate = make_generate(student.model, rollout.max_new_tokens, top_p=rollout.top_p, unroll=platform() == "cpu")

    @jax.jit
    def sample(params, teacher_params, prompt, row_ids, key, temperature):
        tokens = generate(student.forward_params(params, teacher_params), prompt, row_ids, key, temperature)
        counts = jnp.sum(tokens.mask.reshape(num_batch_shards, rows, num_micro_batches, -1), axis=(1, 3))
        return tokens, jnp.max(counts)

    temperature = jnp.float32(rollout.temperature)

    def sample_rollout(params, teacher_params, batch: Batch, key: jax.Array) -> Tokens:
        # Rollouts of all micro-batches are sampled together.
        prompt = replace(batch.prompt, max_tokens=num_micro_batches * batch.prompt.max_tokens)
        tokens, count = sample(params, teacher_params, prompt, batch.row_ids, key, temperature)
        if rows == 1 and num_batch_shards > 1:
            return tokens
        return replace(tokens, max_tokens=token_capacity(int(count), rows * rollout.max_new_tokens))

    return sample_rollout
