"""What the machine is, and the two floors: how fast it multiplies and how fast it copies."""

from __future__ import annotations

import subprocess
from functools import partial

import jax
import jax.numpy as jnp
from timing import BF16_PRODUCT, COPY, measured, timed

from raft_jax.machine import describe_machine, versions_of

PREDICTED = {
    "bf16_product": "790 TFLOP/s for 8192 x 8192 x 8192",
    "copy": "3.0 TB/s on an H100, 4.3 TB/s on an H200, read and written counted",
}
PACKAGES = (
    "jax-cuda13-plugin",
    "nvidia-cudnn-cu13",
    "nvidia-cublas",
    "orbax-checkpoint",
    "torch",
    "triton",
    "trl",
    "liger-kernel",
    "gguf",
    "omegaconf",
    "array_record",
    "tensorflow-datasets",
)


def run(record, tiny: bool) -> None:
    record.set(predicted=PREDICTED)
    packages = dict.fromkeys(PACKAGES) | versions_of(PACKAGES)
    record.add("machine", **describe_machine(), packages=packages, driver=_driver(), memory=_memory())
    largest = 256 if tiny else 8192
    for name, dtype, size in ((BF16_PRODUCT, "bfloat16", largest), ("float32_product", "float32", largest // 2)):
        measured(record, name, partial(product, size, dtype), size=size, dtype=dtype)
    measured(record, COPY, lambda: copy((1 << 20) if tiny else (1 << 31)))
    measured(record, "launch", launch)


def product(size: int, dtype) -> dict:
    """Square matrices of random numbers: zeros multiply faster."""
    a, b = (jax.random.normal(key, (size, size), dtype) for key in jax.random.split(jax.random.key(0)))
    multiply = jax.jit(jnp.matmul)
    found = timed(lambda: multiply(a, b), repeats=15)
    return {**found, "tflops": 2 * size**3 / found["seconds"] / 1e12}


def copy(num_bytes: int) -> dict:
    """An array read and written once."""
    array = jax.random.bits(jax.random.key(0), (num_bytes // 4,), jnp.uint32)
    flip = jax.jit(lambda array: array ^ 1)
    found = timed(lambda: flip(array), repeats=15)
    return {**found, "bytes": 2 * array.nbytes, "terabytes_per_second": 2 * array.nbytes / found["seconds"] / 1e12}


def launch() -> dict:
    """From Python to the device and back, for a program that does next to nothing."""
    one, add = jnp.float32(1), jax.jit(lambda x: x + 1)
    return timed(lambda: jax.block_until_ready(add(one)), shortest=0.05)


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _memory() -> int | None:
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
