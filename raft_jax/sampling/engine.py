"""Generation for many prompts with a few compiled shapes: the engine of rewriting, rollouts and evaluation."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from raft_jax.data.batches import pad
from raft_jax.models import Model
from raft_jax.sampling.decode import make_generate
from raft_jax.sharding import put_batch, to_host, use_mesh
from raft_jax.tokens import Tokens

# Prompt lengths are rounded up to one of these, so that a run compiles only a few programs.
LENGTH_BUCKETS = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)


@dataclass(frozen=True)
class Completion:
    """One generated answer: its tokens, including a stop token, and whether it ended with a stop token."""

    tokens: list[int]
    finished: bool


def bucket(length: int) -> int:
    """The smallest bucket that holds a length.

    Example:
      >>> bucket(65)
      96
    """
    for size in LENGTH_BUCKETS:
        if length <= size:
            return size
    return -(-length // 8192) * 8192


def row_number(name: str) -> int:
    """The id of a row's random stream, from the row's name: the same in every run and every batch."""
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


def rows_per_batch(batch_size: int, num_prompts: int, mesh: jax.sharding.Mesh | None) -> int:
    """Rows per batch: `batch_size`, or `num_prompts` if smaller, rounded up to a multiple of the mesh's batch axes."""
    parts = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-min(batch_size, num_prompts) // parts) * parts


class Sampler:
    """Generates answers to prompts, batch by batch.

    Batches are formed from the prompts in order of length, so a call's shapes and results depend on its arguments only:
    the same key gives the same tokens.
    """

    def __init__(self, model: Model, batch_size: int = 32, mesh: jax.sharding.Mesh | None = None):
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be at least 1")
        self.model = model
        self.batch_size = batch_size
        self.mesh = mesh
        self._compiled: dict[tuple[int, float], Callable[..., Tokens]] = {}

    def program(self, max_new_tokens: int, top_p: float = 1.0) -> Callable[..., Tokens]:
        """The jitted sampler for one output length and top_p (see make_generate)."""
        found = (max_new_tokens, top_p)
        if found not in self._compiled:
            self._compiled[found] = make_generate(self.model, max_new_tokens, top_p=top_p)
        return self._compiled[found]

    def batches(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Indices of the prompts in batches of `batch_size` (the last may be smaller), shortest prompts first."""
        order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    def generate(
        self,
        params,
        prompts: Sequence[Sequence[int]],
        *,
        key: jax.Array,
        names: Sequence[str] | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int,
        on_batch: Callable[[list[int], list[Completion]], None] | None = None,
    ) -> list[Completion]:
        """One completion per prompt.

        Args:
          params: the model's parameters.
          prompts: token ids.
          key: random key of the whole call.
          names: the rows' names, which select their random streams; default: their indices.
          temperature: 0 is greedy.
          top_p: 1 samples from the whole vocabulary.
          max_new_tokens: maximum length of a completion.
          on_batch: called after each batch with the rows' indices and completions.

        Raises:
          ValueError: an empty prompt, or one that with max_new_tokens exceeds the model's positions.
        """
        names = [str(index) for index in range(len(prompts))] if names is None else names
        limit = self.model.config.max_positions - max_new_tokens
        for name, prompt in zip(names, prompts, strict=True):
            if not prompt:
                raise ValueError(f"prompt {name} is empty")
            if len(prompt) > limit:
                raise ValueError(
                    f"prompt {name} has {len(prompt)} tokens; with max_new_tokens {max_new_tokens} the model's "
                    f"{self.model.config.max_positions} positions leave room for {limit}"
                )
        completions: list[Completion | None] = [None] * len(prompts)
        num_rows = rows_per_batch(self.batch_size, len(prompts), self.mesh)
        for batch in self.batches(prompts):
            rollout = self._run(params, prompts, batch, num_rows, names, key, temperature, top_p, max_new_tokens)
            tokens, mask = to_host(rollout.ids), to_host(rollout.mask)
            for row, index in enumerate(batch):
                ids = tokens[row][mask[row]].tolist()
                completions[index] = Completion(ids, ids[-1] in self.model.tokenizer.stop_ids)
            if on_batch:
                on_batch(batch, [completions[index] for index in batch])
        return completions

    def _run(self, params, prompts, batch, num_rows, names, key, temperature, top_p, max_new_tokens) -> Tokens:
        filler = num_rows - len(batch)
        rows = [prompts[index] for index in batch] + [prompts[batch[0]]] * filler
        length = min(bucket(max(map(len, rows))), self.model.config.max_positions - max_new_tokens)
        prompt = pad(rows, length, self.model.tokenizer.pad_id, left=True)
        numbers = np.array([row_number(names[index]) for index in batch] + [-1] * filler, np.int32)
        arrays = (prompt, numbers)
        if self.mesh is not None:
            arrays = put_batch(arrays, self.mesh)
        with use_mesh(self.mesh):
            return self.program(max_new_tokens, top_p)(params, *arrays, key, jnp.float32(temperature))
