"""Tokenised rows as batches of fixed shapes: `Batches.at` is a pure function of the step on any number of hosts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from raft_jax.errors import InputError
from raft_jax.tokens import Batch, Tokens

SIDES = ("prompt", "answer", "teacher_prompt")


@dataclass(frozen=True)
class TokenRow:
    """One example as token ids: the student's prompt, the answer to train on, and the teacher's prompt."""

    prompt: list[int]
    answer: list[int]
    teacher_prompt: list[int]
    number: int

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer) + len(self.teacher_prompt)


def pad(rows: Sequence[Sequence[int]], length: int, pad_id: int, *, left: bool) -> Tokens:
    """Pads rows to `length` on one side and returns them as NumPy arrays.

    Example:
      >>> tokens = pad([[5, 6], [7]], 3, 0, left=True)
      >>> tokens.ids.tolist(), tokens.mask.astype(int).tolist()
      ([[0, 5, 6], [0, 0, 7]], [[0, 1, 1], [0, 0, 1]])
    """
    ids, mask = np.full((len(rows), length), pad_id, np.int32), np.zeros((len(rows), length), bool)
    for index, row in enumerate(rows):
        if len(row) > length:
            raise ValueError(f"row {index} has {len(row)} tokens, and the length is {length}")
        columns = slice(length - len(row), None) if left else slice(0, len(row))
        ids[index, columns], mask[index, columns] = row, True
    return Tokens(ids, mask)  # pyright: ignore[reportArgumentType]  # NumPy until put on devices


class Batches:
    """Shuffled epochs over rows, in batches of one size.

    Rows are sorted by length into `length_buckets` buckets of about equal size. A batch belongs to one bucket and is
    padded to the bucket's longest row, so there are as many shapes as buckets. Rows that do not fill a batch in their
    bucket move to the next longer one. In each epoch every row is in one batch, except for the remainder of
    `len(rows) / batch_size`. This remainder rotates through all rows, regardless of length: after any number of epochs,
    the numbers of times that two rows have been used differ by at most one.
    """

    def __init__(
        self,
        rows: Sequence[TokenRow],
        batch_size: int,
        *,
        seed: int,
        pad_id: int,
        length_buckets: int = 1,
        epochs: float = 1,
        num_shards: int = 1,
        num_micro_batches: int = 1,
        share_prefixes: bool = True,
        length_multiple: int = 8,
    ):
        """
        Args:
          epochs: the number of epochs of the run. `max_tokens` is large enough for every batch of a bucket in these
            epochs, so that each bucket compiles to one program.
          num_shards: the number of shards, each of consecutive rows, that the mesh divides a batch into.
          num_micro_batches: M; micro-batch m has the rows m, m + M, ...
          share_prefixes: whether tokens that all prompts begin with may be computed once.
          length_multiple: lengths of rows are rounded up to a multiple of this (see raft_jax.sharding.length_multiple).
        """
        if len(rows) < batch_size:
            raise InputError(f"{len(rows)} rows do not fill one batch of {batch_size}; lower train.batch_size")
        if batch_size % (num_shards * num_micro_batches):
            raise InputError(
                f"train.batch_size {batch_size} does not divide over {num_shards} shards of the mesh in "
                f"{num_micro_batches} micro-batches; make it a multiple of {num_shards * num_micro_batches}"
            )
        self.rows, self.batch_size, self.seed, self.pad_id = list(rows), batch_size, seed, pad_id
        order = sorted(range(len(rows)), key=lambda index: rows[index].length)
        self._buckets = [part.tolist() for part in np.array_split(order, length_buckets) if len(part)]
        self._lengths = []
        for number in range(len(self._buckets)):
            # A batch may also hold rows left over from any shorter bucket.
            members = [rows[index] for part in self._buckets[: number + 1] for index in part]
            longest = [max(len(getattr(row, name)) for row in members) for name in SIDES]
            self._lengths.append([_round_up(length, length_multiple) for length in longest])
        self._epoch: tuple[int, list[tuple[int, list[int]]]] = (-1, [])
        self._shared = [
            shared_prefix([getattr(row, name) for row in rows]) if share_prefixes and name != "answer" else 0
            for name in SIDES
        ]
        self._max_tokens = self._most_tokens(math.ceil(epochs), num_shards, num_micro_batches)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.rows) // self.batch_size

    def at(self, step: int) -> Batch:
        """The batch of a step, counted from 0, without a rollout."""
        epoch, index = divmod(step, self.steps_per_epoch)
        number, members = self._planned(epoch)[index]
        rows = [self.rows[member] for member in members]
        prompt, answer, teacher_prompt = (
            replace(
                pad([getattr(row, name) for row in rows], length, self.pad_id, left=name != "answer"),
                max_tokens=max_tokens,
                shared_prefix=shared,
            )
            for name, length, max_tokens, shared in zip(
                SIDES, self._lengths[number], self._max_tokens[number], self._shared, strict=True
            )
        )
        row_ids = np.array([row.number for row in rows], np.int32)
        return Batch(prompt, answer, teacher_prompt, row_ids)  # pyright: ignore[reportArgumentType]

    def one_of_each_shape(self, steps: range) -> list[Batch]:
        """A batch of each shape that the batches of these steps have."""
        first: dict[int, int] = {}
        for step in steps:
            epoch, index = divmod(step, self.steps_per_epoch)
            first.setdefault(self._planned(epoch)[index][0], step)
            if len(first) == len(self._buckets):
                break
        return [self.at(step) for step in first.values()]

    def _most_tokens(self, num_epochs: int, num_shards: int, num_micro_batches: int) -> list[list[int]]:
        """For each bucket, the most real tokens of prompt, answer and teacher prompt that one shard has in one
        micro-batch. A shared prefix counts once."""
        most = np.zeros((len(self._buckets), len(SIDES)), int)
        for epoch in range(num_epochs):
            for number, members in self._planned(epoch):
                lengths = [[len(getattr(self.rows[member], name)) for name in SIDES] for member in members]
                counts = np.reshape(lengths, (num_shards, -1, num_micro_batches, len(SIDES))).sum(axis=1)
                most[number] = np.maximum(most[number], counts.max(axis=(0, 1)))
        repeated = (self.batch_size // (num_shards * num_micro_batches) - 1) * np.array(self._shared)
        return [[_round_up(count) for count in counts] for counts in np.maximum(most - repeated, 0).tolist()]

    def _planned(self, epoch: int) -> list[tuple[int, list[int]]]:
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._plan(epoch))
        return self._epoch[1]

    def _plan(self, epoch: int) -> list[tuple[int, list[int]]]:
        """The batches of one epoch, each as (bucket that determines its shape, indices of its rows)."""
        random = np.random.default_rng([self.seed, epoch])
        num_rows = len(self.rows)
        num_unused = num_rows % self.batch_size
        rotation = np.random.default_rng(self.seed).permutation(num_rows)
        unused = set(rotation[(epoch * num_unused + np.arange(num_unused)) % num_rows].tolist())
        batches, left_over = [], []
        for number, members in enumerate(self._buckets):
            members = left_over + [row for row in random.permutation(members).tolist() if row not in unused]
            full = len(members) // self.batch_size * self.batch_size
            batches += [(number, members[start : start + self.batch_size]) for start in range(0, full, self.batch_size)]
            left_over = members[full:]
        return [batches[index] for index in random.permutation(len(batches))]


def shared_prefix(rows: Sequence[list[int]]) -> int:
    """The number of leading tokens that all rows have in common.

    Example:
      >>> shared_prefix([[1, 2, 3], [1, 2, 4, 5]])
      2
    """
    lowest, highest = min(rows), max(rows)  # in lexicographic order, all other rows are between these
    return next((i for i, pair in enumerate(zip(lowest, highest, strict=False)) if pair[0] != pair[1]), len(lowest))


def token_capacity(count: int, most: int) -> int:
    """Rounds `count` up to a multiple of a quarter of `most`, so that few sizes, and few programs, occur.

    Example:
      >>> token_capacity(130, most=256)
      192
    """
    quarter = -(-most // 4)
    return min(-(-count // quarter) * quarter, most)


def token_capacities(most: int) -> list[int]:
    """The values of `token_capacity`.

    Example:
      >>> token_capacities(256), token_capacities(2)
      ([64, 128, 192, 256], [1, 2])
    """
    quarter = -(-most // 4)
    return list(dict.fromkeys(token_capacity(number * quarter, most) for number in range(1, 5)))


def _round_up(length: int, multiple: int = 8) -> int:
    return -(-length // multiple) * multiple
