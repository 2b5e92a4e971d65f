"""Times of device work: warmed up, waited for, repeated; and the rates that they are held against."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

BF16_PRODUCT, COPY = "bf16_product", "copy"  # the floors in the environment part's results


def timed(
    run: Callable[[], Any],
    *,
    wait: Callable[[Any], Any] = jax.block_until_ready,
    repeats: int = 7,
    seconds: float = 3.0,
    shortest: float = 0.02,
) -> dict[str, float]:
    """Seconds of one call: the median of several repeats, and their range.

    Args:
      run: starts the work and returns what `wait` waits for.
      wait: for a framework other than JAX.
      repeats: at most so many, after two that do not count (the first compiles).
      seconds: no repeat begins after so much time, but three are made.
      shortest: calls that take less are made several in a row, so that a repeat takes this long.
    """
    began = time.perf_counter()
    wait(run())
    first = time.perf_counter() - began
    began = time.perf_counter()
    wait(run())
    calls = max(1, math.ceil(shortest / max(time.perf_counter() - began, 1e-7)))
    found, started = [], time.perf_counter()
    while len(found) < repeats and (len(found) < 3 or time.perf_counter() - started < seconds):
        began = time.perf_counter()
        for _ in range(calls):
            result = run()
        wait(result)
        found.append((time.perf_counter() - began) / calls)
    return {
        "seconds": statistics.median(found),
        "low": min(found),
        "high": max(found),
        "repeats": len(found),
        "calls": calls,
        "first_seconds": first,
    }


def once(run: Callable[[], Any], *, repeats: int, wait: Callable[[Any], Any] = jax.block_until_ready):
    """The same for work too long for many repeats: every call is timed alone, after one that does not count."""
    return timed(run, wait=wait, repeats=repeats, seconds=math.inf, shortest=0)


def peak_memory() -> int | None:
    """The most bytes of the first device that this process has held; None where the device does not say (CPU)."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def shares(record, *, seconds: float, flops: float | None = None, moved: float | None = None) -> dict[str, float]:
    """Rates, and how much of this card's measured floors they are, where the environment part has measured them."""
    floors, found = record.of("environment"), {}
    if flops is not None:
        found["tflops"] = flops / seconds / 1e12
        if BF16_PRODUCT in floors:
            found["mfu"] = found["tflops"] / floors[BF16_PRODUCT]["tflops"]
    if moved is not None:
        found["terabytes_per_second"] = moved / seconds / 1e12
        if COPY in floors:
            found["bandwidth_share"] = found["terabytes_per_second"] / floors[COPY]["terabytes_per_second"]
    return found


def out_of_memory(error: Exception) -> bool:
    text = f"{type(error).__name__} {error}"
    return "RESOURCE_EXHAUSTED" in text or "OutOfMemory" in text or "out of memory" in text.lower()


def measured(record, name: str, measure: Callable[[], dict[str, Any]], **described: Any) -> bool:
    """Records one measurement of several that do not hang on each other; what fails is recorded as failed.

    Returns:
      Whether it went well.
    """
    try:
        found = measure()
    except Exception as error:  # any error at all: the next measurement is worth its time whatever this one met
        status = "out of memory" if out_of_memory(error) else "failed"
        record.add(name, **described, status=status, error=f"{type(error).__name__}: {error}"[-2000:])
        gc.collect()
        return False
    record.add(name, **described, **found)
    gc.collect()
    return True
