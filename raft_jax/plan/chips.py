"""The chips that a plan is for: how many, their memory and their speeds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from raft_jax.errors import InputError
from raft_jax.estimate import ACCELERATORS, find_device
from raft_jax.plan.environment import LOCAL
from raft_jax.train.throughput import PEAKS

# Of one JAX device, by the beginning of its kind: bytes of memory, bytes/s from it, bytes/s that it sends in a corner
# of a slice without wrap-around links (two of a v5e's and a v6e's links, three of the others'), where known the clock
# in Hz, and devices of a chip. Memory and links: the makers' figures, of the links nine tenths.
KINDS = {
    "TPU v4": (32e9, 1.2e12, 135e9, None, 1),
    "TPU v5 lite": (16e9, 0.82e12, 90e9, 1.5e9, 1),
    "TPU v5p": (95e9, 2.8e12, 270e9, None, 1),
    "TPU v5": (95e9, 2.8e12, 270e9, None, 1),
    "TPU v6 lite": (32e9, 1.6e12, 180e9, None, 1),
    "TPU7x": (96e9, 3.7e12, 135e9, None, 2),
}
# Slices that can be asked for, by the beginning of their name, from small to large.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")
SLICES = {"v5e": FLAT, "v6e": FLAT, "v4": DEEP, "v5p": DEEP, "tpu7x": DEEP}
SETTINGS = {"v4": {"chip_config_name": "megacore"}}  # one device a chip


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
        kind, _, shape = self.topology.partition(":")
        shapes = SLICES.get(kind, ())
        return [f"{kind}:{name}" for name in shapes[shapes.index(shape) + 1 :]] if shape in shapes else []


def find_slice(topology: str, memory: float | None = None, num_slices: int = 1) -> Slice:
    """The chips of a topology.

    Args:
      topology: a name that libtpu knows, such as "v5e:4x4"; or "local", the devices at hand.
      memory: bytes of each chip, in place of what is known of them.
      num_slices: of that topology, connected by the data centre's network.

    Raises:
      InputError: libtpu does not know the topology.
    """
    devices = jax.devices() if topology == LOCAL else _described(topology, num_slices)
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
            f"--topology {topology} is not known to libtpu ({reason}); allowed: such as {known}, or {LOCAL}"
        ) from error


def chip_of(devices: Sequence[Any]) -> Chip:
    """What one of some devices is."""
    kind = devices[0].device_kind
    if devices[0].platform == "cpu":
        cpu, count = find_device("cpu"), len(devices)
        assert cpu is not None
        return Chip("CPU", _host_memory() / count, cpu.flops / count, cpu.bandwidth / count)
    if name := max((name for name in KINDS if kind.startswith(name)), key=len, default=None):
        memory, bandwidth, link, clock, parts = KINDS[name]
        return Chip(name, memory, PEAKS[name], bandwidth, link, clock, parts)
    flops, bandwidth = next((known for name, known in ACCELERATORS.items() if name in kind), (None, None))
    stats = devices[0].memory_stats() or {}
    return Chip(kind, stats.get("bytes_limit"), flops, bandwidth)


def _host_memory() -> float:
    """Bytes of this machine's memory."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
