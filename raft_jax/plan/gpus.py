"""NVIDIA's GPUs as XLA has to know them to compile for them on a machine without one."""

from __future__ import annotations

import re
from dataclasses import dataclass

from raft_jax.errors import InputError

MOST = 8  # GPUs of one machine
CUDNN = 91000  # the version that is compiled for


@dataclass(frozen=True)
class Target:
    """A GPU: what its maker says, and what XLA reads from a device.

    Attributes:
      kind: JAX's name for it.
      capability: CUDA's compute capability.
      cores: streaming multiprocessors.
      units: of single precision in each of them.
      threads: that each of them holds at most.
      shared: KiB of shared memory of each of them; a block may take all but one.
      cache: bytes of the level 2 cache.
      clock: GHz.
      memory: bytes.
      bandwidth: bytes per second.
    """

    kind: str
    capability: tuple[int, int]
    cores: int
    units: int
    threads: int
    shared: int
    cache: int
    clock: float
    memory: int
    bandwidth: int


MIB = 2**20
TARGETS = {
    "l4": Target("NVIDIA L4", (8, 9), 58, 128, 1536, 100, 48 * MIB, 2.04, 23_664_000_000, 300_000_000_000),
    "rtx4090": Target(
        "NVIDIA GeForce RTX 4090", (8, 9), 128, 128, 1536, 100, 72 * MIB, 2.52, 25_250_000_000, 1_008_000_000_000
    ),
    "a100-40gb": Target(
        "NVIDIA A100-SXM4-40GB", (8, 0), 108, 64, 2048, 164, 40 * MIB, 1.41, 42_331_013_120, 1_555_200_000_000
    ),
    "a100": Target(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 2048, 164, 40 * MIB, 1.41, 85_100_068_864, 2_039_040_000_000
    ),
    "h100": Target(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 2048, 228, 50 * MIB, 1.98, 84_942_979_072, 3_352_320_000_000
    ),
    "h200": Target(
        "NVIDIA H200 141GB HBM3e", (9, 0), 132, 128, 2048, 228, 50 * MIB, 1.98, 151_397_597_184, 4_800_000_000_000
    ),
    "b200": Target("NVIDIA B200", (10, 0), 148, 128, 2048, 228, 132_644_864, 1.965, 191_514_411_008, 7_672_320_000_000),
}


def parse(topology: str) -> tuple[str, int] | None:
    """Name in `TARGETS` and number of GPUs of a topology such as "h100" or "h100x8"; None if it is another machine's.

    Raises:
      InputError: so many GPUs are not in one machine.

    Example:
      >>> parse("h100x8"), parse("a100-40gb"), parse("v5e:4x4")
      (('h100', 8), ('a100-40gb', 1), None)
    """
    match = re.fullmatch(rf"({'|'.join(TARGETS)})(?:x(\d+))?", topology)
    if match is None:
        return None
    count = int(match[2] or 1)
    if count not in (1, 2, 4, MOST):
        raise InputError(f"--topology {topology}: {count} GPUs; allowed: 1, 2, 4 or {MOST}, those of one machine")
    return match[1], count


def target_config(target: Target) -> str:
    """XLA's GpuTargetConfigProto of a GPU, as text; sizes that all of them share are CUDA's."""
    major, minor = target.capability
    per_core = target.shared * 1024
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {target.threads}
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {per_core - 1024} shared_memory_per_core: {per_core}
  core_count: {target.cores} fpus_per_core: {target.units} clock_rate_ghz: {target.clock}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {target.bandwidth} l2_cache_size: {target.cache} device_memory_size: {target.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: {CUDNN // 10000} minor: {CUDNN // 100 % 100} }}
runtime_version {{ major: 13 }}
device_description_str: "{target.kind}"
"""
