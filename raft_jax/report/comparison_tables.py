"""The numbers of a comparison as tables of text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from raft_jax.evaluate.statistics import FrontierDifference
from raft_jax.report.comparison import (
    SCORE,
    Best,
    Comparison,
    Yardstick,
    answer,
    best_values,
    interval_text,
    limits,
    read_comparison,
    sign,
    yardsticks,
)
from raft_jax.report.folder import label
from raft_jax.report.summary import MISSING, Table, number, print_table, visible_text
from raft_jax.report.verdict import ACCURACY, DIVERGENCE, DOMAIN, OPEN, Measure, scores_of
from raft_jax.run_folder import shown
from raft_jax.scores import ModelScores

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console


def comparison_tables(comparison: Comparison) -> list[Table]:
    """For each pair of measures the methods at equal domain quality, then each at its best value, and every model."""
    all_yardsticks = yardsticks(comparison)
    standings = [standings_table(comparison, one) for one in all_yardsticks]
    return [*standings, best_table(comparison), points_table(comparison, all_yardsticks)]


def print_comparison(run_dir: Path, console: Console) -> None:
    """Prints the answer, what it cannot say, and the tables by the first domain measure; the page has all."""
    from rich.text import Text

    comparison = read_comparison(run_dir)
    if comparison is None:
        return
    all_yardsticks = yardsticks(comparison)
    console.print(Text(visible_text("\n" + (answer(comparison, all_yardsticks) or "No method has been compared yet."))))
    for line in limits(comparison, all_yardsticks):
        console.print(Text(visible_text(line), style="dim"))
    first = [standings_table(comparison, one) for one in all_yardsticks if one.domain is all_yardsticks[0].domain]
    for table in (*first, best_table(comparison)):
        console.print(Text(visible_text(f"\n{table.title}"), style="bold"))
        print_table(table, console)
    console.print(Text(visible_text(f"\nreport  {shown(comparison.folder.comparison_html)}")), soft_wrap=True)


def standings_table(comparison: Comparison, yardstick: Yardstick) -> Table:
    """The methods at equal domain quality, and by the areas under their frontiers."""
    domain, general, other = yardstick.domain, yardstick.general, label(comparison.reference)
    rows = []
    for one in yardstick.standings:
        rows.append(
            (
                label(one.method),
                _shown(domain, one.best),
                MISSING if one.general is None else _general(general, one.general),
                _difference(general, one.difference),
                "" if one.difference is None else f"{one.difference.reached:.0%}",
                MISSING if one.area is None else _general(general, one.area),
                _difference(general, one.area_difference),
            )
        )
    base = f"the base model has {_shown(domain, yardstick.base[0])}"
    if yardstick.target is None:
        at = f"{other} gains nothing, so there is no equal quality to compare at; {base}."
    else:
        at = (
            f"Equal quality: {domain.name} {_shown(domain, yardstick.target)}, {comparison.gain:.0%} of what {other} "
            f"gains at best; {base}. Between two values of {comparison.over} a method is interpolated."
        )
    return Table(
        name=f"standings-{domain.key}-{general.key}",
        title=f"{general.name} at equal {domain.name}",
        columns=(
            "method",
            "best in the domain",
            "at equal quality",
            f"against {other}",
            "reached",
            "over the frontier",
            f"against {other}",
        ),
        rows=tuple(rows),
        methods=tuple(one.method for one in yardstick.standings),
        note=f"{at} Brackets: 95 % intervals over {yardstick.num_domain} domain and {yardstick.num_general} general "
        f"questions and {len(comparison.seeds)} seed(s); reached: share of the resamples in which both reach it. "
        "Over the frontier: the mean between the base model's domain score and the best of all. "
        f"{'Less' if general is DIVERGENCE else 'More'} {general.name} is better.",
    )


def _shown(measure: Measure, value: float) -> str:
    return f"{value:.{measure.digits}f}"


def _general(measure: Measure, value: float) -> str:
    return "not reached" if math.isnan(value) else _shown(measure, abs(value) if sign(measure) < 0 else value)


def _difference(measure: Measure, difference: FrontierDifference | None) -> str:
    """A difference as less or more of the measure, with its interval."""
    if difference is None:
        return ""
    if math.isnan(difference.interval.estimate):
        return MISSING
    estimate, low, high = difference.interval
    return f"{sign(measure) * estimate:+.{measure.digits}f} ({interval_text(measure, low, high)})"


# (column, what it shows of a model); None where a model has no such score.
SCORES: tuple[tuple[str, Callable[[ModelScores], float | None], int], ...] = (
    ("domain accuracy", lambda model: model.domain.accepted.mean, 3),
    ("gold log-likelihood", lambda model: model.domain.gold_logprob.mean, 3),
    ("similarity", lambda model: model.domain.similarity.mean, 3),
    ("token F1", lambda model: model.domain.token_f1.mean, 3),
    ("checks passed", lambda model: model.domain.checked.mean, 3),
    ("divergence", lambda model: model.general.divergence.mean, 4),
    ("domain divergence", lambda model: model.domain.divergence.mean, 4),
    ("teacher gap", lambda model: model.domain.teacher_gap.mean, 3),
    ("general accuracy", lambda model: model.general.accuracy.mean, 3),
    ("open prompts accepted", lambda model: model.general.accepted.mean, 3),
    ("weight distance", lambda model: model.weight_distance.mean, 4),
    ("answers that end", lambda model: model.domain.writing.ended.mean, 2),
)
KEPT = ("general accuracy", "open prompts accepted")  # what retention and change are of, with the tasks


def best_table(comparison: Comparison) -> Table:
    """Each method at one value, as the paper's tables have it; with what it took."""
    chosen, how = best_values(comparison)
    base = comparison.base
    if base is None or not chosen:
        return Table("best", "Each method at its best value", (), (), ())
    models = {"base": (base,), **{one.method: one.models for one in chosen}}
    columns = [(name, [_mean_of(read, group, digits) for group in models.values()]) for name, read, digits in SCORES]
    columns += _tasks(models)
    kept = {name: _kept(group) for name, group in models.items()}
    columns.append(("retention", [_ratio(kept[name], kept["base"]) for name in models]))
    if comparison.reference in kept:
        to = label(comparison.reference)
        columns.append((f"against {to}", [_change(kept[name], kept[comparison.reference]) for name in models]))
    columns += _cost(comparison, chosen)
    columns = [(name, cells) for name, cells in columns if any(cell != MISSING for cell in cells)]
    values = [MISSING, *(value_text(one.value) for one in chosen)]
    rows = zip(map(label, models), values, *(cells for _, cells in columns), strict=True)
    return Table(
        name="best",
        title="Each method at its best value",
        columns=("model", comparison.over.rpartition(".")[2], *(name for name, _ in columns)),
        rows=tuple(rows),
        methods=tuple(models),
        note=f"The value of {comparison.over} is {how}. Means over the seeds ± their standard deviation. Retention: "
        "mean ratio of general accuracy, accepted answers and tasks to the base model's; against "
        f"{label(comparison.reference)}: mean relative change of the same (the paper's App. G). Time and memory are "
        "those of one training.",
    )


def _mean_of(read: Callable[[ModelScores], float | None], models: Sequence[ModelScores], digits: int) -> str:
    values = [value for model in models if (value := read(model)) is not None]
    if not values:
        return MISSING
    spread = f" ±{number(stdev(values), digits)}" if len(values) > 1 else ""
    return number(fmean(values), digits) + spread


def _tasks(models: dict[str, Sequence[ModelScores]]) -> list[tuple[str, list[str]]]:
    """A column for the first metric of each task of lm-evaluation-harness."""
    names = dict.fromkeys(task for group in models.values() for model in group for task in model.tasks)
    return [
        (
            task.partition(":")[0],
            [_mean_of(lambda model, task=task: _task(model, task), group, 3) for group in models.values()],
        )
        for task in names
    ]


def _task(model: ModelScores, task: str) -> float | None:
    metrics = model.tasks.get(task)
    return next(iter(metrics.values())).value if metrics else None


def _kept(models: Sequence[ModelScores]) -> dict[str, float]:
    """The scores of `KEPT` and each task's first metric, mean over seeds."""
    names = dict.fromkeys(task for model in models for task in model.tasks)
    scores = {task: [value for model in models if (value := _task(model, task)) is not None] for task in names}
    for name, read, _ in SCORES:
        if name in KEPT:
            scores[name] = [value for model in models if (value := read(model)) is not None]
    return {name: fmean(values) for name, values in scores.items() if values}


def _ratio(scores: dict[str, float], to: dict[str, float]) -> str:
    ratios = [value / to[name] for name, value in scores.items() if to.get(name)]
    return f"{fmean(ratios):.1%}" if ratios else MISSING


def _change(scores: dict[str, float], to: dict[str, float]) -> str:
    ratios = [value / to[name] - 1 for name, value in scores.items() if to.get(name)]
    return f"{fmean(ratios):+.1%}" if ratios else MISSING


def _cost(comparison: Comparison, chosen: Sequence[Best]) -> list[tuple[str, list[str]]]:
    """Seconds, tokens a second, memory, and the dev score after as much time as the reference took in all."""
    reference = next((one.seconds for one in chosen if one.method == comparison.reference), None)
    speeds = [one.tokens / one.seconds if one.tokens and one.seconds else None for one in chosen]
    gigabytes = [one.memory and one.memory / 1e9 for one in chosen]
    dev = [_at_time(comparison, one, reference) for one in chosen]
    within = f"dev log-likelihood within {number(reference, 0)} s"
    columns = (
        ("seconds", [one.seconds for one in chosen], 0),
        ("tokens/s", speeds, 0),
        ("peak GB", gigabytes, 2),
        (within, dev, 3),
    )
    return [(name, [MISSING, *(number(value, digits) for value in values)]) for name, values, digits in columns]


def _at_time(comparison: Comparison, one: Best, seconds: float | None) -> float | None:
    """The dev score of a method's last evaluation within a time, mean over seeds."""
    scores = []
    for cell in comparison.cells:
        if cell.value != one.value or seconds is None:
            continue
        passed, score = 0.0, None
        for line in cell.run.metrics.get(one.method, ()):
            passed += line.get("seconds", 0.0)
            if passed > seconds * 1.02:  # the reference's own time varies by as much
                break
            score = line.get(SCORE, score)
        scores += [] if score is None else [score]
    return fmean(scores) if scores else None


def points_table(comparison: Comparison, all_yardsticks: Sequence[Yardstick]) -> Table:
    """Every method at every value, mean over seeds."""
    used = {measure for one in all_yardsticks for measure in (one.domain, one.general)}
    measures = [measure for measure in (*DOMAIN, DIVERGENCE, ACCURACY, OPEN) if measure in used]
    rows, methods = [], []
    for name in comparison.methods:
        for value, by_seed in comparison.of(name).items():
            models = list(by_seed.values())
            cells = [_mean_of(partial(_read, measure=measure), models, measure.digits) for measure in measures]
            rows.append((label(name), value_text(value), str(len(by_seed)), *cells))
            methods.append(name)
    return Table(
        name="points",
        title="Every model",
        columns=("method", comparison.over.rpartition(".")[2], "seeds", *(measure.name for measure in measures)),
        rows=tuple(rows),
        methods=tuple(methods),
        note="Means over the seeds ± their standard deviation.",
    )


def value_text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _read(model: ModelScores, measure: Measure) -> float | None:
    values = scores_of(model, measure)
    return measure.scale * fmean(values.values()) if values else None
