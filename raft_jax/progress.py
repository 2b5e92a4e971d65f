"""Progress of long work: on a terminal a bar with speed and remaining time, in a log plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from raft_jax import interrupt

PLAIN_EVERY = 10.0  # seconds between lines in a log


class _Plain:
    """Lines for a log: at the start, about every ten seconds, and at the end."""

    def __init__(self, title: str, total: int, unit: str, done: int):
        self.title, self.total, self.unit = title, total, unit
        self.done, self.first, self.start = done, done, time.monotonic()
        self.last = self.start
        if done < total:
            print(f"{title}: {done}/{total} {unit}", flush=True)

    def advance(self, count: int = 1, note: str = "") -> None:
        interrupt.check()
        self.done += count
        now = time.monotonic()
        if now - self.last < PLAIN_EVERY and self.done < self.total:
            return
        self.last = now
        speed = (self.done - self.first) / max(now - self.start, 1e-9)
        line = f"{self.title}: {self.done}/{self.total} {self.unit}, {speed:.2f}/s"
        if self.done < self.total and speed:
            line += f", {_clock((self.total - self.done) / speed)} left"
        print(line + (f", {note}" if note else ""), flush=True)


class _Bar:
    def __init__(self, bar, task):
        self._bar, self._task = bar, task

    def advance(self, count: int = 1, note: str = "") -> None:
        interrupt.check()
        self._bar.update(self._task, advance=count, note=note)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    return f"{minutes}:{seconds:02d}"


@contextmanager
def progress(title: str, total: int, unit: str, done: int = 0) -> Iterator[_Plain | _Bar]:
    """Shows the progress of a piece of work.

    Args:
      title: name of the work.
      total: its number of units.
      unit: name of the units, in the plural.
      done: number of units done by an earlier run.

    Yields:
      An object with `advance(count=1, note="")`, which raises KeyboardInterrupt if a signal asked the process to stop.
    """
    if not sys.stdout.isatty():
        yield _Plain(title, total, unit, done)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task):
            return Text(f"{task.speed:.2f}/s" if task.speed else "", style="progress.data.speed")

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        Speed(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns) as bar:
        yield _Bar(bar, bar.add_task(title, total=total, completed=done, note=""))
