"""Host memory that JAX does not manage."""

from __future__ import annotations

import ctypes
from functools import cache

import jax


def return_memory() -> None:
    """Returns freed memory to the system, as glibc does not by itself. Does nothing without glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@cache
def return_memory_after_compiling(at_least_seconds: float = 1.0) -> None:
    """Makes every later long compilation return its freed memory to the system.

    After compiling a program of a small model, LLVM has freed some 0.4 GB in pieces that glibc does not return to the
    system by itself. A second call does nothing more.
    """

    def compiled(event: str, seconds: float, **_) -> None:
        if event.endswith("backend_compile_duration") and seconds >= at_least_seconds:
            return_memory()

    jax.monitoring.register_event_duration_secs_listener(compiled)
