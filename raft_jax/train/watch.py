"""Watches the share of rollouts that are cut at the limit: where it grows, the student no longer ends its answers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

EARLY = RECENT = 10  # steps that the first and the current average are of
LEAST = 0.1  # a doubled share below this is not worth a warning


class CutWatch:
    """The average share of cut rollouts in the first and in the last steps.

    Its state is a function of the lines of metrics.jsonl, so a run that goes on decides like an undisturbed one.

    Args:
      lines: the lines of metrics.jsonl so far.
      limit: `train.stop_when_cut_share`; None: never stop.

    Example:
      >>> watch = CutWatch([{"cut_share": 0.1}] * 10, limit=0.5)
      >>> [watch.add({"cut_share": 0.9}) for _ in range(6)][1:3]
      ['rollouts cut at the limit: 26% over the last 10 steps, 10% over the first 10', None]
      >>> watch.reached
      True
    """

    def __init__(self, lines: Iterable[Mapping[str, float]], limit: float | None):
        self._early: list[float] = []
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._limit, self._warned = limit, False
        for line in lines:
            self.add(line)

    @property
    def share(self) -> float:
        """The average over the last steps; 0 before the first."""
        return sum(self._recent) / max(len(self._recent), 1)

    @property
    def reached(self) -> bool:
        """Whether the average over the last 10 steps, if there are so many, has reached the limit."""
        return self._limit is not None and len(self._recent) == RECENT and self.share >= self._limit

    def add(self, line: Mapping[str, float]) -> str | None:
        """Takes the metrics of a step; returns a warning, once, if the share has at least doubled."""
        if "cut_share" not in line:
            return None
        self._recent.append(line["cut_share"])
        if len(self._early) < EARLY:
            self._early.append(line["cut_share"])
            return None
        early = sum(self._early) / EARLY
        if self._warned or self.share < max(2 * early, LEAST):
            return None
        self._warned = True
        shares = f"{self.share:.0%} over the last {RECENT} steps, {early:.0%} over the first {EARLY}"
        return f"rollouts cut at the limit: {shares}"
