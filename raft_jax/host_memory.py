"""Memory of the host that JAX does not manage."""

from __future__ import annotations

import ctypes
from functools import cache

import jax


@cache
def return_memory_after_compiling(at_least_seconds: float = 1.0) -> None:
    """From now on, what a long compilation has freed goes back to the system.

    LLVM leaves some 0.4 GB of free pieces behind a program of a small model, which glibc keeps for itself. Elsewhere
    than on glibc nothing happens, and a second call adds nothing.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return

    def compiled(event: str, seconds: float, **_) -> None:
        if event.endswith("backend_compile_duration") and seconds >= at_least_seconds:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(compiled)
