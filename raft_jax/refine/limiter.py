"""How many requests an endpoint is sent at once: fewer while it answers 429, more again while it succeeds."""

from __future__ import annotations

import asyncio
import email.utils
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

DECREASE = 0.75  # factor of the limit after a burst of 429
SUCCESSES = 25  # successes in a row after which the limit rises by one
LONGEST_PAUSE = 120.0  # seconds of Retry-After that are obeyed at most


class Limiter:
    """Limits the requests in flight: additive increase, multiplicative decrease.

    A burst of 429s, which are the answers to requests that were in flight together, lowers the limit once.

    Attributes:
      limit: requests that may be in flight now, from 1 to `most`.
      in_flight: requests that are.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic):
        self.most = self.limit = most
        self.in_flight = 0
        self._clock, self._resume_at = clock, 0.0
        self._burst = 0  # number of decreases so far
        self._successes = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[int]:
        """Waits until a request may be sent; yields the number of the burst that it belongs to, for `limited`."""
        await self._wait()
        self.in_flight += 1
        try:
            yield self._burst
        finally:
            self.in_flight -= 1
            self._wake()

    async def _wait(self) -> None:
        while True:
            pause = self._resume_at - self._clock()
            if pause > 0:
                await asyncio.sleep(pause)
            elif self.in_flight < self.limit:
                return
            else:
                turn = asyncio.get_running_loop().create_future()
                self._waiting.append(turn)
                try:
                    await turn
                except asyncio.CancelledError:
                    self._wake()  # the turn may have been given to this request, which does not take it
                    raise

    def _wake(self) -> None:
        """Gives a turn to as many waiting requests as may be sent."""
        free = self.limit - self.in_flight
        while free > 0 and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                free -= 1

    def succeeded(self) -> None:
        """Notes a success."""
        self._successes += 1
        if self._successes >= SUCCESSES:
            self._successes = 0
            self.limit = min(self.most, self.limit + 1)
            self._wake()

    def limited(self, burst: int, retry_after: float | None) -> None:
        """Notes a 429.

        Args:
          burst: what `slot` gave this request; the limit falls only for the first 429 of a burst.
          retry_after: seconds in which nothing more is sent, at most `LONGEST_PAUSE`; None if the server named none.
        """
        self._successes = 0
        if burst == self._burst:
            self._burst += 1
            self.limit = max(1, int(self.limit * DECREASE))
        self.pause(retry_after)

    def pause(self, seconds: float | None) -> None:
        """Sends nothing more for some seconds, at most `LONGEST_PAUSE`."""
        if seconds:
            self._resume_at = max(self._resume_at, self._clock() + min(seconds, LONGEST_PAUSE))


def retry_after(value: str | None, now: float | None = None) -> float | None:
    """The seconds that a Retry-After header asks for, a number or a date; None if there is none, or it says nothing.

    Example:
      >>> retry_after("1.5"), retry_after("Thu, 01 Jan 1970 00:01:00 GMT", now=20), retry_after("soon")
      (1.5, 40.0, None)
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return None
        seconds = date.timestamp() - (time.time() if now is None else now)
    return seconds if 0 <= seconds < float("inf") else None
