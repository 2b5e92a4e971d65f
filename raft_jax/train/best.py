"""Keeps the student of the step with the best score on the dev rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from raft_jax.checkpoint import Checkpoints
from raft_jax.train.student import Params

SCORE = "dev_gold_logprob"  # higher is better


class BestStep:
    """The trained parameters of the best step so far, on disk.

    Args:
      folder: receives the parameters.
      unpadded: see `raft_jax.checkpoint.Checkpoints`.
      lines: the lines of metrics.jsonl so far.
    """

    def __init__(self, folder: Path, unpadded: Callable, lines: Iterable[Mapping[str, float]]):
        self._checkpoints = Checkpoints(folder, 1, unpadded)
        self._score = max((line[SCORE] for line in lines if SCORE in line), default=-math.inf)

    def offer(self, step: int, score: float, params: Params) -> None:
        """Saves the parameters of a step whose score is better than that of every step before."""
        if score <= self._score:
            return
        self._score = score
        # A run that goes on at an earlier step computes the step again that is saved already, to the same numbers.
        if step > (self._checkpoints.newest or 0):
            self._checkpoints.save(step, params)
            self._checkpoints.wait()  # the line with its score, written next, says that it is on disk

    def restore(self, params: Params) -> tuple[int, Params] | None:
        """The best step and its parameters, None if no step was scored; `params` have the same shapes and shardings."""
        return self._checkpoints.restore(params)
