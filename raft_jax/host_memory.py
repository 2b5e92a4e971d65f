"""Host memory that JAX does not manage."""

from __future__ import annotations

import ctypes
from functools import cache

import jax


@cache
def return_memory_after_compiling(at_least_seconds: float = 1.0) -> None:
    """Makes every later long compilation return its freed memory to the system.

    After compiling a program of a small model, LLVM has freed some 0.4 GB in pieces that glibc does not return to the
    system by itself. Does nothing without glibc, and nothing more in a second call.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return

    def compiled(event: str, seconds: float, **_) -> None:
        if event.endswith("backend_compile_duration") and seconds >= at_least_seconds:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(compiled)
