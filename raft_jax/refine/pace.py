"""The speed, retries and cost of work that models do, for the lines that show its progress."""

from __future__ import annotations

import time

from raft_jax.refine.chat import Chat


class Pace:
    """What a piece of work has taken since it began, as the note of a progress line.

    Args:
      chat: the model that is asked; None if the work is not done by asking one.
      total: units of work that are left.
    """

    def __init__(self, chat: Chat | None, total: int):
        self._chat, self._total = chat, total
        self._began, self._done, self._tokens = time.perf_counter(), 0, 0
        self._cost_before = chat.cost if chat else None

    def note(self, count: int, num_tokens: int) -> str:
        """The note after `count` more units of work, for which `num_tokens` tokens were generated."""
        self._done += count
        self._tokens += num_tokens
        parts = []
        if self._tokens:
            parts.append(f"{self._tokens / max(time.perf_counter() - self._began, 1e-9):,.0f} tokens/s")
        if self._chat and (state := self._chat.note()):
            parts.append(state)
        if self._chat and self._chat.cost is not None and self._cost_before is not None and self._done:
            cost = self._chat.cost - self._cost_before
            parts.append(f"cost {cost:.4g} of about {cost * self._total / self._done:.4g}")
        return ", ".join(parts)
