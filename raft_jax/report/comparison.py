"""What a comparison found: the methods at equal domain quality, their frontiers, and each at its best value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np

from raft_jax.config import CompareConfig
from raft_jax.errors import InputError
from raft_jax.evaluate.statistics import (
    FrontierDifference,
    Points,
    area_difference,
    equal_domain_difference,
    frontier_area,
    general_at,
)
from raft_jax.files import is_there, read_text
from raft_jax.grid import FOLDER, SEED, read_record
from raft_jax.report.folder import RunRecords, label, read_run
from raft_jax.report.verdict import ACCURACY, DIVERGENCE, DOMAIN, OPEN, Measure, scores_of
from raft_jax.run_folder import RunFolder
from raft_jax.scores import ModelScores
from raft_jax.settings_text import flat

REFERENCE = "sft"
SCORE = "dev_gold_logprob"  # in metrics.jsonl, with train.eval_every
FEWEST_REACHED = 0.9  # share of the resamples that must reach the target for a difference to be told


@dataclass(frozen=True)
class CellRecords:
    """One run of a comparison; `value` is that of the setting that is varied."""

    name: str
    value: Any
    seed: int
    run: RunRecords


@dataclass(frozen=True)
class Comparison:
    """The contents of a comparison's folder, finished or not.

    Attributes:
      shared: of the run folder itself.
      over: the setting that is varied beside the seed.
      cells: those that have begun.
      missing: names of the cells that have not.
      diverged: (cell, method, why) of the models that training gave up.
    """

    shared: RunRecords
    over: str
    cells: tuple[CellRecords, ...]
    missing: tuple[str, ...]
    diverged: tuple[tuple[str, str, str], ...]

    @property
    def folder(self) -> RunFolder:
        return self.shared.folder

    @cached_property
    def base(self) -> ModelScores | None:
        runs = (self.shared, *(cell.run for cell in self.cells))
        return next((run.scores["base"] for run in runs if "base" in run.scores), None)

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """The methods that have scores, in the order of reports."""
        return tuple(dict.fromkeys(name for cell in self.cells for name in cell.run.models if name != "base"))

    @property
    def reference(self) -> str:
        return REFERENCE if REFERENCE in self.methods or not self.methods else self.methods[0]

    @property
    def seeds(self) -> list[int]:
        return sorted({cell.seed for cell in self.cells})

    @property
    def gain(self) -> float:
        return flat(self.shared.config).get("compare.gain", CompareConfig.gain)

    def of(self, method: str) -> dict[Any, dict[int, ModelScores]]:
        """A method's scores by value and seed; values in the order of the cells."""
        by_value: dict[Any, dict[int, ModelScores]] = {}
        for cell in self.cells:
            if method in cell.run.scores:
                by_value.setdefault(cell.value, {})[cell.seed] = cell.run.scores[method]
        return by_value


def read_comparison(run_dir: Path) -> Comparison | None:
    """Reads a comparison; None if the run folder has none.

    Raises:
      InputError: a file in it is damaged.
    """
    record = read_record(run_dir)
    if record is None:
        return None
    cells, missing, diverged = [], [], []
    for name, values in record.cells.items():
        folder = run_dir / FOLDER / name
        try:
            run = read_run(folder) if is_there(folder / "config.yaml") else None
        except InputError as error:
            raise InputError(f"{error} (a cell of the comparison in {run_dir})") from error
        if run is None:
            missing.append(name)
            continue
        cells.append(CellRecords(name, values[record.over], values[SEED], run))
        for path in sorted(folder.glob("*/diverged.txt")):
            diverged.append((name, path.parent.name, read_text(path).strip().partition(": ")[2]))
    return Comparison(read_run(run_dir), record.over, tuple(cells), tuple(missing), tuple(diverged))


def sign(measure: Measure) -> int:
    """-1 for a measure of which less is better."""
    return -1 if measure is DIVERGENCE else 1


def with_unit(measure: Measure) -> str:
    """A measure's name, and its unit if it has one, as the label of an axis."""
    return f"{measure.name},{measure.unit}" if measure.unit else measure.name


def interval_text(measure: Measure, low: float, high: float) -> str:
    """The ends of an interval of differences, in the measure's own direction."""
    ends = sorted((sign(measure) * low, sign(measure) * high))
    return " to ".join(f"{end:+.{measure.digits}f}" for end in ends)


@dataclass(frozen=True)
class Frontier:
    """A method's scores at each value that all seeds were scored at, the base model's before them.

    Both are such that more is better: a divergence has a minus sign.
    """

    method: str
    values: tuple[Any, ...]
    points: Points

    @property
    def domain_P(self) -> np.ndarray:
        return self.points.domain.mean((1, 2))

    @property
    def general_P(self) -> np.ndarray:
        return self.points.general.mean((1, 2))


@dataclass(frozen=True)
class Standing:
    """A method against the reference, by one domain and one general measure.

    Attributes:
      best: the highest domain score, of any value.
      general: the general score at the target; NaN if the method does not reach it, None if there is no target.
      difference: of it to the reference's; None for the reference and without a target.
      area: under the frontier, as `frontier_area`; None if no method gains anything.
      area_difference: to the reference's.
    """

    method: str
    best: float
    general: float | None
    difference: FrontierDifference | None
    area: float | None
    area_difference: FrontierDifference | None


@dataclass(frozen=True)
class Yardstick:
    """The methods' frontiers by one domain measure and one general measure.

    Attributes:
      target: the domain score at which methods are compared; None if the reference gains nothing.
      num_domain, num_general: the questions that every model has a score of.
    """

    domain: Measure
    general: Measure
    frontiers: tuple[Frontier, ...]
    standings: tuple[Standing, ...]
    target: float | None
    num_domain: int
    num_general: int

    @property
    def base(self) -> tuple[float, float]:
        first = self.frontiers[0]
        return first.domain_P[0], first.general_P[0]


def yardsticks(comparison: Comparison) -> list[Yardstick]:
    """Every pair of a domain and a general measure that all models have scores of."""
    pairs = [(domain, general) for domain in DOMAIN for general in (DIVERGENCE, ACCURACY, OPEN)]
    by_pair = (_yardstick(comparison, *pair) for pair in pairs)
    return [yardstick for yardstick in by_pair if yardstick is not None]


def _yardstick(comparison: Comparison, domain: Measure, general: Measure) -> Yardstick | None:
    if comparison.base is None:
        return None
    complete = {
        method: {
            value: by_seed for value, by_seed in comparison.of(method).items() if len(by_seed) == len(comparison.seeds)
        }
        for method in comparison.methods
    }
    complete = {method: values for method, values in complete.items() if values}
    if not complete:
        return None
    models = [model for values in complete.values() for by_seed in values.values() for model in by_seed.values()]
    ids = [_shared([comparison.base, *models], measure) for measure in (domain, general)]
    if min(map(len, ids)) < 2:
        return None

    def scores_PSQ(values: Mapping[Any, Mapping[int, ModelScores]], measure: Measure, ids: Sequence[str]) -> np.ndarray:
        rows = [[comparison.base] * len(comparison.seeds)]
        rows += [[by_seed[seed] for seed in comparison.seeds] for by_seed in values.values()]
        scores = [[scores_of(model, measure) for model in row] for row in rows]
        shared_scores = [[[of_model[id] for id in ids] for of_model in row] for row in scores]
        return sign(measure) * measure.scale * np.array(shared_scores)

    frontiers = tuple(
        Frontier(
            method,
            tuple(values),
            Points(scores_PSQ(values, domain, ids[0]), scores_PSQ(values, general, ids[1])),
        )
        for method, values in complete.items()
    )
    target, standings = _standings(frontiers, comparison.reference, comparison.gain)
    return Yardstick(domain, general, frontiers, standings, target, *map(len, ids))


def _shared(models: Sequence[ModelScores], measure: Measure) -> list[str]:
    """The questions that every model has a score of."""
    first, *others = (scores_of(model, measure) for model in models)
    return [id for id in first if all(id in other for other in others)]


def _standings(frontiers: Sequence[Frontier], reference: str, gain: float) -> tuple[float | None, tuple[Standing, ...]]:
    """The target, and each method's standing."""
    by_name = {frontier.method: frontier for frontier in frontiers}
    to, base = by_name.get(reference), frontiers[0].domain_P[0]
    top = None if to is None else to.domain_P.max()
    target = None if top is None or top <= base else float(base + gain * (top - base))
    highest = max(frontier.domain_P.max() for frontier in frontiers)
    floor = float(min(frontier.general_P.min() for frontier in frontiers))
    area = {"domain_range": (float(base), float(highest)), "floor": floor}

    def standing(frontier: Frontier) -> Standing:
        pair, is_other = (frontier.domain_P, frontier.general_P), to is not None and frontier is not to
        return Standing(
            frontier.method,
            float(frontier.domain_P.max()),
            None if target is None else general_at(*pair, target),
            equal_domain_difference(to.points, frontier.points, target) if is_other and target is not None else None,
            frontier_area(*pair, **area) if highest > base else None,
            area_difference(to.points, frontier.points, **area) if is_other and highest > base else None,
        )

    return target, tuple(map(standing, frontiers))


def finding(standing: Standing, yardstick: Yardstick, reference: str) -> str:
    """One sentence on a method against the reference at equal domain quality, and whether it is more than noise."""
    name, other, general = label(standing.method), label(reference), yardstick.general
    if standing.difference is None:
        return f"{other} gains nothing in {yardstick.domain.name}: there is no equal quality to compare at"
    if standing.general is not None and math.isnan(standing.general):
        return (
            f"{name} does not reach this {yardstick.domain.name} at any value tried (add others, or lower compare.gain)"
        )
    (estimate, low, high), reached = standing.difference
    interval = interval_text(general, low, high)
    if reached < FEWEST_REACHED:
        return f"{general.name}: too uncertain to tell, {reached:.0%} of the resamples reach the target"
    if low <= 0 <= high:
        return f"no difference beyond noise in {general.name} ({interval}{general.unit})"
    word = "less" if (estimate > 0) == (sign(general) < 0) else "more"
    amount = abs(estimate)
    kept = "better" if estimate > 0 else "worse"
    return f"{kept}: {amount:.{general.digits}f}{general.unit} {word} {general.name} ({interval})"


def answer(comparison: Comparison, all_yardsticks: Sequence[Yardstick]) -> str:
    """The comparison in a sentence: RAFT, or the first other method, against the reference by the first yardsticks."""
    others = [name for name in comparison.methods if name != comparison.reference]
    if not all_yardsticks or not others:
        return ""
    name = "raft" if "raft" in others else others[0]
    domain = all_yardsticks[0].domain
    parts = []
    for yardstick in all_yardsticks:
        standing = next((one for one in yardstick.standings if one.method == name), None)
        if yardstick.domain is domain and standing is not None:
            parts.append(finding(standing, yardstick, comparison.reference))
    parts = list(dict.fromkeys(parts))
    where = (
        f"Where {domain.name} is equal, at {comparison.gain:.0%} of what {label(comparison.reference)} gains at best, "
    )
    return f"{where}{label(name)} against {label(comparison.reference)}: {'; '.join(parts)}."


def limits(comparison: Comparison, all_yardsticks: Sequence[Yardstick]) -> list[str]:
    """What the comparison cannot say."""
    lines = []
    if (count := len(comparison.seeds)) == 1:
        lines.append("One seed: the intervals say what other questions would change, not what another seed would.")
    elif 1 < count < 5:
        lines.append(f"{count} seeds: intervals over so few are somewhat too narrow.")
    if all_yardsticks and max(len(frontier.values) for frontier in all_yardsticks[0].frontiers) < 3:
        lines.append(f"Fewer than three values of {comparison.over}: the frontiers have few points.")
    if comparison.missing:
        lines.append(f"{len(comparison.missing)} runs are still missing; the same command goes on.")
    for cell, method, why in comparison.diverged:
        lines.append(f"{label(method)} diverged at {cell}: {why}.")
    return lines


@dataclass(frozen=True)
class Best:
    """A method at the value that was chosen for it.

    Attributes:
      value: of the setting that is varied.
      models: its scores, one for each seed.
      seconds, tokens, memory: of training, median over seeds; memory is the peak of a process or device in bytes.
    """

    method: str
    value: Any
    models: tuple[ModelScores, ...]
    seconds: float | None
    tokens: float | None
    memory: float | None


def best_values(comparison: Comparison) -> tuple[list[Best], str]:
    """Each method at its best value, and how it was chosen: on the dev split if that was scored, else on the test."""
    dev: dict[tuple[Any, str], list[float]] = {}
    for cell in comparison.cells:
        for method, lines in cell.run.metrics.items():
            if lines and SCORE in lines[-1]:
                dev.setdefault((cell.value, method), []).append(lines[-1][SCORE])
    measure = next((one for one in DOMAIN if _is_scored(comparison, one)), DOMAIN[1])
    best = []
    for method in comparison.methods:
        values = comparison.of(method)

        def quality(value: Any, method: str = method, values=values) -> float:
            if (value, method) in dev:
                return fmean(dev[value, method])
            return fmean(_mean(model, measure) for model in values[value].values())

        value = max(values, key=quality)
        cells = [cell for cell in comparison.cells if cell.value == value and method in cell.run.scores]
        of_method = ("train", method)
        timings = [one for cell in cells for one in cell.run.timings if (one.stage, one.method) == of_method]
        peaks = [
            peak
            for timing in timings
            if (peak := timing.machine.get("peak_device_memory") or timing.machine.get("peak_host_memory"))
        ]
        best.append(
            Best(
                method,
                value,
                tuple(values[value].values()),
                median(timing.seconds for timing in timings) if timings else None,
                median(timing.tokens for timing in timings) if timings else None,
                median(peaks) if peaks else None,
            )
        )
    how = (
        "chosen by the log-likelihood of the gold answers of the dev split"
        if dev
        else f"chosen by the {measure.name} of the very questions that are shown, which flatters every method; a dev "
        "split and train.eval_every avoid that"
    )
    return best, how


def _is_scored(comparison: Comparison, measure: Measure) -> bool:
    """Whether some method has the scores of a measure at some value, from all its seeds."""
    values = (by_seed.values() for method in comparison.methods for by_seed in comparison.of(method).values())
    return any(all(scores_of(model, measure) for model in models) for models in values)


def _mean(model: ModelScores, measure: Measure) -> float:
    values = scores_of(model, measure).values()
    return fmean(values) if values else -math.inf
