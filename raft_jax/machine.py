"""Describes the machine that a stage ran on and its peak memory, for the report."""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections import Counter
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from raft_jax import __version__

PACKAGES = ("jax", "jaxlib", "flax", "optax", "transformers")


def describe_machine() -> dict[str, Any]:
    """Devices, processor, versions and this process's peak memory so far, as values that JSON can hold.

    Returns:
      `devices` (such as `["4 × TPU v5 lite"]`, of all processes), `processes`, `processor`, `cores`, `python`,
      `versions`, and in bytes `peak_host_memory` (of this process) and `peak_device_memory` (the maximum over its
      devices; None if the devices do not report it, like the CPU).
    """
    kinds = Counter(device.device_kind for device in jax.devices())
    peaks = [
        stats["peak_bytes_in_use"]
        for device in jax.local_devices()
        if "peak_bytes_in_use" in (stats := device.memory_stats() or {})
    ]
    return {
        "devices": [f"{count} × {kind}" for kind, count in sorted(kinds.items())],
        "processes": jax.process_count(),
        "processor": _processor(),
        "cores": _num_cores(),
        "python": platform.python_version(),
        "versions": {"raft_jax": __version__, **versions_of(PACKAGES)},
        "peak_host_memory": _peak_host_memory(),
        "peak_device_memory": max(peaks, default=None),
    }


@cache
def versions_of(packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of the packages that are installed, by name."""
    versions = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # not installed, such as a package imported from a folder on PYTHONPATH
            continue
    return versions


def _num_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _peak_host_memory() -> int:
    """Peak memory of this process in bytes; the unit of `ru_maxrss` is bytes on macOS and KiB elsewhere."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
