"""The numbers of a run as tables of text, for both the terminal and the page."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from raft_jax.report.folder import RunRecords, label, read_run
from raft_jax.report.verdict import verdicts
from raft_jax.run_folder import shown
from raft_jax.scores import Estimate

if TYPE_CHECKING:
    from rich.console import Console

MISSING = "–"


@dataclass(frozen=True)
class Table:
    """A table of text; the first `text_columns` columns hold words, `methods` has the method of each row."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    methods: tuple[str, ...]
    note: str = ""
    text_columns: int = 1


def summary_tables(run: RunRecords | Path) -> list[Table]:
    """The scores, losses, stages and outputs of a run.

    Args:
      run: the records of a run, or its folder.

    Returns:
      The tables "scores" (base and each method), "training" (each method), "stages" and "outputs".
      Values that do not exist yet are shown as a dash, or as a table without rows.
    """
    run = run if isinstance(run, RunRecords) else read_run(run)
    return [_scores(run), _training(run), _stages(run), _outputs(run)]


def print_summary(run_dir: Path, console: Console, names: Collection[str] | None = None) -> None:
    """Prints the tables of `summary_tables`, with the short verdicts before the scores.

    Args:
      run_dir: a run folder.
      console: where to print.
      names: the names of the tables to print; None: all.
    """
    from rich.text import Text

    from raft_jax.report.more_scores import forgetting, more_scores

    run = read_run(run_dir)
    tables = summary_tables(run)
    tables[1:1] = [table for table in (more_scores(run), forgetting(run)) if table.rows]
    for table in tables:
        if names is not None and table.name not in names:
            continue
        console.print(Text(f"\n{table.title}", style="bold"))
        if table.name == "scores":
            for verdict in verdicts(run):
                console.print(Text(visible_text(verdict.short)))
        if table.name == "outputs" and table.rows:
            width = max(len(what) for what, _ in table.rows)
            for what, path in table.rows:
                # Paths are not wrapped, so that they can be copied.
                console.print(Text(visible_text(f"{what:<{width}}  {path}")), soft_wrap=True)
            continue
        print_table(table, console)


def print_table(table: Table, console: Console) -> None:
    """Prints a table and its note; one number a line where the terminal is too narrow for it."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    if not table.rows:
        console.print(Text("not run yet", style="dim"))
        return
    widths = _widths(table, console.width)
    if sum(widths) + 2 * len(widths) > console.width + 2:
        _print_stacked(table, console)
        return
    view = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for index, width in enumerate(widths):
        justify = "left" if index < table.text_columns else "right"
        view.add_column(Text(table.columns[index]), justify=justify, width=width)
    for row in table.rows:
        view.add_row(*(Text(visible_text(cell)) for cell in row))
    console.print(view)
    if table.note:
        console.print(Text(visible_text(table.note), style="dim"))


def visible_text(text: str) -> str:
    """Replaces control characters, which a terminal would interpret."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)


def _print_stacked(table: Table, console: Console) -> None:
    """Prints one number per line, if the terminal is too narrow for the table: a truncated number would be wrong."""
    from rich.text import Text

    named = range(table.text_columns, len(table.columns))
    width = max(len(table.columns[index]) for index in named)
    for row in table.rows:
        console.print(Text(visible_text(" ".join(row[: table.text_columns]).strip()), style="bold"))
        for index in named:
            console.print(Text(f"  {table.columns[index]:<{width}}  {row[index]}"), soft_wrap=True)
    if table.note:
        console.print(Text(visible_text(table.note), style="dim"))


def _widths(table: Table, available: int) -> list[int]:
    """Column widths: the longest cell, or the longest word in as many columns as necessary to fit."""
    columns = list(zip(table.columns, *table.rows, strict=True))
    widths = [max(map(len, cells)) for cells in columns]
    narrow = [max(len(word) for cell in cells for word in cell.split() or [""]) for cells in columns]
    for index in sorted(range(len(widths)), key=lambda index: narrow[index] - widths[index]):
        if sum(widths) + 2 * len(widths) > available:
            widths[index] = narrow[index]
    return widths


def number(value: Any, digits: int = 3) -> str:
    """A number as the report shows it; a dash for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return MISSING
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}"


def estimate(score: Estimate, digits: int = 3) -> str:
    """A mean with its standard error; a dash if there is none."""
    if score.mean is None:
        return MISSING
    mean = number(float(score.mean), digits)
    return mean if score.stderr is None else f"{mean} ±{number(float(score.stderr), digits)}"


def _scores(run: RunRecords) -> Table:
    names = ("base", *run.methods) if run.models else ()
    rows = []
    for name in names:
        cells = [MISSING] * 6
        if model := run.models.get(name):
            domain, general = model.domain, model.general
            cells = [
                estimate(domain.gold_logprob),
                estimate(domain.token_f1),
                estimate(domain.similarity),
                estimate(general.divergence, 4),
                estimate(general.accuracy),
                number(model.weight_distance.mean, 4),
            ]
        rows.append((label(name), *cells))
    return Table(
        name="scores",
        title="Learned and forgotten",
        columns=(
            "model",
            "gold log-likelihood",
            "token F1",
            "similarity",
            "divergence",
            "accuracy",
            "weight distance",
        ),
        rows=tuple(rows),
        methods=names,
        note=_scores_note(run),
    )


def _scores_note(run: RunRecords) -> str:
    if not run.models:
        return ""
    first = next(iter(run.models.values()))
    return (
        f"Mean ± standard error. Domain: {number(first.domain.gold_logprob.count)} held-out questions; log-likelihood "
        "of the gold answer in nats per token, F1 and embedding similarity of the greedy answer to it (all: higher is "
        f"better). General: {number(first.general.divergence.count)} prompts; divergence KL(base ‖ model) in nats per "
        "token on the base model's own continuations (lower is better), accuracy on the "
        f"{number(first.general.accuracy.count)} that can be checked. "
        "Weight distance: ‖W − W₀‖ / ‖W₀‖." + _cut_note(run)
    )


def _cut_note(run: RunRecords) -> str:
    """The number of each model's answers that a length limit truncated: half an answer has at most half the score."""
    parts = []
    for name, model in run.models.items():
        domain, general = model.domain, model.general
        cut = [
            f"{number(count)} of {number(total)} {kind}"
            for count, total, kind in (
                (domain.cut, domain.token_f1.count, "domain"),
                (general.cut, general.divergence.count, "general"),
            )
            if count
        ]
        parts += [f"{label(name)} {' and '.join(cut)}"] if cut else []
    return f" Answers that the limit of length cut: {'; '.join(parts)}." if parts else ""


def _training(run: RunRecords) -> Table:
    rows, methods = [], []
    for method in run.methods:
        steps = run.metrics.get(method, ())
        if not steps:
            continue
        first, last = steps[0], steps[-1]
        pairs = [_number_at(line, key) for key in ("sft_loss", "kl_loss", "weight") for line in (first, last)]
        rows.append((label(method), number(len(steps)), *pairs))
        methods.append(method)
    return Table(
        name="training",
        title="Training",
        columns=(
            "method",
            "steps",
            "SFT loss first",
            "SFT loss last",
            "KL loss first",
            "KL loss last",
            "λ first",
            "λ last",
        ),
        rows=tuple(rows),
        methods=tuple(methods),
        note="Single steps, in nats per token. The methods' targets differ: do not compare their SFT losses.",
    )


def _number_at(line: dict[str, Any], key: str) -> str:
    return MISSING if line.get(key) is None else number(float(line[key]), 3)


def _stages(run: RunRecords) -> Table:
    totals: dict[tuple[str, str], list[float]] = {}
    for timing in run.timings:
        entry = totals.setdefault((timing.stage, timing.method or ""), [0.0, 0])
        entry[0] += timing.seconds
        entry[1] += timing.tokens
    rows = [_stage(stage, label(method) if method else "", *entry) for (stage, method), entry in totals.items()]
    if rows:
        rows.append(_stage("all", "", *(sum(entry[index] for entry in totals.values()) for index in (0, 1))))
    columns = ("stage", "method", "seconds", "tokens", "tokens/s")
    # Metrics have an MFU on accelerators whose speed is known.
    used = {method: [line["mfu"] for line in lines if "mfu" in line] for method, lines in run.metrics.items()}
    if any(used.values()):
        columns = (*columns, "MFU")
        cells = [
            f"{median(used[method]):.0%}" if stage == "train" and used.get(method) else "" for stage, method in totals
        ]
        rows = [(*row, cell) for row, cell in zip(rows, [*cells, ""], strict=True)]
    return Table(
        name="stages",
        title="Time",
        columns=columns,
        rows=tuple(rows),
        methods=tuple(method for _, method in totals) + (("",) if rows else ()),
        text_columns=2,
    )


def _stage(stage: str, method: str, seconds: float, tokens: int) -> tuple[str, ...]:
    speed = f"{tokens / seconds:,.0f}" if tokens and seconds else MISSING
    return (stage, method, f"{seconds:,.1f}", f"{tokens:,}" if tokens else MISSING, speed)


def _outputs(run: RunRecords) -> Table:
    rows = [("report", shown(run.folder.report_html))]
    if run.refined:
        rows.append(("refined rows", shown(run.folder.refined_jsonl)))
    rows += [
        (f"{label(method)} model", shown(run.folder.method(method).export))
        for method in run.methods
        if method in run.exported
    ]
    return Table(
        name="outputs",
        title="Files",
        columns=("what", "path"),
        rows=tuple(rows),
        methods=("",) * len(rows),
        text_columns=2,
    )
