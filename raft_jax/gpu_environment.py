"""What JAX is told about GPUs before it opens one: how much of their memory it may take, and to compute while it
exchanges.

Both are read from environment variables when JAX opens its first device. What the user has set is left as it is.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

# JAX takes 75% by default. The rest is for CUDA's own libraries, for which NVIDIA leaves 10 or 20% in its examples.
MEMORY = {"XLA_CLIENT_MEM_FRACTION": "0.9"}
# Any of them says how memory is to be taken. JAX refuses the second beside the first, of which it is the old name.
OF_MEMORY = (
    *MEMORY,
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
)
# Set in NVIDIA's own images of JAX. An unknown flag would end the process; the tests ask the installed jaxlib.
OVERLAP = "--xla_gpu_enable_latency_hiding_scheduler"
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")  # of JAX, for NVIDIA's GPUs


def gpu_environment(environment: Mapping[str, str], num_gpus: int) -> dict[str, str]:
    """The environment variables to set, with their values, for a process that will use GPUs.

    Args:
      environment: the variables as they are.
      num_gpus: GPUs of this machine that JAX may use.

    Returns:
      The share of a GPU's memory that JAX takes at its start; and, where several GPUs work together, the scheduler
      that exchanges while it computes. Nothing about what `environment` already says, and nothing without GPUs.

    Example:
      >>> gpu_environment({"XLA_CLIENT_MEM_FRACTION": "0.5"}, 2)
      {'XLA_FLAGS': '--xla_gpu_enable_latency_hiding_scheduler=true'}
    """
    if not num_gpus:
        return {}
    flags = environment.get("XLA_FLAGS", "").strip()
    settings = {}
    if not any(environment.get(name) for name in OF_MEMORY) and "memory_fraction" not in flags:
        settings |= MEMORY
    together = num_gpus > 1 or environment.get("JAX_NUM_PROCESSES", "1") != "1" or "SLURM_STEP_NODELIST" in environment
    # Without a dash, the variable names a file of flags.
    if together and OVERLAP not in flags and (not flags or flags.startswith("-")):
        settings["XLA_FLAGS"] = f"{flags} {OVERLAP}=true".strip()
    return settings


def count_gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """The number of NVIDIA's GPUs that JAX will use here; 0 where it may not, or was installed without them.

    Opens none of them, because the variables have to be set before.
    """
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return 0
    if not any(map(find_spec, PLUGINS)):
        return 0
    count = sum(bool(re.fullmatch(r"nvidia\d+", path.name)) for path in devices.iterdir())
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count
    names = [name.strip() for name in visible.split(",")]
    ends = [place for place, name in enumerate(names) if name in ("", "-1")]  # CUDA reads no further
    return min(count, ends[0] if ends else len(names))


def set_gpu_environment() -> None:
    """Sets the variables of `gpu_environment` in this process, and says in one line on stderr which. Call it before JAX
    opens a device."""
    settings = gpu_environment(os.environ, count_gpus(os.environ))
    if settings:
        os.environ.update(settings)
        text = " ".join(f"{name}='{value}'" if " " in value else f"{name}={value}" for name, value in settings.items())
        print(f"GPU: {text} (what you set yourself stays)", file=sys.stderr)
