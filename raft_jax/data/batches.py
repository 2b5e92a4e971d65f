"""`batch_at(step)`: tokenised rows in fixed shapes, a pure function of the step on any number of hosts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from raft_jax.errors import InputError


class Batch(NamedTuple):
    """One training batch; prompts padded on the left, answers on the right. Masks are True on real tokens."""

    prompt_BP: np.ndarray  # int32
    prompt_mask_BP: np.ndarray
    answer_BA: np.ndarray  # int32, the end-of-turn token among them
    answer_mask_BA: np.ndarray
    teacher_prompt_BQ: np.ndarray  # int32
    teacher_prompt_mask_BQ: np.ndarray
    row_B: np.ndarray  # int32: names the row's stream of random numbers


class Room(NamedTuple):
    """How many real tokens the rows of one (micro-)batch on one part of the mesh hold at most.

    What all prompts begin with, as most chat templates do, counts once.
    """

    prompt: int
    answer: int
    teacher_prompt: int
    rollout: int = 0
    shared_prompt: int = 0  # how many tokens that is
    shared_teacher_prompt: int = 0

    def with_rollout(self, count: int, capacity: int) -> Room:
        """With room for `count` tokens of rollouts, in quarters of all they may have: few sizes, few programs.

        Example:
          >>> Room(8, 16, 24).with_rollout(count=130, capacity=256).rollout
          192
        """
        quarter = -(-capacity // 4)
        return self._replace(rollout=min(-(-count // quarter) * quarter, capacity))


@dataclass(frozen=True)
class TokenRow:
    """One example as ids: what the student sees, what it should say, and what the teacher sees."""

    prompt: list[int]
    answer: list[int]
    teacher_prompt: list[int]
    number: int

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer) + len(self.teacher_prompt)


def pad(rows: Sequence[Sequence[int]], length: int, pad_id: int, *, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[B, length]` int32 and their mask, padded on one side.

    Example:
      >>> tokens, mask = pad([[5, 6], [7]], 3, 0, left=True)
      >>> tokens.tolist(), mask.astype(int).tolist()
      ([[0, 5, 6], [0, 0, 7]], [[0, 1, 1], [0, 0, 1]])
    """
    tokens, mask = np.full((len(rows), length), pad_id, np.int32), np.zeros((len(rows), length), bool)
    for index, row in enumerate(rows):
        if len(row) > length:
            raise ValueError(f"row {index} has {len(row)} tokens, and the length is {length}")
        place = slice(length - len(row), None) if left else slice(0, len(row))
        tokens[index, place], mask[index, place] = row, True
    return tokens, mask


class Batches:
    """Shuffled epochs over rows, in batches of one size.

    Rows are sorted into `length_buckets` classes of about equal size; a batch draws from one class and is padded to
    its class's longest row, so the number of shapes is the number of classes. In each epoch every row is in one batch,
    except the remainder of `len(rows) / batch_size`. That remainder rotates through all rows, whatever their
    lengths, so that after any number of epochs no row was used more than once more than another. The rows of a class
    that do not fill a batch go to the next longer class.
    """

    def __init__(self, rows: Sequence[TokenRow], batch_size: int, *, seed: int, pad_id: int, length_buckets: int = 1):
        if len(rows) < batch_size:
            raise InputError(f"{len(rows)} rows do not fill one batch of {batch_size}; lower train.batch_size")
        self.rows, self.batch_size, self.seed, self.pad_id = list(rows), batch_size, seed, pad_id
        order = sorted(range(len(rows)), key=lambda index: rows[index].length)
        self._classes = [part.tolist() for part in np.array_split(order, length_buckets) if len(part)]
        self._shapes = []
        for number in range(len(self._classes)):
            # A class's batches may hold rows of every shorter one.
            members = [rows[index] for part in self._classes[: number + 1] for index in part]
            self._shapes.append(tuple(
                _round_up(max(len(getattr(row, name)) for row in members))
                for name in ("prompt", "answer", "teacher_prompt")
            ))
        self._epoch: tuple[int, list[tuple[int, list[int]]]] = (-1, [])

    @property
    def steps_per_epoch(self) -> int:
        return len(self.rows) // self.batch_size

    def at(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        epoch, index = divmod(step, self.steps_per_epoch)
        number, members = self._planned(epoch)[index]
        P, A, Q = self._shapes[number]
        rows = [self.rows[member] for member in members]
        return Batch(
            *pad([row.prompt for row in rows], P, self.pad_id, left=True),
            *pad([row.answer for row in rows], A, self.pad_id, left=False),
            *pad([row.teacher_prompt for row in rows], Q, self.pad_id, left=True),
            np.array([row.number for row in rows], np.int32),
        )

    def rooms(
        self, num_steps: int, num_parts: int = 1, num_micro_batches: int = 1, share: bool = True
    ) -> list[Room] | None:
        """The room that each step's batch needs: the largest of its class, so that a class remains one program.

        Args:
          num_steps: of the whole run.
          num_parts: into how many runs of rows the mesh cuts a batch.
          num_micro_batches: M of them; rows m, m + M, ... are one.
          share: whether what all prompts begin with may be computed once.

        Returns:
          A Room a step, without the rollout's; None where rows do not divide evenly.
        """
        if self.batch_size % (num_parts * num_micro_batches):
            return None
        names = ("prompt", "answer", "teacher_prompt")
        shared = np.array([
            shared_prefix([getattr(row, name) for row in self.rows]) if share and name != "answer" else 0
            for name in names
        ])
        rows_per_cell = self.batch_size // (num_parts * num_micro_batches)
        needed = [np.zeros(len(names), int) for _ in self._classes]
        classes = []
        for step in range(num_steps):
            epoch, index = divmod(step, self.steps_per_epoch)
            number, members = self._planned(epoch)[index]
            lengths = [[len(getattr(self.rows[member], name)) for name in names] for member in members]
            cells = np.reshape(lengths, (num_parts, -1, num_micro_batches, len(names))).sum(axis=1)
            needed[number] = np.maximum(needed[number], cells.max(axis=(0, 1)))
            classes.append(number)
        again = (rows_per_cell - 1) * shared
        rooms = [
            Room(*map(_round_up, (count - again).tolist()), 0, int(shared[0]), int(shared[2])) for count in needed
        ]
        return [rooms[number] for number in classes]

    def _planned(self, epoch: int) -> list[tuple[int, list[int]]]:
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._plan(epoch))
        return self._epoch[1]

    def _plan(self, epoch: int) -> list[tuple[int, list[int]]]:
        """The batches of one epoch: the class whose shape each has, and its rows."""
        random = np.random.default_rng([self.seed, epoch])
        num_rows = len(self.rows)
        num_unused = num_rows % self.batch_size
        rotation = np.random.default_rng(self.seed).permutation(num_rows)
        unused = set(rotation[(epoch * num_unused + np.arange(num_unused)) % num_rows].tolist())
        batches, left_over = [], []
        for number, members in enumerate(self._classes):
            members = left_over + [row for row in random.permutation(members).tolist() if row not in unused]
            full = len(members) // self.batch_size * self.batch_size
            batches += [(number, members[start : start + self.batch_size]) for start in range(0, full, self.batch_size)]
            left_over = members[full:]
        return [batches[index] for index in random.permutation(len(batches))]


def shared_prefix(rows: Sequence[list[int]]) -> int:
    """With how many equal tokens all rows begin.

    Example:
      >>> shared_prefix([[1, 2, 3], [1, 2, 4, 5]])
      2
    """
    lowest, highest = min(rows), max(rows)  # all others lie between them
    return next((i for i, pair in enumerate(zip(lowest, highest, strict=False)) if pair[0] != pair[1]), len(lowest))


def _round_up(length: int, multiple: int = 8) -> int:
    return -(-length // multiple) * multiple
