"""What would help a run that does not fit its chips, or waits for what they send to each other, tried one by one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from raft_jax.config import Config, MeshConfig
from raft_jax.errors import InputError
from raft_jax.plan.chips import find_slice
from raft_jax.plan.measure import Measure, with_train
from raft_jax.plan.phases import Phase, all_fit

MOST_TRIED = 4
SMALL_CHUNK = 128  # train.loss_chunk_size
LORA_RANK = 16
ROOM = 0.75  # of a chip's memory that may be taken before anything is computed, for a larger slice to be tried


@dataclass(frozen=True)
class Tried:
    """A change, and what it gave.

    Attributes:
      change: settings, or another topology.
      fits: whether the programs of a training step fit then; None if that is not known.
      total: bytes of a device, in the phase that has most.
      seconds: of a training step, at least; None where it was not compiled.
      estimated: the same by the TPU compiler's own estimate; None where there is none.
      before, estimated_before: the same of the plan itself.
      note: why it was not compiled, or cannot be.
    """

    change: str
    fits: bool | None = None
    total: float | None = None
    seconds: float | None = None
    estimated: float | None = None
    before: float | None = None
    estimated_before: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Candidate:
    """A change that may help: its settings as words, the config with it, and other chips, if it is these."""

    change: str
    config: Config
    topology: str | None = None


def try_alternatives(measure: Measure, phases: Sequence[Phase], fits: bool, compiled: bool = True) -> list[Tried]:
    """Tries at most `MOST_TRIED` changes.

    Args:
      measure: of the plan.
      phases: those of a training step.
      fits: whether the plan fits, so that time is what has to be helped.
      compiled: whether the programs of what leaves room are compiled.
    """
    clock = measure.slice.chip.clock
    before = {"before": _seconds(phases), "estimated_before": _estimated(phases, clock)}
    candidates = list(of_time(measure) if fits else of_memory(measure))[:MOST_TRIED]
    return [_try(measure, candidate, before, compiled) for candidate in candidates]


def _seconds(phases: Sequence[Phase]) -> float | None:
    """Seconds of a training step; None if not all of it was compiled."""
    if any(phase.reading is None or phase.reading.refused for phase in phases):
        return None
    return sum(phase.bound for phase in phases)


def _estimated(phases: Sequence[Phase], clock: float | None) -> float | None:
    """The same by the TPU compiler's own estimate; None if there is none."""
    seconds = [phase.estimated(clock) for phase in phases]
    return None if None in seconds else sum(value for value in seconds if value is not None)


def of_time(measure: Measure) -> Iterator[Candidate]:
    """Meshes on which chips send less: the model is split along its heads, too, and along its width less often."""
    size, now = measure.mesh.size, measure.mesh.shape
    for tensor in (4, 8):
        fsdp = now["fsdp"] * now["tensor"] // tensor
        if fsdp and tensor != now["tensor"] and size % (fsdp * tensor) == 0:
            yield _on_mesh(measure.config, size // (fsdp * tensor), fsdp, tensor)


def of_memory(measure: Measure) -> Iterator[Candidate]:
    """Changes that take less memory of each chip; those of activations only where these are the trouble."""
    config, size, now = measure.config, measure.mesh.size, measure.mesh.shape
    if now["data"] > 1:
        yield _on_mesh(config, 1, size // now["tensor"], now["tensor"])
    if measure.worth_compiling(measure.static_bytes):
        if not config.model.remat:
            yield Candidate("model.remat=true", replace(config, model=replace(config.model, remat=True)))
        if (config.train.loss_chunk_size or 512) > SMALL_CHUNK:
            yield Candidate(f"train.loss_chunk_size={SMALL_CHUNK}", with_train(config, loss_chunk_size=SMALL_CHUNK))
        if measure.programs(measure.first_method).num_rows % 2 == 0:
            count = 2 * config.train.num_micro_batches
            yield Candidate(f"train.num_micro_batches={count}", with_train(config, num_micro_batches=count))
    if not config.train.lora.rank and config.train.student_init is None:
        lora = replace(config.train.lora, rank=LORA_RANK)
        adapted = Candidate(f"train.lora.rank={LORA_RANK}", with_train(config, lora=lora))
        yield adapted
        if not _leaves_room(measure.changed(adapted.config), 1.0):
            yield from _larger(measure, adapted)
    yield from _larger(measure, Candidate("", config))


def _leaves_room(measure: Measure, share: float) -> bool:
    """Whether what a run takes at least is less than a share of each device's memory."""
    memory = measure.slice.chip.memory
    return memory is None or max(phase.total for phase in measure.least()) < share * memory


def _on_mesh(config: Config, data: int, fsdp: int, tensor: int) -> Candidate:
    change = f"mesh.data={data} mesh.fsdp={fsdp} mesh.tensor={tensor}"
    return Candidate(change, replace(config, mesh=MeshConfig(data, fsdp, tensor)))


def _larger(measure: Measure, candidate: Candidate) -> Iterator[Candidate]:
    """A candidate on the smallest larger slice of the same chips that leaves room; none if there is none."""
    config = candidate.config
    rows = config.train.batch_size // config.train.num_micro_batches
    for name in measure.slice.larger():
        try:
            chips = find_slice(name, measure.slice.chip.memory)
            fsdp = math.gcd(rows, len(chips.devices))
            on_mesh = _on_mesh(config, 1, fsdp, len(chips.devices) // fsdp)
            room = _leaves_room(measure.changed(on_mesh.config, chips), ROOM)
        except InputError:
            continue
        if room:
            change = " ".join(filter(None, (candidate.change, f"--topology {name}", on_mesh.change)))
            yield Candidate(change, on_mesh.config, name)
            return


def _try(measure: Measure, candidate: Candidate, before: Mapping[str, float | None], compiled: bool) -> Tried:
    try:
        chips = measure.slice
        if candidate.topology is not None:
            chips = find_slice(candidate.topology, chips.chip.memory)
        changed = measure.changed(candidate.config, chips)
        least = max(changed.least(), key=lambda phase: phase.total)
    except InputError as error:
        return Tried(candidate.change, note=str(error), **before)
    memory = chips.chip.memory
    if not compiled or least.fits(memory) is False:
        note = f"{least.name} takes that at least; not compiled"
        return Tried(candidate.change, least.fits(memory), least.total, note=note, **before)
    measure.say(f"trying {candidate.change}")
    method = changed.first_method
    phases = [changed.step(method)]
    if method.distils and phases[0].fits(memory) is not False:
        phases.append(changed.rollout(method))
    most, seconds = max(phase.total for phase in phases), _seconds(phases)
    return Tried(
        candidate.change, all_fit(phases, memory), most, seconds, _estimated(phases, chips.chip.clock), **before
    )
