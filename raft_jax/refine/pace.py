"""The speed, retries and cost of work that models do, for the lines that show its progress."""

from __future__ import annotations

import time
from typing import Any


class Pace:
    """What a piece of work has taken since it began, as the note of a progress line.

    Args:
      worker: a generator or a judge. If it has `note()`, that is its state; if it has `cost`, that is what it has cost.
      total: units of work that are left.
    """

    def __init__(self, worker: Any, total: int):
        self._worker, self._total = worker, total
        self._began, self._done, self._tokens = time.perf_counter(), 0, 0
        self._cost_before = getattr(worker, "cost", None)

    def note(self, count: int, num_tokens: int) -> str:
        """The note after `count` more units of work, for which `num_tokens` tokens were generated."""
        self._done += count
        self._tokens += num_tokens
        parts = []
        if self._tokens:
            parts.append(f"{self._tokens / max(time.perf_counter() - self._began, 1e-9):,.0f} tokens/s")
        if state := self._worker.note() if hasattr(self._worker, "note") else "":
            parts.append(state)
        if self._cost_before is not None and self._done:
            cost = self._worker.cost - self._cost_before
            parts.append(f"cost {cost:.4g} of about {cost * self._total / self._done:.4g}")
        return ", ".join(parts)
