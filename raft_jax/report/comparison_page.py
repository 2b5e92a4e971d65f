"""Writes `comparison.html`: one self-contained page on what a comparison found."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from raft_jax.grid import FOLDER
from raft_jax.report import charts
from raft_jax.report.comparison import (
    Best,
    Comparison,
    Frontier,
    Yardstick,
    answer,
    best_values,
    finding,
    limits,
    read_comparison,
    sign,
    with_unit,
    yardsticks,
)
from raft_jax.report.comparison_tables import best_table, points_table, standings_table
from raft_jax.report.figures import Figure, curves, distance
from raft_jax.report.folder import RunRecords, label
from raft_jax.report.page import answers_side_by_side, facts, render_page, write_page
from raft_jax.report.paper import paper_table
from raft_jax.report.verdict import Measure

KINDS = ["flagged", "lost", "gained"]


def write_comparison(run_dir: Path) -> Path | None:
    """Writes the page of a comparison, finished or not.

    Returns:
      The path of `comparison.html`; None if the run folder has no comparison.

    Raises:
      InputError: a file of the comparison is damaged.
    """
    comparison = read_comparison(run_dir)
    if comparison is None:
        return None
    return write_page(comparison.folder.comparison_html, render_comparison(comparison))


def render_comparison(comparison: Comparison) -> str:
    """The page of a comparison as HTML."""
    all_yardsticks = yardsticks(comparison)
    chosen, _ = best_values(comparison)
    at_best = _first_seed(comparison, chosen)
    models = at_best.models
    return render_page(
        "comparison.html.jinja",
        kicker="RAFT comparison",
        name=comparison.folder.path.resolve().name,
        answer=answer(comparison, all_yardsticks),
        limits=limits(comparison, all_yardsticks),
        reference=comparison.reference,
        findings=_findings(comparison, all_yardsticks),
        over=comparison.over,
        frontiers=[_frontier(comparison, one) for one in all_yardsticks],
        standings=[standings_table(comparison, one) for one in all_yardsticks],
        sweeps=_sweeps(comparison, all_yardsticks),
        best=best_table(comparison),
        training=[*curves(at_best), distance(at_best)],
        paper=paper_table(comparison),
        points=points_table(comparison, all_yardsticks),
        answers=_with_kinds({name: model.answers for name, model in models.items()}, "similarity"),
        general=_with_kinds({name: model.general_answers for name, model in models.items()}, "divergence"),
        kinds=KINDS,
        runs=[(cell.name, f"{FOLDER}/{quote(cell.name)}/report.html") for cell in comparison.cells],
        facts=facts(comparison.shared.config),
    )


def _findings(
    comparison: Comparison, all_yardsticks: Sequence[Yardstick]
) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """For each method but the reference: (domain measure, sentences) of each domain measure."""
    findings = []
    for name in comparison.methods:
        if name == comparison.reference:
            continue
        by_domain: dict[str, list[str]] = {}
        for one in all_yardsticks:
            for standing in one.standings:
                if standing.method == name:
                    by_domain.setdefault(one.domain.name, []).append(finding(standing, one, comparison.reference))
        findings.append((name, [(domain, list(dict.fromkeys(lines))) for domain, lines in by_domain.items()]))
    return findings


def _frontier(comparison: Comparison, one: Yardstick) -> Figure:
    heading = f"{one.domain.name} against {one.general.name}"
    paths, descriptions = [], []
    for frontier in one.frontiers:
        x, y = sign(one.general) * frontier.general_P, frontier.domain_P
        errors = (_errors(frontier.points.general), _errors(frontier.points.domain))
        paths.append(charts.Path(frontier.method, *(values.tolist() for values in (x, y, *errors))))
        descriptions.append(f"{label(frontier.method)} {_pairs(x, y)}")
    side = "left" if sign(one.general) < 0 else "right"
    svg = charts.paths(
        f"frontier-{one.domain.key}-{one.general.key}",
        f"{heading}: {'; '.join(descriptions)}",
        paths,
        x_label=with_unit(one.general),
        y_label=with_unit(one.domain),
        level=one.target,
    )
    caption = (
        f"Better is up and to the {side}. Every line begins at the base model and joins the values of "
        f"{comparison.over} in order. Bars are standard errors over questions."
    )
    caption += " Dashed: where the methods are compared." if one.target is not None else ""
    legend = tuple((charts.variable(frontier.method), label(frontier.method)) for frontier in one.frontiers)
    return Figure(heading, svg, caption, legend)


def _errors(scores_PSQ: np.ndarray) -> np.ndarray:
    """Standard errors over questions of the mean over seeds, [P]."""
    means_PQ = scores_PSQ.mean(axis=1)
    return means_PQ.std(axis=1, ddof=1) / math.sqrt(means_PQ.shape[1])


def _sweeps(comparison: Comparison, all_yardsticks: Sequence[Yardstick]) -> list[Figure]:
    """Each measure over the values, where these are numbers."""
    curves: dict[Measure, dict[str, tuple[Frontier, np.ndarray]]] = {}
    for one in all_yardsticks:
        for frontier in one.frontiers:
            curves.setdefault(one.domain, {})[frontier.method] = (frontier, frontier.domain_P)
            general_P = sign(one.general) * frontier.general_P
            curves.setdefault(one.general, {})[frontier.method] = (frontier, general_P)
    figures = [_sweep(comparison.over, measure, of) for measure, of in curves.items()]
    return [figure for figure in figures if figure is not None]


def _sweep(over: str, measure: Measure, of: Mapping[str, tuple[Frontier, np.ndarray]]) -> Figure | None:
    paths = list(_over_values(of.values()))
    if not paths:
        return None
    values = sorted({x for path in paths for x in path.x})
    description = "; ".join(f"{label(path.method)} {_pairs(path.x, path.y)}" for path in paths)
    svg = charts.paths(
        f"sweep-{measure.part}-{measure.key}",
        f"{measure.name} over {over}: {description}",
        paths,
        x_label=over,
        y_label=measure.name,
        log_x=values[0] > 0 and values[-1] > 5 * values[0],
        level=float(next(iter(of.values()))[1][0]),
    )
    legend = tuple((charts.variable(path.method), label(path.method)) for path in paths)
    return Figure(measure.name, svg, "Dashed: the base model.", legend)


def _pairs(x: Iterable[float], y: Iterable[float]) -> str:
    return ", ".join(f"({a:.4g}, {b:.4g})" for a, b in zip(x, y, strict=True))


def _over_values(curves: Iterable[tuple[Frontier, np.ndarray]]) -> Iterator[charts.Path]:
    """A path over the values of each method that has several; the base model's scores, the first, are left out."""
    for frontier, scores_P in curves:
        points = [(x, float(y)) for x, y in zip(frontier.values, scores_P[1:], strict=True) if _is_number(x)]
        if len(points) > 1:
            yield charts.Path(frontier.method, *zip(*sorted(points), strict=True))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _first_seed(comparison: Comparison, chosen: Sequence[Best]) -> RunRecords:
    """Each method at its best value, with the first seed, as if they were one run."""
    scores = {} if comparison.base is None else {"base": comparison.base}
    metrics = {}
    for one in chosen:
        cells = (cell for cell in comparison.cells if cell.value == one.value and one.method in cell.run.scores)
        run = min(cells, key=lambda cell: cell.seed).run
        scores[one.method] = run.scores[one.method]
        if one.method in run.metrics:
            metrics[one.method] = run.metrics[one.method]
    return dataclasses.replace(comparison.shared, scores=scores, metrics=metrics, exported=())


def _with_kinds(answers: dict[str, Sequence[Any]], score: str) -> dict[str, Any]:
    """Answers side by side; each question is lost or gained if a method answers it otherwise than the base model."""
    listing = answers_side_by_side(answers, score)
    for entry in listing["shown"]:
        right = {name: _is_right(model_answer) for name, model_answer, _ in entry["answers"]}
        base, others = right.get("base"), [value for name, value in right.items() if name != "base"]
        if base is True and False in others:
            entry["kind"] = "lost"
        elif base is False and True in others:
            entry["kind"] = "gained"
    return listing


def _is_right(model_answer: Any) -> bool | None:
    return model_answer.correct if getattr(model_answer, "accepted", None) is None else model_answer.accepted
