"""The charts of a report, each with its heading and caption."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raft_jax.report import charts
from raft_jax.report.folder import RunRecords, label
from raft_jax.settings_text import flat


@dataclass(frozen=True)
class Figure:
    """A chart with heading, caption and legend; if `svg` is empty, `absent` may give the reason."""

    heading: str
    svg: str
    caption: str
    legend: tuple[tuple[str, str], ...] = ()  # CSS variable and label of each colour
    absent: str = ""


def tradeoff(run: RunRecords) -> list[Figure]:
    figures = []
    for score, heading, y_label in (
        ("gold_logprob", "Log-likelihood of the gold answers", "gold log-likelihood, nats per token"),
        ("similarity", "Similarity of the answers to gold", "similarity of the answers to gold"),
    ):
        points = []
        for name, model in run.models.items():
            x, y = model.general.divergence, getattr(model.domain, score)
            if x.mean is not None and y.mean is not None:
                points.append(charts.Point(name, label(name), x.mean, y.mean, x.stderr or 0.0, y.stderr or 0.0))
        values = "; ".join(f"{point.label} {point.x:.4f}, {point.y:.3f}" for point in points)
        svg = charts.scatter(
            f"scatter-{score.replace('_', '-')}",
            f"Divergence from base against {y_label}: {values}",
            points,
            x_label="divergence from base, nats per token",
            y_label=y_label,
        )
        figures.append(Figure(heading, svg, "Better is up and to the left. Bars are standard errors."))
    return figures


def curves(run: RunRecords) -> list[Figure]:
    nats = {"y_label": "nats per token"}
    ratio = {"y_label": "ratio (log scale)", "log": True, "level": 1.0}
    kinds = (
        ("sft_loss", "SFT loss", nats, "Bold: moving average; faint: single steps. Each method has its own "
         "targets, so compare the shape, not the height."),
        ("kl_loss", "KL loss", nats, "Teacher against student on the student’s own rollouts."),
        ("ratio", "CE / KL ratio", ratio, "L_SFT / (λ · L_KL): near 1 the two terms weigh the same. "
         "Bold: moving geometric mean."),
        ("weight", "λ", {"y_label": "λ"}, "The weight of the KL term."),
        ("dft_loss", "DFT loss", nats, "ASFT's: each token's cross entropy times the model's probability of it."),
        ("anchor_loss", "KL to the base model", nats, "Of SFT + KL and of ASFT, on the answers' tokens."),
    )  # fmt: skip
    figures = []
    for key, heading, options, caption in kinds:
        series = [one for method in run.methods if (one := _series(run, method, key))]
        if not series and key in ("dft_loss", "anchor_loss"):
            continue
        ends = "; ".join(f"{label(one.method)} from {one.ends[0]:.4g} to {one.ends[1]:.4g}" for one in series)
        name = f"curve-{key.replace('_', '-')}"
        svg = charts.lines(name, f"{heading} over steps: {ends}", series, x_label="step", **options)
        absent = "None of the methods run so far distils." if run.metrics else ""
        figures.append(Figure(heading, svg, caption, _legend(series), absent))
    return figures


def _series(run: RunRecords, method: str, key: str) -> charts.Series | None:
    steps = run.metrics.get(method, ())
    points = [(line, value) for line in steps if (value := _value(line, key)) is not None]
    if not points:
        return None
    x, y = [line["step"] for line, _ in points], [value for _, value in points]
    if key == "weight":
        return charts.Series(method, x, y)
    if key == "ratio":
        smooth = [math.exp(value) for value in moving_average([math.log(value) for value in y])]
    else:
        smooth = [line.get(key.replace("loss", "average")) for line, _ in points]
        smooth = moving_average(y) if None in smooth else smooth
    return charts.Series(method, x, smooth, faint=y)


def _value(line: dict[str, Any], key: str) -> float | None:
    if key == "ratio":
        sft, kl, weight = (line.get(name) or 0.0 for name in ("sft_loss", "kl_loss", "weight"))
        ratio = sft / (weight * kl) if weight * kl else 0.0
        return ratio if ratio > 0 and math.isfinite(ratio) else None
    return line.get(key)


def _legend(series: Sequence[charts.Series]) -> tuple[tuple[str, str], ...]:
    return tuple((charts.variable(one.method), label(one.method)) for one in series)


def moving_average(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """The bias-corrected exponential moving average of Eq. 11; values that are not finite do not change it."""
    averages, total, count = [], 0.0, 0
    for value in values:
        if math.isfinite(value):
            total, count = decay * total + (1 - decay) * value, count + 1
        averages.append(total / (1 - decay**count) if count else math.nan)
    return averages


def similarity(run: RunRecords) -> Figure:
    groups: dict[bool, list[float]] = {True: [], False: []}
    for row in run.refined:
        if row.similarity is not None:
            groups[row.accepted].append(row.similarity)
    kept, rejected = groups[True], groups[False]
    unusable = len(run.refined) - len(kept) - len(rejected)
    threshold = flat(run.config).get("refine.threshold")
    caption = f"{len(kept):,} kept by the filter, {len(rejected):,} rejected"
    caption += f"; {unusable:,} unusable, without a similarity and not drawn." if unusable else "."
    svg = charts.histogram(
        "similarity",
        f"Similarity of the rewritings to their gold answers: {len(kept)} kept, {len(rejected)} rejected",
        kept,
        rejected,
        float(threshold) if isinstance(threshold, int | float) else None,
    )
    absent = "None of the rewritings could be used." if run.refined else ""
    legend = (("kept", "kept"), ("rejected", "rejected"))
    return Figure("Similarity to the gold answer", svg, caption, legend, absent)


def distance(run: RunRecords) -> Figure:
    series, parts = [], []
    for name, model in run.models.items():
        moved = model.weight_distance
        if name == "base" or not moved.layers:
            continue
        series.append(charts.Series(name, list(range(len(moved.layers))), moved.layers))
        if moved.embedding is not None:
            parts.append(f"{label(name)} {moved.embedding:.4f}")
    title = "Relative weight distance from base by layer: " + "; ".join(
        f"{label(one.method)} from {min(one.y):.4f} to {max(one.y):.4f}" for one in series
    )
    svg = charts.lines("distance", title, series, x_label="layer", y_label="‖W − W₀‖ / ‖W₀‖", marked=True)
    caption = "How far each layer moved from the base model." + (f" Embedding: {', '.join(parts)}." if parts else "")
    return Figure("Weight distance by layer", svg, caption, _legend(series))
