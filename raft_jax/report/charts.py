"""Small charts as inline SVG. Their colours are CSS variables of the page, so they follow its light or dark scheme."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from raft_jax.errors import require_train
from raft_jax.methods import METHODS
from raft_jax.report.folder import style_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# matplotlib needs colours and the page uses CSS variables: `_inline` replaces these placeholders by the variables.
_SHADES = ("ink", "muted", "line", "kept", "rejected")
MODELS = ("base", *METHODS, "other")
_STAND_INS = {name: f"#0101{index:02x}" for index, name in enumerate(_SHADES + MODELS)}
_SIZE = (5.4, 3.5)  # inches at 72 dpi; the page scales it to the column, 0.9 times on a phone and 1.4 elsewhere
_MOST_POINTS = 400


@dataclass(frozen=True)
class Series:
    """One method's line; `faint` values are drawn thin behind it."""

    method: str
    x: Sequence[float]
    y: Sequence[float]
    faint: Sequence[float] | None = None

    @property
    def ends(self) -> tuple[float, float]:
        """The first and the last value, not smoothed."""
        values = self.y if self.faint is None else self.faint
        return values[0], values[-1]


@dataclass(frozen=True)
class Point:
    """One model in a scatter, with standard errors."""

    method: str
    label: str
    x: float
    y: float
    x_error: float = 0.0
    y_error: float = 0.0


@dataclass(frozen=True)
class Path:
    """A method's points in the order in which a line joins them, with standard errors."""

    method: str
    x: Sequence[float]
    y: Sequence[float]
    x_error: Sequence[float] | None = None
    y_error: Sequence[float] | None = None


def variable(method: str) -> str:
    """The name of the CSS variable that holds a method's colour."""
    return method if method in MODELS else "other"


def lines(
    name: str,
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    log: bool = False,
    level: float | None = None,
    marked: bool = False,
) -> str:
    """Draws one line per method.

    Args:
      name: unique in the page; prefixes the ids of the drawing.
      title: what the chart shows, for screen readers.
      series: the lines; values that are not finite are left out.
      x_label: the horizontal axis.
      y_label: the vertical axis.
      log: a logarithmic vertical axis.
      level: the height of a horizontal line; None: no line.
      marked: whether each point gets a marker.

    Returns:
      An `<svg>` element, or "" where there is nothing finite to draw.
    """
    if not any(math.isfinite(value) for one in series for value in one.y):
        return ""
    with _axes(name, title) as (axes, drawing):
        if level is not None:
            axes.axhline(level, color=_STAND_INS["muted"], linewidth=1, linestyle=(0, (2, 2)))
        for one in series:
            color = _STAND_INS[variable(one.method)]
            if one.faint is not None:
                axes.plot(*_thinned(one.x, one.faint), color=color, linewidth=0.8, alpha=0.35)
            style = style_of(one.method)
            dashes = (0, style.dashes) if style.dashes else "solid"
            marker = style.marker if marked or len(one.x) == 1 else None
            axes.plot(
                *_thinned(one.x, one.y),
                color=color,
                linewidth=1.8,
                linestyle=dashes,
                marker=marker,
                markersize=3.5,
            )
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if log:
            _log_axis(axes)
    return drawing.getvalue()


def scatter(name: str, title: str, points: Sequence[Point], *, x_label: str, y_label: str) -> str:
    """Draws models as labelled points with standard errors.

    Args:
      name: unique in the page.
      title: what the chart shows.
      points: the models.
      x_label: the horizontal axis.
      y_label: the vertical axis.

    Returns:
      An `<svg>` element, or "" without finite points.
    """
    points = [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]
    if not points:
        return ""
    with _axes(name, title) as (axes, drawing):
        for point in points:
            color = _STAND_INS[variable(point.method)]
            axes.errorbar(point.x, point.y, point.y_error, point.x_error, color=color, linewidth=1, alpha=0.55)
            axes.plot(point.x, point.y, style_of(point.method).marker, color=color, markersize=7)
        axes.margins(0.18, 0.2)
        axes.set(xlabel=x_label, ylabel=y_label)
        _place_labels(axes, points)
    return drawing.getvalue()


def paths(
    name: str,
    title: str,
    series: Sequence[Path],
    *,
    x_label: str,
    y_label: str,
    level: float | None = None,
    log_x: bool = False,
) -> str:
    """Draws one line of points with standard errors per method.

    Args:
      name: unique in the page.
      title: what the chart shows.
      series: the lines.
      x_label, y_label: the axes.
      level: the height of a horizontal line; None: no line.
      log_x: a logarithmic horizontal axis.

    Returns:
      An `<svg>` element, or "" without points.
    """
    if not any(one.x for one in series):
        return ""
    with _axes(name, title) as (axes, drawing):
        if level is not None:
            axes.axhline(level, color=_STAND_INS["muted"], linewidth=1, linestyle=(0, (2, 2)))
        for one in series:
            color, style = _STAND_INS[variable(one.method)], style_of(one.method)
            axes.errorbar(one.x, one.y, one.y_error, one.x_error, fmt="none", ecolor=color, linewidth=1, alpha=0.45)
            dashes = (0, style.dashes) if style.dashes else "solid"
            axes.plot(one.x, one.y, color=color, linewidth=1.6, linestyle=dashes, marker=style.marker, markersize=5.5)
        axes.set(xlabel=x_label, ylabel=textwrap.fill(y_label, 34))
        if log_x:
            values = sorted({value for one in series for value in one.x})
            axes.set_xscale("log")
            axes.set_xticks(values, [f"{value:g}" for value in values], minor=False)
            axes.set_xticks([], minor=True)
    return drawing.getvalue()


def histogram(name: str, title: str, kept: Sequence[float], rejected: Sequence[float], threshold: float | None) -> str:
    """Draws the similarities of rewritings and gold answers, and the threshold of the filter.

    Args:
      name: unique in the page.
      title: what the chart shows.
      kept: cosine similarities of the accepted rewritings.
      rejected: those of the others.
      threshold: the filter's threshold, if known.

    Returns:
      An `<svg>` element, or "" without values.
    """
    values = [value for value in (*kept, *rejected) if math.isfinite(value)]
    if not values:
        return ""
    low = min(values if threshold is None else [*values, threshold])
    first = math.floor(round(low / 0.05, 6) - 1)
    edges = [0.05 * edge for edge in range(max(first, -20), 21)]
    if len(edges) <= 11:
        edges = [0.025 * edge for edge in range(2 * max(first, -20), 41)]
    with _axes(name, title) as (axes, drawing):
        colors = [_STAND_INS["kept"], _STAND_INS["rejected"]]
        # Rounded, so that a similarity that equals an edge or exceeds 1 by rounding falls into its bin.
        rounded = [[min(round(value, 9), 1.0) for value in group if math.isfinite(value)] for group in (kept, rejected)]
        axes.hist(rounded, [round(edge, 9) for edge in edges], stacked=True, color=colors, rwidth=0.86)
        if threshold is not None:
            axes.axvline(threshold, color=_STAND_INS["ink"], linewidth=1.2, linestyle=(0, (3, 2)))
            axes.annotate(
                f"τ = {threshold:g}",
                (threshold, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                va="bottom",
                color=_STAND_INS["ink"],
                fontsize=10,
            )
        axes.set(xlabel="cosine similarity of rewriting and gold answer", ylabel="rows")
        axes.yaxis.get_major_locator().set_params(integer=True)
    return drawing.getvalue()


@contextmanager
def _axes(name: str, title: str) -> Iterator[tuple[Axes, io.StringIO]]:
    """Yields axes to draw on, and a buffer that holds the finished SVG when the block has ended."""
    require_train("matplotlib")
    import matplotlib
    from matplotlib.figure import Figure

    ink, muted, line = (_STAND_INS[key] for key in ("ink", "muted", "line"))
    settings = {
        "svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False, "font.size": 11,
        "axes.edgecolor": line, "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "axes.formatter.useoffset": False,
        "grid.color": line, "grid.linewidth": 0.6, "xtick.color": line, "ytick.color": line,
        "axes.labelcolor": muted, "xtick.labelcolor": muted, "ytick.labelcolor": muted, "text.color": ink,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=_SIZE, dpi=72, layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        drawing = io.StringIO()
        yield axes, drawing
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", dpi=72, metadata=nothing)
    drawing.write(_inline(file.getvalue(), name, title))


def _inline(svg: str, name: str, title: str) -> str:
    """Turns matplotlib's stand-alone SVG file into an element of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)
    svg = re.sub(r"font-family: [^;\"]*(; )?", "", svg)
    svg = re.sub(r"\b(id=\"|href=\"#|url\(#)", rf"\g<1>{name}-", svg)
    for shade, color in _STAND_INS.items():
        svg = re.sub(rf"(fill|stroke): {color}", rf"\g<1>: var(--{shade})", svg)
    svg = re.sub(r"\s*\n\s*", " ", svg).strip()
    head, _, body = svg.partition(">")
    title = f'<title id="{name}-title">{escape(title)}</title>'
    return f'{head} role="img" aria-labelledby="{name}-title">{title}{body}'


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Averages neighbouring points down to `_MOST_POINTS` or fewer: more are not visible and enlarge the page."""
    width = math.ceil(len(x) / _MOST_POINTS)
    if width <= 1:
        return list(x), list(y)
    starts = range(0, len(x), width)
    return [fmean(x[i : i + width]) for i in starts], [fmean(y[i : i + width]) for i in starts]


def _log_axis(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # A range of less than a decade may include no power of ten, and one of a few decades too few.
    if high / low > 10:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 100 else (1.0, 2.0, 5.0)))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _place_labels(axes: Axes, points: Sequence[Point]) -> None:
    """Puts each label next to its point, where it covers neither a point nor an earlier label."""
    axes.figure.canvas.draw()
    spots = [tuple(axes.transData.transform((point.x, point.y))) for point in points]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in spots]
    for point, (x, y) in zip(points, spots, strict=True):
        width = 6.5 * len(point.label)
        choices = [(9, 8, "left"), (9, -16, "left"), (-9, 8, "right"), (-9, -16, "right")]
        boxes = []
        for right, up, side in choices:
            left = x + right if side == "left" else x + right - width
            boxes.append((left, y + up - 2, left + width, y + up + 10))
        free = [i for i, box in enumerate(boxes) if not any(_overlap(box, other) for other in taken)]
        best = free[0] if free else 0
        right, up, side = choices[best]
        taken.append(boxes[best])
        axes.annotate(
            point.label,
            (point.x, point.y),
            xytext=(right, up),
            textcoords="offset points",
            ha=side,
            color=_STAND_INS[variable(point.method)],
            fontsize=11,
            fontweight="bold",
        )


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
