"""SIGTERM and Ctrl-C set a flag that long work checks between batches.

Raising an exception in the signal handler would not do: if it occurs inside a callback of JAX, JAX discards it and the
run continues.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GO_ON = "the same command goes on from here"

_received: list[int] = []
_deferred = 0


@contextmanager
def handled() -> Iterator[None]:
    """Records SIGTERM and SIGINT for `check`; a second signal ends the process immediately, whatever it is doing."""
    _received.clear()
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may install signal handlers, so signals are left to the caller
        return
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    # The thread receives a signal even while the main thread is in a compilation and runs no Python code.
    watcher = threading.Thread(target=_watch, args=(read_end,), daemon=True)
    watcher.start()
    previous = {number: signal.signal(number, lambda number, _: _note(number)) for number in SIGNALS}
    previous_fd = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_fd)
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(write_end)  # ends the thread
        watcher.join()
        os.close(read_end)
        _received.clear()


def _watch(read_end: int) -> None:
    count = 0
    while numbers := os.read(read_end, 64):
        for number in numbers:
            if number not in SIGNALS:
                continue
            count += 1
            if count == 2:
                words = f"\nraft-jax: stopped at once by a second {_name(number)}; {GO_ON}\n"
                os.write(2, words.encode())
                os._exit(130)
            _note(number)


def _note(number: int) -> None:
    if not _received:
        _received.append(number)


def _name(number: int) -> str:
    return signal.Signals(number).name


def requested() -> str | None:
    """The name of the signal that asked the process to stop; None if there was none."""
    return _name(_received[0]) if _received else None


def check() -> None:
    """Raises KeyboardInterrupt if a signal asked the process to stop. Called wherever work may stop."""
    if _received and not _deferred:
        raise KeyboardInterrupt(f"stopped by {requested()}; {GO_ON}")


@contextmanager
def deferred() -> Iterator[None]:
    """Disables `check` inside the context, for work that calls `requested` itself and saves before it stops."""
    global _deferred
    _deferred += 1
    try:
        yield
    finally:
        _deferred -= 1
