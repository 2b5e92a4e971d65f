"""The plan of a run: its phases, the largest batch, hours and cost, and what would help where that is needed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from raft_jax.config import Config
from raft_jax.plan.alternatives import Tried, try_alternatives
from raft_jax.plan.chips import Slice
from raft_jax.plan.facts import Facts, name_of
from raft_jax.plan.measure import Measure, Report
from raft_jax.plan.phases import Phase, all_fit

HOUR = 3600.0


@dataclass(frozen=True)
class Largest:
    """The largest batch that fits.

    Attributes:
      rows: of a batch; None if not known.
      how: what it was computed from.
    """

    rows: int | None
    how: str


@dataclass
class Plan:
    """What a run will take.

    Attributes:
      measure: config, chips and model.
      phases: the programs of the run, each once.
      runs: how often each phase's program runs in the run, by its name; None if not known.
      largest: the largest batch size.
      tried: what would help, where something is needed.
      price: USD of a chip-hour, if it is given.
    """

    measure: Measure
    phases: list[Phase]
    runs: dict[str, float | None]
    largest: Largest | None = None
    tried: list[Tried] = field(default_factory=list)
    price: float | None = None

    @property
    def fits(self) -> bool | None:
        """Whether every phase fits; None if the memory is not known."""
        return all_fit(self.phases, self.measure.slice.chip.memory)

    @property
    def hours(self) -> float | None:
        """Hours of the whole run at least; None if it does not fit, or the number of rows is not known."""
        return self._hours([phase.bound if phase.slowest else None for phase in self.phases])

    @property
    def estimated_hours(self) -> float | None:
        """The same by the TPU compiler's own estimate, as if nothing overlapped."""
        return self._hours([phase.estimated(self.measure.slice.chip.clock) for phase in self.phases])

    def _hours(self, seconds: list[float | None]) -> float | None:
        total = 0.0
        for phase, once in zip(self.phases, seconds, strict=True):
            runs = self.runs[phase.name]
            if self.fits is False or runs is None or once is None:
                return None
            total += runs * once
        return total / HOUR

    def chip_hours(self, hours: float | None) -> float | None:
        """Hours times chips."""
        return None if hours is None else hours * self.measure.num_chips

    def cost(self, hours: float | None) -> float | None:
        """USD of so many hours."""
        chip_hours = self.chip_hours(hours)
        return None if self.price is None or chip_hours is None else self.price * chip_hours

    def _time_as_json(self, hours: float | None) -> dict[str, float | None]:
        return {"hours": hours, "chip_hours": self.chip_hours(hours), "cost_usd": self.cost(hours)}

    def as_json(self) -> dict[str, Any]:
        """The plan as values that JSON can hold."""
        measure, chips = self.measure, self.measure.slice
        return {
            "model": name_of(measure.config),
            "num_parameters": num_parameters(measure),
            "topology": chips.topology,
            "chips": measure.num_chips,
            "chip": asdict(chips.chip),
            "mesh": dict(measure.mesh.shape),
            "batch_size": measure.config.train.batch_size,
            "notes": measure.facts.notes,
            "fits": self.fits,
            "phases": [self._phase_as_json(phase) for phase in self.phases],
            "largest_batch_size": self.largest and asdict(self.largest),
            "at_least": self._time_as_json(self.hours),
            "by_the_compiler": self._time_as_json(self.estimated_hours),
            "alternatives": [asdict(tried) for tried in self.tried],
        }

    def _phase_as_json(self, phase: Phase) -> dict[str, Any]:
        reading = phase.reading
        return {
            "name": phase.name,
            "rows": phase.rows,
            "bytes": phase.parts,
            "total_bytes": phase.total,
            "compiler_bytes": reading and reading.total,
            "fits": phase.fits(self.measure.slice.chip.memory),
            "collective_bytes": None if reading is None or reading.refused else reading.collectives,
            "flops": phase.flops,
            "seconds": phase.seconds,
            "slowest": phase.slowest,
            "seconds_by_the_compiler": phase.estimated(self.measure.slice.chip.clock),
            "compile_seconds": reading and reading.seconds,
            "runs": self.runs[phase.name],
        }


def num_parameters(measure: Measure) -> int:
    """Parameters of the model, without the vocabulary's padding."""
    from raft_jax.estimate import model_size

    return model_size(measure.facts.decoder, measure.config).num_parameters


def make_plan(
    config: Config, chips: Slice, report: Report, *, rows: int | None = None, price: float | None = None
) -> Plan:
    """Plans a run: its phases, and how often each runs.

    Args:
      config: of the run.
      chips: that it would run on.
      report: is told what is compiled next.
      rows: number of training rows, where the data is not there.
      price: USD of a chip-hour.

    Raises:
      InputError: mesh, batch or model do not divide, or there is no config.json.
    """
    measure = Measure(Facts.of(config, rows), chips, report)
    phases = _phases(measure)
    return Plan(measure, phases, _runs(measure, phases), price=price)


def look_further(plan: Plan, quick: bool = False) -> None:
    """Adds the largest batch and, where the run does not fit or training waits for what chips send, what would help.

    With `quick`, nothing more is compiled: only what might help a run that does not fit is added.
    """
    if quick:
        if plan.fits is False:
            plan.tried = try_alternatives(plan.measure, _training(plan), False, compiled=False)
        return
    if plan.measure.trained_methods:
        plan.largest = _largest(plan.measure, plan)
    if plan.fits is False or any(phase.slowest == "interconnect" for phase in _training(plan)):
        plan.tried = try_alternatives(plan.measure, _training(plan), plan.fits is not False)


def _phases(measure: Measure) -> list[Phase]:
    """The phases in their order in a run."""
    phases = [measure.refine()] if measure.facts.refines_itself else []
    for method in measure.different_methods:
        if method.distils and "rollout" not in [phase.name for phase in phases]:
            phases.append(measure.rollout(method))
        phases.append(measure.step(method))
    return [*phases, measure.evaluate()]


def _training(plan: Plan) -> list[Phase]:
    """The phases of a training step of the first method."""
    first = f"train {plan.measure.first_method.name}"
    return [phase for phase in plan.phases if phase.name in ("rollout", first)]


def _runs(measure: Measure, phases: list[Phase]) -> dict[str, float | None]:
    """How often the program of each phase runs; every rewriting is taken to be fused, in all rounds."""
    config, facts, rows = measure.config, measure.facts, measure.facts.num_train
    steps = None if rows is None else config.train.num_steps(rows // config.train.batch_size)
    settings = config.evaluate
    _, held_out = measure.places(settings.batch_size, facts.num_test)
    general = measure.places(settings.batch_size, facts.num_general)[1] if facts.num_general else 0
    answered = (held_out or 0) + (general or 0) * settings.general_new_tokens / settings.max_new_tokens
    counts: dict[str, float | None] = {"evaluate": (1 + len(config.methods)) * answered}
    texts = None if rows is None else rows * (1 + config.refine.rounds)
    counts["refine"] = measure.places(config.refine.batch_size, texts)[1]
    for phase in phases:
        if phase.name not in counts:
            counts[phase.name] = steps and steps * _methods_of(measure, phase.name)
    return counts


def _methods_of(measure: Measure, phase: str) -> int:
    """The number of methods that a phase of training is for."""
    if phase == "rollout":
        return sum(method.distils for method in measure.trained_methods)
    first = next(method for method in measure.different_methods if phase == f"train {method.name}")
    return sum(
        (method.terms, method.target == "none", method.teacher_sees_answer)
        == (first.terms, first.target == "none", first.teacher_sees_answer)
        for method in measure.trained_methods
    )


def _largest(measure: Measure, plan: Plan) -> Largest | None:
    """The largest batch that fits, from the bytes per row of the train step at two batch sizes, and the rollout's
    cache."""
    memory, method, size = measure.slice.chip.memory, measure.first_method, measure.config.train.batch_size
    step = next(phase for phase in plan.phases if phase.name == f"train {method.name}")
    if memory is None or step.reading is None:
        return None
    unit = measure.mesh.shape["data"] * measure.mesh.shape["fsdp"] * measure.config.train.num_micro_batches
    refused = step.reading.refused
    other_size = size // 2 // unit * unit if refused else 2 * size
    if not other_size or other_size == size:
        return Largest(None, f"a batch of {size}, the smallest that divides over the mesh, does not fit")
    other = measure.step(method, batch_size=other_size)
    assert other.reading is not None
    per_row = (other.total - step.total) / (other_size - size)
    how = f"computed from the train step's bytes at {size} and {other_size} rows"
    limits = [(memory - step.total) / per_row + size if per_row > 0 else float("inf")]
    for phase in plan.phases:
        if phase.name == "rollout" and phase.reading is not None and not phase.reading.refused:
            of_cache = phase.parts["cache"] / phase.rows
            limits.append(size + (memory - phase.total) / of_cache)
            how += " and the rollout's cache"
    most = min(limits)
    if most == float("inf"):
        return Largest(None, f"{how}: they do not grow")
    return Largest(max(0, int(most // unit * unit)), how)
