"""Estimates the disk space, memory and time of a run from its config, the model's size and the lengths of its rows.

The estimates are for planning. They were within a factor of 1.5 where compared with runs (SmolLM2-135M on two CPU
cores). For accelerators they use the manufacturers' peak figures times the shares below, and have not been compared
with any run. Only `model_size` needs jax, and imports it itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from raft_jax.accelerators import find_accelerator
from raft_jax.config import Config
from raft_jax.methods import METHODS, any_distils, any_refines

BYTES = {"float32": 4, "bfloat16": 2}
TEACHER_TOKENS = 30  # tokens that the teacher's instructions add to question and answer
COMPRESSION = 0.93  # size of float32 weights and averages in Orbax's files, relative to memory
RUNTIME_MEMORY = 1.2e9  # bytes of Python, JAX, XLA's programs and the sentence encoder
ADAM_MOMENTS = 2


@dataclass(frozen=True)
class Device:
    """The speed of one device in practice.

    Attributes:
      name: for printing.
      flops: FLOP/s in products of large matrices.
      decode_flops: FLOP/s in products of a few rows with a large matrix.
      bandwidth: bytes read from its memory per second.
      compile_seconds: time to compile one program.
    """

    name: str
    flops: float
    decode_flops: float
    bandwidth: float
    compile_seconds: float


SHARE_OF_FLOPS, SHARE_OF_BANDWIDTH = 0.35, 0.5
# Speeds of one core with AVX-512, float32 (docs/performance.md).
CORE_FLOPS, CORE_DECODE_FLOPS, CORE_BANDWIDTH = 90e9, 20e9, 14e9
MOST_CORES_OF_BANDWIDTH = 8  # further cores share the same memory channels


@dataclass(frozen=True)
class ModelSize:
    """Dimensions of a decoder, its number of parameters, and how many (or how many of its adapters') are trained."""

    num_parameters: int
    num_trained: int
    num_layers: int
    width: int
    ffn_width: int
    query_width: int  # of all heads together, like kv_width
    kv_width: int


@dataclass(frozen=True)
class RowLengths:
    """Numbers of tokens: (prompt, gold answer) of each row, and of each general prompt."""

    train: Sequence[tuple[int, int]]
    test: Sequence[tuple[int, int]]
    general: Sequence[int]


@dataclass(frozen=True)
class Estimate:
    """Bytes (disk_…, memory) and seconds (refine, train, evaluate).

    The memory is that of one device, or of the host on CPU.
    """

    disk_peak: float
    disk_after: float
    memory: float
    refine: float
    train: float
    evaluate: float

    @property
    def seconds(self) -> float:
        return self.refine + self.train + self.evaluate


def model_size(decoder, config: Config) -> ModelSize:
    """The `ModelSize` of a DecoderConfig."""
    from raft_jax.models.config import parameter_table
    from raft_jax.models.lora import adapter_table

    lora = config.train.lora
    tables = [parameter_table(decoder), adapter_table(decoder, lora.rank, lora.targets) if lora.rank else None]
    counts = [table and sum(math.prod(info.shape) for info in table.values()) for table in tables]
    return ModelSize(
        counts[0],
        counts[1] or counts[0],
        decoder.num_layers,
        decoder.width,
        decoder.ffn_width,
        decoder.num_heads * decoder.head_width,
        decoder.num_kv_heads * decoder.head_width,
    )


def find_device(name: str = "", cores: int | None = None) -> Device | None:
    """The device with a name such as "TPU v5 lite" or "NVIDIA A100-SXM4-80GB"; "" or "cpu" is this machine's CPU.

    None if the device is unknown.
    """
    if name.lower() in ("", "cpu"):
        cores = cores or os.cpu_count() or 1
        bandwidth = CORE_BANDWIDTH * min(cores, MOST_CORES_OF_BANDWIDTH)
        label = f"{cores} core{'s' * (cores > 1)} of a CPU"
        return Device(label, CORE_FLOPS * cores, CORE_DECODE_FLOPS * cores, bandwidth, 8)
    if (known := find_accelerator(name)) is None:
        return None
    flops = SHARE_OF_FLOPS * known[1].flops
    return Device(f"one {known[0]}", flops, flops, SHARE_OF_BANDWIDTH * known[1].bandwidth, 30)


def local_device() -> str:
    """The kind of accelerator that jax would use, read from the system without jax; "cpu" if none is found."""
    if os.environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return "cpu"
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in path.read_text("utf-8", errors="replace").splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    if sorted(Path("/dev").glob("accel*")):
        return os.environ.get("TPU_ACCELERATOR_TYPE", "TPU")
    return "cpu"


def estimate(config: Config, model: ModelSize, rows: RowLengths, device: Device) -> Estimate:
    """Estimates a run that starts in an empty folder.

    Args:
      config: of the run.
      model, rows: sizes of the model and of the data.
      device: one of the devices. Parameters are sharded over mesh.fsdp and mesh.tensor, the work over the whole mesh.
    """
    sharing = max(1, config.mesh.fsdp) * max(1, config.mesh.tensor)
    num_devices = sharing * max(1, config.mesh.data)
    work = _Work(config, model, device)
    export = model.num_parameters * BYTES[config.export.dtype]
    checkpoint = COMPRESSION * 4 * model.num_trained * (1 + ADAM_MOMENTS)
    kept = config.train.keep_checkpoints * checkpoint
    methods, finished = len(config.methods), export + (kept if config.train.keep_finished else 0)
    disk_after = methods * finished
    disk_peak = (methods - 1) * finished + kept + checkpoint
    steps = num_steps(config, len(rows.train))
    refined = any_refines(config.methods)
    train = sum(work.method(method, rows, steps) for method in config.methods)
    return Estimate(
        disk_peak=max(disk_peak, disk_after),
        disk_after=disk_after,
        memory=work.memory(rows, sharing, num_devices // sharing),
        refine=work.refine(rows) / num_devices if refined else 0.0,
        train=train / num_devices,
        evaluate=(methods + 1) * work.evaluate(rows) / num_devices,
    )


def num_steps(config: Config, num_rows: int) -> int:
    """Number of training steps of a method, counted as in training."""
    return config.train.num_steps(num_rows // config.train.batch_size)


def estimate_lines(
    config: Config, model: ModelSize, rows: RowLengths, *, device: str | None = None, free_disk: int | None = None
) -> list[str]:
    """The lines of the estimate that `raft-jax check` prints.

    Args:
      config, model, rows: see `estimate`.
      device: name of a kind of device; default `local_device()`.
      free_disk: free bytes on the disk of the run folder; adds a warning if they are too few.
    """
    name = local_device() if device is None else device
    known = find_device(name)
    needs = estimate(config, model, rows, known or find_device("cpu"))
    where = "of memory" if name == "cpu" else "of each device's memory"
    lines = [f"disk: about {_size(needs.disk_peak)} while it runs, {_size(needs.disk_after)} afterwards"]
    if free_disk is not None and free_disk < needs.disk_peak:
        lines.append(f"  only {_size(free_disk)} are free there; set run_dir, train.keep_checkpoints or export.dtype")
    lines.append(f"memory: about {_size(needs.memory)} {where}")
    if known is None:
        return [*lines, f"time: not known for {name}"]
    stages = [(stage, getattr(needs, stage)) for stage in ("refine", "train", "evaluate")]
    shares = ", ".join(f"{stage} {_time(seconds)}" for stage, seconds in stages if seconds)
    return [
        *lines,
        f"time: about {_time(needs.seconds)} at most on {known.name} ({shares}): as if every rewriting "
        "were fused and every answer ran to its limit of tokens",
    ]


@dataclass(frozen=True)
class _Work:
    """Seconds of each kind of work on one device."""

    config: Config
    model: ModelSize
    device: Device

    @property
    def _weight_bytes(self) -> int:
        return self.model.num_parameters * BYTES[self.config.model.dtype]

    def _cache_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return 2 * self.model.num_layers * self.model.kv_width * BYTES[self.config.model.dtype]

    def forward(self, tokens: float) -> float:
        return 2 * self.model.num_parameters * tokens / self.device.flops

    def generate(self, prompts: Sequence[int], new_tokens: int, batch_size: int, programs: int = 1) -> float:
        """Seconds of prefill and decoding, batch by batch; every row is decoded for new_tokens steps."""
        if not prompts:
            return 0.0
        batch = min(batch_size, len(prompts))
        num_batches = math.ceil(len(prompts) / batch)
        places = batch * (fmean(prompts) + new_tokens / 2)
        step = (
            self._weight_bytes + places * self._cache_bytes()
        ) / self.device.bandwidth + 2 * self.model.num_parameters * batch / self.device.decode_flops
        return self.forward(sum(prompts)) + num_batches * new_tokens * step + programs * self.device.compile_seconds

    def refine(self, rows: RowLengths) -> float:
        """Seconds of rewriting all rows, then of all rounds of fusion and likelihoods as if every rewriting were fused.

        Most are not, but how many depends on model and data (docs/refinement.md).
        """
        settings, new = self.config.refine, self.config.refine_max_new_tokens
        prompts = [prompt + answer for prompt, answer in rows.train]
        judged = "likelihood" in settings.judges
        tokens = 2 * sum(prompts)  # scored once with the candidate and once with the rewriting
        seconds = self.generate(prompts, new, settings.batch_size, programs=2)
        for _ in range(settings.rounds):
            seconds += self.generate([prompt + new for prompt in prompts], new, settings.batch_size)
            seconds += self.forward(tokens) if judged else 0.0
        return seconds

    def method(self, name: str, rows: RowLengths, steps: int) -> float:
        """Seconds of training.

        Per parameter and token 2 FLOPs forward, 4 backward and 2 more with remat; the teacher's forward pass and the
        rollouts of methods that distil; the optimiser's memory accesses; compilation.
        """
        train = self.config.train
        if METHODS[name].pruned_from is not None:
            return 0.0
        size = train.batch_size
        prompt, answer = (fmean(lengths) for lengths in zip(*rows.train, strict=True))
        answer = 0 if METHODS[name].target == "none" else answer
        passes = 4 if self.config.model.remat else 3
        tokens, rollout = size * (prompt + answer), 0.0
        teacher = self.forward(tokens) if METHODS[name].anchors else 0.0
        if METHODS[name].distils:
            new = train.rollout.max_new_tokens
            rollout = self.generate([round(prompt)] * size, new, size, programs=0)
            tokens += size * new
            teacher = self.forward(size * (prompt + answer + TEACHER_TOKENS + new))
        optimizer = self.model.num_trained * 4 * 7 / self.device.bandwidth  # reads four arrays and writes three
        step = passes * self.forward(tokens) + teacher + rollout + optimizer
        programs = (3 if rollout else 1) * train.length_buckets
        return steps * step + programs * self.device.compile_seconds

    def evaluate(self, rows: RowLengths) -> float:
        """Seconds for one model: answers to both kinds of prompts, gold answers' likelihoods, divergence from base."""
        settings = self.config.evaluate
        scored = sum(prompt + answer for prompt, answer in rows.test)
        diverged = 2 * (sum(rows.general) + len(rows.general) * settings.general_new_tokens)
        return (
            self.generate([prompt for prompt, _ in rows.test], settings.max_new_tokens, settings.batch_size)
            + self.generate(rows.general, settings.general_new_tokens, settings.batch_size)
            + self.forward(scored + diverged)
        )

    def memory(self, rows: RowLengths, sharing: int, data: int) -> float:
        """Bytes on one device: RUNTIME_MEMORY, and the larger of training and generation.

        Training has weights, gradients, moments and activations; generation has weights and key/value caches.
        """
        train, model = self.config.train, self.model
        width = BYTES[self.config.model.dtype]
        cast = model.num_parameters * width if width < 4 and not train.lora.rank else 0
        trained = 4 * model.num_trained * (2 + ADAM_MOMENTS)  # float32 weights, gradient, moments
        weights = (self._weight_bytes + trained + cast) / sharing
        longest_prompt, longest_answer = (max(lengths) for lengths in zip(*rows.train, strict=True))
        new = train.rollout.max_new_tokens if any_distils(self.config.methods) else 0
        prompt, answer = (fmean(lengths) for lengths in zip(*rows.train, strict=True))
        tokens = train.batch_size / train.num_micro_batches / (data * sharing) * (prompt + answer + new)
        kept = 2 * model.width + 2 * model.query_width + 2 * model.kv_width + 3 * model.ffn_width
        activations = tokens * width * model.num_layers * (model.width if self.config.model.remat else kept)
        places = max(
            self.config.refine.batch_size * (longest_prompt + longest_answer + 2 * self.config.refine_max_new_tokens),
            self.config.evaluate.batch_size * (longest_prompt + self.config.evaluate.max_new_tokens),
        )
        caches = places * self._cache_bytes() / (data * sharing)
        return max(weights + activations, self._weight_bytes / sharing + caches) + RUNTIME_MEMORY


def _size(num_bytes: float) -> str:
    """Formats a number of bytes with two digits.

    Example:
      >>> _size(2.741e9), _size(48e9), _size(9.5e6)
      ('2.7 GB', '48 GB', '9.5 MB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size or unit == "MB":
            value = num_bytes / size
            return f"{value:.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"
    raise AssertionError


def _time(seconds: float) -> str:
    """Formats seconds with two digits.

    Example:
      >>> _time(42), _time(250), _time(9000), _time(500_000)
      ('42 s', '4.2 min', '2.5 h', '5.8 days')
    """
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            value = seconds / size
            return f"{value:.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"
    return f"{seconds:.0f} s"
