"""About how much disk, memory and time a run takes, from its config, its model's size and its rows' lengths.

The figures are for a plan, not a promise: within a factor of 1.5 where they were compared with runs (SmolLM2-135M on
two cores of a CPU). For accelerators the makers' peak figures are taken at the shares below, and no run has been
compared. Nothing here needs jax but `model_size`, which imports it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from raft_jax.config import Config
from raft_jax.methods import METHODS, any_distils, any_refines

BYTES = {"float32": 4, "bfloat16": 2}
TEACHER_TOKENS = 30  # of the teacher's instructions, beside question and answer
COMPRESSION = 0.93  # of float32 weights and averages, as Orbax writes them
RUNTIME_MEMORY = 1.2e9  # of Python, JAX, XLA's programs and the sentence encoder
ADAM_MOMENTS = 2


@dataclass(frozen=True)
class Device:
    """How fast one device is in practice.

    Attributes:
      name: as people call it.
      flops: of products of large matrices, per second.
      decode_flops: of products with a few rows, per second.
      bandwidth: bytes of its memory read, per second.
      compile_seconds: of one program.
    """

    name: str
    flops: float
    decode_flops: float
    bandwidth: float
    compile_seconds: float


# Peak bfloat16 FLOP/s and bytes/s as the makers give them; the part of a device's name that says which it is.
ACCELERATORS = {
    "TPU v4": (275e12, 1.2e12),
    "TPU v5 lite": (197e12, 0.82e12),
    "TPU v5p": (459e12, 2.8e12),
    "TPU v6 lite": (918e12, 1.6e12),
    "TPU7x": (2307e12, 7.4e12),
    "T4": (65e12, 0.32e12),
    "L4": (121e12, 0.3e12),
    "A100": (312e12, 1.6e12),
    "H100": (989e12, 3.3e12),
    "H200": (989e12, 4.8e12),
    "B200": (2250e12, 8e12),
}
SHARE_OF_FLOPS, SHARE_OF_BANDWIDTH = 0.35, 0.5
# Of one core with AVX-512, float32 (docs/performance.md).
CORE_FLOPS, CORE_DECODE_FLOPS, CORE_BANDWIDTH = 90e9, 20e9, 14e9
MOST_CORES_OF_BANDWIDTH = 8  # more share the same memory channels


@dataclass(frozen=True)
class ModelSize:
    """Numbers of a decoder, and how many of its parameters (or of its adapters') are trained."""

    num_parameters: int
    num_trained: int
    num_layers: int
    width: int
    ffn_width: int
    query_width: int  # of all heads together
    kv_width: int


@dataclass(frozen=True)
class RowLengths:
    """Tokens of each row's prompt and gold answer, and of each general prompt."""

    train: Sequence[tuple[int, int]]
    test: Sequence[tuple[int, int]]
    general: Sequence[int]


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds; memory is that of one device, or of the host where that is the device."""

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
    """The numbers of a DecoderConfig."""
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
    """The device of a name such as "TPU v5 lite" or "NVIDIA A100-SXM4-80GB"; "" or "cpu" is this machine's processor.

    None where nothing is known of it.
    """
    if name.lower() in ("", "cpu"):
        cores = cores or os.cpu_count() or 1
        bandwidth = CORE_BANDWIDTH * min(cores, MOST_CORES_OF_BANDWIDTH)
        label = f"{cores} core{'s' * (cores > 1)} of a CPU"
        return Device(label, CORE_FLOPS * cores, CORE_DECODE_FLOPS * cores, bandwidth, 8)
    for known, (flops, bandwidth) in ACCELERATORS.items():
        if known.lower() in name.lower():
            flops = SHARE_OF_FLOPS * flops
            return Device(f"one {known}", flops, flops, SHARE_OF_BANDWIDTH * bandwidth, 30)
    return None


def local_device() -> str:
    """The kind of accelerator that jax would use, read from the system without jax; "cpu" where none shows itself."""
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
    """What a run takes that begins from nothing.

    Args:
      config: of the run.
      model, rows: their sizes.
      device: one of those that run it; several share parameters by mesh.fsdp and mesh.tensor, and rows by all of mesh.
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
    """Steps of a method, as the training counts them."""
    steps = max(1, round(config.train.epochs * (num_rows // config.train.batch_size)))
    return min(steps, config.train.max_steps or steps)


def estimate_lines(
    config: Config, model: ModelSize, rows: RowLengths, *, device: str | None = None, free_disk: int | None = None
) -> list[str]:
    """The estimate in lines for `raft-jax check`.

    Args:
      config, model, rows: see `estimate`.
      device: name of a kind of device; default what this machine shows.
      free_disk: bytes that are free where the run folder will be; a warning where they are too few.
    """
    name = local_device() if device is None else device
    known = find_device(name)
    found = estimate(config, model, rows, known or find_device("cpu"))
    where = "of memory" if name == "cpu" else "of each device's memory"
    lines = [f"disk: about {_size(found.disk_peak)} while it runs, {_size(found.disk_after)} afterwards"]
    if free_disk is not None and free_disk < found.disk_peak:
        lines.append(f"  only {_size(free_disk)} are free there; set run_dir, train.keep_checkpoints or export.dtype")
    lines.append(f"memory: about {_size(found.memory)} {where}")
    if known is None:
        return [*lines, f"time: not known for {name}"]
    stages = [(stage, getattr(found, stage)) for stage in ("refine", "train", "evaluate")]
    shares = ", ".join(f"{stage} {_time(seconds)}" for stage, seconds in stages if seconds)
    return [
        *lines,
        f"time: about {_time(found.seconds)} at most on {known.name} ({shares}): as if every rewriting "
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
        """Of one token's keys and values."""
        return 2 * self.model.num_layers * self.model.kv_width * BYTES[self.config.model.dtype]

    def forward(self, tokens: float) -> float:
        return 2 * self.model.num_parameters * tokens / self.device.flops

    def generate(self, prompts: Sequence[int], new_tokens: int, batch_size: int, programs: int = 1) -> float:
        """Prefill and decoding, batch by batch, each to its limit."""
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
        """Rewriting of all rows, then rounds of fusion and likelihoods as if each were accepted: most are not, but how
        many depends on model and data (docs/refinement.md)."""
        settings, new = self.config.refine, self.config.refine_max_new_tokens
        prompts = [prompt + answer for prompt, answer in rows.train]
        judged = "likelihood" in settings.judges
        tokens = 2 * sum(prompts)  # of the candidate and of the rewriting
        seconds = self.generate(prompts, new, settings.batch_size, programs=2)
        for _ in range(settings.rounds):
            seconds += self.generate([prompt + new for prompt in prompts], new, settings.batch_size)
            seconds += self.forward(tokens) if judged else 0.0
        return seconds

    def method(self, name: str, rows: RowLengths, steps: int) -> float:
        """Training: 2 FLOPs a parameter and token forward, 4 backward, 2 more with remat; the optimiser's reading."""
        train = self.config.train
        size = train.batch_size
        prompt, answer = (fmean(lengths) for lengths in zip(*rows.train, strict=True))
        passes = 4 if self.config.model.remat else 3
        tokens, teacher, rollout = size * (prompt + answer), 0.0, 0.0
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
        """Of one model: answers to both kinds of prompts, likelihoods of gold answers, divergence from the base."""
        settings = self.config.evaluate
        scored = sum(prompt + answer for prompt, answer in rows.test)
        diverged = 2 * (sum(rows.general) + len(rows.general) * settings.general_new_tokens)
        return (
            self.generate([prompt for prompt, _ in rows.test], settings.max_new_tokens, settings.batch_size)
            + self.generate(rows.general, settings.general_new_tokens, settings.batch_size)
            + self.forward(scored + diverged)
        )

    def memory(self, rows: RowLengths, sharing: int, data: int) -> float:
        """Of one device: weights, what the training keeps, and the larger of activations and caches."""
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
    """Two digits of it.

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
    """Two digits of it.

    Example:
      >>> _time(42), _time(250), _time(9000), _time(500_000)
      ('42 s', '4.2 min', '2.5 h', '5.8 days')
    """
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            value = seconds / size
            return f"{value:.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"
    return f"{seconds:.0f} s"
