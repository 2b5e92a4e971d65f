"""The phases of a run, each with a program: its memory and its time on a chip, from the program and from the model.

Times are lower bounds: what the chip computes, reads and sends at the maker's figures, as if the three overlapped.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from raft_jax.estimate import ADAM_MOMENTS, BYTES
from raft_jax.plan.chips import Chip
from raft_jax.plan.flops import Flops, RowTokens
from raft_jax.plan.hlo import Module
from raft_jax.plan.programs import Programs

KINDS = ("compute", "memory", "interconnect")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Reading:
    """What the compiler says of a program. Bytes are of one device.

    Attributes:
      total: arguments, temporary arrays and outputs, those that share memory counted once.
      beyond: `total` without the arguments.
      collectives: bytes sent in each kind of collective; an all-reduce counts twice.
      busy: the TPU compiler's estimate of the cycles of everything else; 0 elsewhere.
      refused: the compiler has refused the program, as it needs `total` bytes; nothing else is known.
      seconds: that compiling took.
    """

    total: float
    beyond: float = 0.0
    collectives: dict[str, float] = field(default_factory=dict)
    busy: float = 0.0
    refused: bool = False
    seconds: float = 0.0


def compile_and_read(programs: Programs, lower: Callable[[], Any], num_steps: int = 1) -> Reading:
    """Compiles a program and reads it; `num_steps` is how often a loop of unknown length runs."""
    began = time.perf_counter()
    with jax.set_mesh(programs.mesh):
        lowered = lower()
        try:
            compiled = lowered.compile()
        except Exception as error:
            if (needed := _bytes_needed(str(error))) is None:
                raise
            return Reading(needed, refused=True, seconds=time.perf_counter() - began)
    memory = compiled.memory_analysis()
    beyond = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    module, sent = Module(compiled.as_text(), num_steps), {}
    for collective in module.collectives():
        sent[collective.kind] = sent.get(collective.kind, 0.0) + collective.equivalent_bytes
    total = memory.argument_size_in_bytes + beyond
    return Reading(total, beyond, sent, module.cycles(), seconds=time.perf_counter() - began)


def _bytes_needed(message: str) -> float | None:
    """The bytes in a compiler's complaint that a program does not fit; None for another error.

    Example:
      >>> _bytes_needed("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 1.50K of 1.00K hbm.")
      1536.0
    """
    if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message:
        return None
    match = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of", message)
    return float(match[1]) * UNITS[match[2]] if match else None


@dataclass(frozen=True)
class Phase:
    """A program of a run. Bytes are of one device, seconds of one run of the program.

    Attributes:
      name: what it does.
      parts: bytes by purpose.
      total: bytes of all that lies on the device while it runs.
      reading: what the compiler says; None where it was not compiled.
      flops: operations, of all devices together.
      seconds: by `KINDS`; None where a figure of the chip is not known.
      rows: the rows that it takes at once.
    """

    name: str
    parts: dict[str, float]
    total: float
    reading: Reading | None
    flops: float
    seconds: dict[str, float | None]
    rows: int

    @property
    def bound(self) -> float:
        """Seconds of the slowest of the three."""
        return max((value for value in self.seconds.values() if value is not None), default=0.0)

    def estimated(self, clock: float | None) -> float | None:
        """Seconds by the TPU compiler's own estimate of its cycles, and then of what is sent, as if nothing overlapped;
        None where the chip's clock is not known."""
        sent = self.seconds["interconnect"]
        if self.reading is None or self.reading.refused or sent is None or not clock or not self.reading.busy:
            return None
        return self.reading.busy / clock + sent

    @property
    def slowest(self) -> str:
        """The name of the slowest; empty if nothing is known."""
        known = {name: value for name, value in self.seconds.items() if value is not None}
        return max(known, key=known.__getitem__) if known else ""

    def fits(self, memory: float | None) -> bool | None:
        """Whether a chip with so many bytes has room; None if that is not known, as before it is compiled."""
        if self.reading is not None and self.reading.refused:
            return False
        if memory is None or (self.reading is None and self.total <= memory):
            return None
        return self.total <= memory


def all_fit(phases: Sequence[Phase], memory: float | None) -> bool | None:
    """Whether a chip with so many bytes has room for every phase; None if that is not known."""
    verdicts = [phase.fits(memory) for phase in phases]
    return False if False in verdicts else None if None in verdicts else True


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device reads from its memory or writes to it, at least."""

    programs: Programs
    flops: Flops

    @property
    def _width(self) -> int:
        return BYTES[self.programs.config.model.dtype]

    @property
    def _parts(self) -> int:
        return self.programs.mesh.shape["fsdp"] * self.programs.mesh.shape["tensor"]

    @property
    def _layers(self) -> float:
        """Weights of all layers as a device has them in a pass over whole sequences: gathered over fsdp."""
        return self.flops.layer_weights * self._width / self.programs.mesh.shape["tensor"]

    def train(self, tokens: float, passes: int, teacher: bool) -> float:
        """A train step: the layers' weights in every pass, those of the optimiser (four arrays are read and three
        written), and what the backward pass finds of `tokens` tokens of this device."""
        config, lora = self.programs.model.config, self.programs.config.train.lora
        micro_batches = self.programs.config.train.num_micro_batches
        weights = self._layers * (passes + teacher) * micro_batches
        trained = self.flops.adapter_weights if lora.rank else self.flops.layer_weights + self.flops.head_weights
        optimizer = trained * 4 * (2 * (2 + ADAM_MOMENTS) - 1) / self._parts
        heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_width
        kept = config.width if config.remat else 2 * config.width + heads + 3 * config.ffn_width
        return weights + optimizer + 2 * tokens * config.num_layers * kept * self._width

    def generate(self, num_rows: int, prompt: float, new_tokens: float) -> float:
        """Prefill, and for every new token all weights that lie on this device and its part of the cache."""
        stored = (self.flops.layer_weights + self.flops.head_weights) * self._width / self._parts
        cache = self.programs.cache_bytes(num_rows, 1) * (prompt + new_tokens / 2)
        return (self._layers if prompt else 0) + new_tokens * (stored + cache)


def seconds_of(
    chip: Chip, num_devices: int, flops: float, traffic: float, reading: Reading | None
) -> dict[str, float | None]:
    """Seconds of a program by `KINDS`."""
    sent = None if reading is None or reading.refused else sum(reading.collectives.values())
    if num_devices == 1:
        sent = 0.0
    return {
        "compute": chip.flops and flops / num_devices / chip.flops,
        "memory": chip.bandwidth and traffic / chip.bandwidth,
        "interconnect": None if sent is None else 0.0 if not sent else chip.link and sent / chip.link,
    }


def tokens_of(row: RowTokens) -> float:
    """Tokens of a row in the student's forward pass."""
    return row.prompt + row.answer + row.rollout
