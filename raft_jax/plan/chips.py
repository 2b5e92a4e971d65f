"""The chips that a plan is for: how many, their memory and their speeds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from raft_jax.accelerators import find_accelerator
from raft_jax.errors import InputError
from raft_jax.estimate import find_device
from raft_jax.gpu_environment import MEMORY
from raft_jax.plan import gpus
from raft_jax.plan.environment import LOCAL

# Slices that can be asked for, by the beginning of their name, from small to large.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")
SLICES = {"v5e": FLAT, "v6e": FLAT, "v4": DEEP, "v5p": DEEP, "tpu7x": DEEP}
SETTINGS = {"v4": {"chip_config_name": "megacore"}}  # one device a chip

CPU = "CPU"  # the kind of a chip whose memory is the host's


@dataclass(frozen=True)
class Chip:
    """One JAX device, at the maker's figures. None where a figure is not known.

    Attributes:
      kind: its name.
      memory: bytes.
      flops: bfloat16 operations per second.
      bandwidth: bytes per second from its memory.
      link: bytes per second that it sends to others.
      clock: Hz.
      devices: JAX devices of one chip, for chip-hours.
    """

    kind: str
    memory: float | None
    flops: float | None = None
    bandwidth: float | None = None
    link: float | None = None
    clock: float | None = None
    devices: int = 1


@dataclass(frozen=True)
class Slice:
    """Devices that work together: the name of their topology, the JAX devices, and what one of them is."""

    topology: str
    devices: Sequence[Any]
    chip: Chip

    @property
    def is_local(self) -> bool:
        """Whether these are the devices at hand."""
        return self.topology == LOCAL

    def larger(self) -> list[str]:
        """Names of the larger slices of this kind, from small to large."""
        if (gpu := gpus.parse(self.topology)) is not None:
            return [f"{gpu[0]}x{count}" for count in (2, 4, gpus.MOST) if count > gpu[1]]
        kind, _, shape = self.topology.partition(":")
        shapes = SLICES.get(kind, ())
        return [f"{kind}:{name}" for name in shapes[shapes.index(shape) + 1 :]] if shape in shapes else []


def find_slice(topology: str, memory: float | None = None, num_slices: int = 1) -> Slice:
    """The chips of a topology.

    Args:
      topology: a slice that libtpu knows, such as "v5e:4x4"; GPUs of one machine, such as "h100" or "h100x8"; or
        "local", the devices at hand.
      memory: bytes of each chip, in place of what is known of them.
      num_slices: of that topology, connected by the data centre's network.

    Raises:
      InputError: there is no such topology.
    """
    if topology == LOCAL:
        devices = jax.devices()
    elif (gpu := gpus.parse(topology)) is not None:
        devices = _gpus(*gpu)
    else:
        devices = _described(topology, num_slices)
    chip = chip_of(devices)
    return Slice(topology, devices, chip if memory is None else replace(chip, memory=memory))


def _described(topology: str, num_slices: int) -> Sequence[Any]:
    from jax.experimental import topologies

    settings = dict(SETTINGS.get(topology.partition(":")[0], {}))
    if num_slices > 1:
        settings["num_slices"] = num_slices
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology, **settings)
        return description.devices
    except Exception as error:  # whatever the plugin raises
        known = ", ".join(f"{name}:{shapes[3]}" for name, shapes in SLICES.items())
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"--topology {topology} is not known to libtpu ({reason}); allowed: such as {known}; "
            f"{', '.join(gpus.TARGETS)}, or one of them with x2, x4 or x{gpus.MOST}; or {LOCAL}"
        ) from error


def _gpus(name: str, count: int) -> Sequence[Any]:
    from jax._src.cudnn import fused_attention_stablehlo as fused  # no public name says which cuDNN there will be
    from jax.experimental import topologies

    fused.check_cudnn_version = lambda: gpus.CUDNN  # JAX asks this machine, which needs none
    target = gpus.target_config(gpus.TARGETS[name])
    machine = topologies.get_topology_desc(platform="cuda", target_config=target, topology=f"1x1x{count}")
    return machine.devices


def chip_of(devices: Sequence[Any]) -> Chip:
    """What one of some devices is."""
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        cpu, count = find_device("cpu"), len(devices)
        assert cpu is not None
        return Chip(CPU, _host_memory() / count, cpu.flops / count, cpu.bandwidth / count)
    share = float(MEMORY["XLA_CLIENT_MEM_FRACTION"]) if devices[0].platform == "gpu" else 1.0
    memory = _allowed_memory(devices[0])
    if (known := find_accelerator(kind)) is None:
        return Chip(kind, memory)
    name, figures = known
    memory = memory or share * figures.memory
    return Chip(name, memory, figures.flops, figures.bandwidth, figures.link, figures.clock, figures.devices)


def _allowed_memory(device: Any) -> float | None:
    """Bytes that JAX may take of a device at hand; None where that is not known."""
    if device.platform != "gpu":
        return None
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # a device that is only compiled for
        return None


def _host_memory() -> float:
    """Bytes of this machine's memory."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
