"""Writes `report.html`: what a run did, learned and forgot, on one page that needs nothing but itself."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raft_jax.config import flat
from raft_jax.report import charts
from raft_jax.report.folder import Run, label, read_run
from raft_jax.report.summary import MISSING, estimate, number, part, summary_tables

_MOST_ROWS = 24  # of the kept and of the rejected rows each
_MOST_ANSWERS = 48
# What a reader asks for first.
_FACTS = {
    "model": "model.source",
    "data": "data.path",
    "methods": "methods",
    "epochs": "train.epochs",
    "steps at most": "train.max_steps",
    "batch size": "train.batch_size",
    "learning rate": "train.learning_rate",
    "rollout length": "train.rollout.max_new_tokens",
    "threshold τ": "refine.threshold",
    "fusion rounds": "refine.rounds",
    "temperature T": "train.temperature",
    "top K": "train.top_k",
    "EMA decay β": "train.ema_decay",
    "fixed λ": "train.fixed_weight",
    "seed": "seed",
}


@dataclass(frozen=True)
class Figure:
    """A chart with the words around it; where `svg` is empty, `absent` may say why."""

    heading: str
    svg: str
    caption: str
    methods: tuple[str, ...] = ()
    absent: str = ""


def write_report(run_dir: Path) -> Path:
    """Writes the report of a run from what its folder holds; a part that has not been run shows as such.

    Args:
      run_dir: a run folder.

    Returns:
      The path of `report.html` in it.

    Raises:
      InputError: there is no run in the folder, or one of its files is damaged.
    """
    run = read_run(run_dir)
    page = render(run)
    path = run.path / "report.html"
    temporary = path.with_suffix(".html.partial")
    # Model output may hold half a surrogate pair, which UTF-8 cannot.
    temporary.write_bytes(page.encode("utf-8", errors="replace"))
    os.replace(temporary, path)
    return path


def render(run: Run) -> str:
    """The page of a run as HTML."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(label=label, variable=charts.variable, number=number, estimate=estimate)
    tables = {table.name: table for table in summary_tables(run)}
    page = environment.get_template("page.html.jinja").render(
        name=run.path.resolve().name,
        run=run,
        missing=MISSING,
        facts=facts(run.config),
        settings=flat(run.config),
        progress=_progress(run),
        tables=tables,
        tradeoff=_tradeoff(run),
        curves=_curves(run),
        similarity=_similarity(run),
        refinement=_refinement(run),
        distance=_distance(run),
        answers=_answers(run, "answers"),
        general=_answers(run, "general_answers"),
        categories=_categories(run),
    )
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\ufffd", page.lstrip())


def facts(config: dict[str, Any]) -> list[tuple[str, str]]:
    """The settings that a reader asks for first, as far as the config holds them."""
    settings = flat(config)
    found = [(fact, settings[key]) for fact, key in _FACTS.items() if settings.get(key) is not None]
    return [(fact, ", ".join(value) if isinstance(value, list) else str(value)) for fact, value in found]


def _progress(run: Run) -> list[tuple[str, str]]:
    if run.refined:
        refine = f"{len(run.refined):,} rows"
    else:
        refine = "begun, not finished" if run.refinement_begun else ""
    rows = [("refine", refine)]
    for method in run.methods:
        steps = run.metrics.get(method, ())
        rows.append((f"train {label(method)}", f"{int(steps[-1]['step']):,} steps" if steps else ""))
        rows.append((f"export {label(method)}", "done" if method in run.exported else ""))
    if not run.methods:
        rows.append(("train", ""))
    return [*rows, ("evaluate", f"{len(run.models)} models" if run.models else "")]


def _tradeoff(run: Run) -> list[Figure]:
    figures = []
    for key, heading, y_label in (
        ("gold_logprob", "Log-likelihood of the gold answers", "gold log-likelihood, nats per token"),
        ("similarity", "Similarity of the answers to gold", "similarity of the answers to gold"),
    ):
        points = []
        for name, model in run.models.items():
            x, y = part(model, "general", "divergence"), part(model, "domain", key)
            if x.get("mean") is not None and y.get("mean") is not None:
                errors = (x.get("stderr") or 0.0, y.get("stderr") or 0.0)
                points.append(charts.Point(name, label(name), x["mean"], y["mean"], *errors))
        values = "; ".join(f"{point.label} {point.x:.4f}, {point.y:.3f}" for point in points)
        svg = charts.scatter(
            f"scatter-{key.replace('_', '-')}",
            f"Divergence from base against {y_label}: {values}",
            points,
            x_label="divergence from base, nats per token",
            y_label=y_label,
        )
        figures.append(Figure(heading, svg, "Better is up and to the left."))
    return figures


def _curves(run: Run) -> list[Figure]:
    nats = {"y_label": "nats per token"}
    ratio = {"y_label": "ratio (log scale)", "log": True, "level": 1.0}
    kinds = (
        ("sft_loss", "SFT loss", nats, "Bold: moving average; faint: single steps. Each method has its own "
         "targets, so compare the shape, not the height."),
        ("kl_loss", "KL loss", nats, "Teacher against student on the student’s own rollouts."),
        ("ratio", "CE / KL ratio", ratio, "L_SFT / (λ · L_KL): near 1 the two terms weigh the same. "
         "Bold: moving geometric mean."),
        ("weight", "λ", {"y_label": "λ"}, "The weight of the KL term."),
    )  # fmt: skip
    figures = []
    for key, heading, options, caption in kinds:
        series = [one for method in run.methods if (one := _series(run, method, key))]
        ends = "; ".join(f"{label(one.method)} from {one.ends[0]:.4g} to {one.ends[1]:.4g}" for one in series)
        name = f"curve-{key.replace('_', '-')}"
        svg = charts.lines(name, f"{heading} over steps: {ends}", series, x_label="step", **options)
        absent = "None of the methods run so far distils." if run.metrics else ""
        figures.append(Figure(heading, svg, caption, tuple(one.method for one in series), absent))
    return figures


def _series(run: Run, method: str, key: str) -> charts.Series | None:
    steps = run.metrics.get(method, ())
    points = [(line, value) for line in steps if (value := _value(line, key)) is not None]
    if not points:
        return None
    x, y = [line["step"] for line, _ in points], [value for _, value in points]
    if key == "weight":
        return charts.Series(method, x, y)
    if key == "ratio":
        smooth = [math.exp(value) for value in _moving_average([math.log(value) for value in y])]
    else:
        smooth = [line.get(key.replace("loss", "average")) for line, _ in points]
        smooth = _moving_average(y) if None in smooth else smooth
    return charts.Series(method, x, smooth, faint=y)


def _value(line: dict[str, Any], key: str) -> float | None:
    if key == "ratio":
        sft, kl, weight = (line.get(name) or 0.0 for name in ("sft_loss", "kl_loss", "weight"))
        ratio = sft / (weight * kl) if weight * kl else 0.0
        return ratio if ratio > 0 and math.isfinite(ratio) else None
    if key == "sft_loss" and key not in line:
        key = "loss"
    return line.get(key)


def _moving_average(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """The bias-corrected average of Eq. 11; what is not finite leaves it as it was."""
    averages, total, count = [], 0.0, 0
    for value in values:
        if math.isfinite(value):
            total, count = decay * total + (1 - decay) * value, count + 1
        averages.append(total / (1 - decay**count) if count else math.nan)
    return averages


def _similarity(run: Run) -> Figure:
    groups: dict[bool, list[float]] = {True: [], False: []}
    for row in run.refined:
        if row.get("similarity") is not None:
            groups[bool(row.get("accepted"))].append(row["similarity"])
    kept, rejected = groups[True], groups[False]
    unusable = len(run.refined) - len(kept) - len(rejected)
    threshold = flat(run.config).get("refine.threshold")
    caption = f"{len(kept):,} kept, {len(rejected):,} below the threshold"
    caption += f"; {unusable:,} unusable (empty, cut off or refused) and not drawn." if unusable else "."
    svg = charts.histogram(
        "similarity",
        f"Similarity of the rewritings to their gold answers: {len(kept)} kept, {len(rejected)} rejected",
        kept,
        rejected,
        float(threshold) if isinstance(threshold, int | float) else None,
    )
    absent = "None of the rewritings could be used." if run.refined else ""
    return Figure("Similarity to the gold answer", svg, caption, absent=absent)


def _refinement(run: Run) -> dict[str, Any]:
    rows = sorted(run.refined, key=_similarity_of)
    groups = []
    for heading, accepted in (("Kept", True), ("Rejected", False)):
        # From the threshold outwards: that is where one looks twice.
        members = [row for row in rows if bool(row.get("accepted")) == accepted][:: 1 if accepted else -1]
        groups.append((heading, len(members), _spread(members, _MOST_ROWS)))
    rounds = [len(row["rounds"]) for row in run.refined if row.get("rounds")]
    counts = [
        ("rows", len(rows)),
        *(
            (f"rewriting {status}", count)
            for status, count in Counter(row.get("rewrite_status") for row in rows).most_common()
        ),
        ("kept by the filter", groups[0][1]),
        ("target is a fusion", sum(row.get("chosen") == "fusion" for row in rows)),
        ("target is the gold answer", sum(row.get("chosen") == "gold" for row in rows)),
    ]
    counts = [(name, f"{count:,}") for name, count in counts]
    if rounds:
        counts.append(("rounds of fusion, mean", f"{sum(rounds) / len(rounds):.2f}"))
    return {"groups": groups, "counts": counts}


def _similarity_of(row: dict[str, Any]) -> float:
    similarity = row.get("similarity")
    return -1.0 if similarity is None else similarity


def _spread(rows: Sequence[Any], most: int) -> list[Any]:
    """At most so many rows, evenly spaced over all, so that nobody picked them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(index * (len(rows) - 1) / (most - 1))] for index in range(most)]


def _distance(run: Run) -> Figure:
    series, parts = [], []
    for name, model in run.models.items():
        distance = part(model, "weight_distance")
        layers = distance.get("layers") or []
        if name == "base" or not layers:
            continue
        series.append(charts.Series(name, list(range(len(layers))), layers))
        if distance.get("embedding") is not None:
            parts.append(f"{label(name)} {distance['embedding']:.4f}")
    title = "Relative weight distance from base by layer: " + "; ".join(
        f"{label(one.method)} from {min(one.y):.4f} to {max(one.y):.4f}" for one in series
    )
    svg = charts.lines("distance", title, series, x_label="layer", y_label="‖W − W₀‖ / ‖W₀‖", marked=True)
    caption = "How far each layer moved from the base model." + (
        f" Embedding: {', '.join(parts)}." if parts else ""
    )
    return Figure("Weight distance by layer", svg, caption, tuple(one.method for one in series))


def _answers(run: Run, key: str) -> dict[str, Any]:
    """The models' answers to the same questions side by side."""
    questions: dict[str, dict[str, Any]] = {}
    for name, model in run.models.items():
        for answer in model.get(key) or ():
            entry = questions.setdefault(str(answer.get("id")), {"first": answer, "answers": []})
            entry["answers"].append((name, answer))
    return {"count": len(questions), "shown": _spread(list(questions.values()), _MOST_ANSWERS)}


def _categories(run: Run) -> list[tuple[str, list[str]]]:
    """Right answers of those that can be checked, by category and model."""
    counts: dict[str, dict[str, list[bool]]] = {}
    for name, model in run.models.items():
        for answer in model.get("general_answers") or ():
            if answer.get("correct") is not None:
                by_model = counts.setdefault(str(answer.get("category")), {})
                by_model.setdefault(name, []).append(bool(answer["correct"]))
    return [
        (
            category,
            [
                f"{sum(right)} / {len(right)}" if (right := by_model.get(name)) else MISSING
                for name in run.models
            ],
        )
        for category, by_model in sorted(counts.items())
    ]
