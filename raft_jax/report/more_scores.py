"""The table of scores that a run has only where its settings ask for them: answers judged and checked, tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from raft_jax.report.folder import RunRecords, label
from raft_jax.report.summary import MISSING, Table, estimate, number
from raft_jax.scores import Estimate, ModelScores

# (column, what it shows of a model, what it means)
Column = tuple[str, Callable[[ModelScores], str], str]
COLUMNS: tuple[Column, ...] = (
    (
        "domain accuracy",
        lambda model: estimate(model.domain.accepted),
        "share of the held-out questions whose answer a majority of the judges accepts",
    ),
    (
        "judges' α",
        lambda model: number(model.domain.agreement),
        "Krippendorff's alpha of their verdicts (1: they always agree, 0: as by chance)",
    ),
    (
        "checks passed",
        lambda model: estimate(model.domain.checked),
        "share of the answers with a check that pass it",
    ),
    (
        "label, likelihood",
        lambda model: estimate(model.domain.label_likelihood),
        "share of the labelled questions whose label is the most likely one",
    ),
    (
        "label, text",
        lambda model: estimate(model.domain.label_text),
        "share of them whose label is the first one in the answer",
    ),
)


def more_scores(run: RunRecords) -> Table:
    """The table; without rows where no model has such scores."""
    columns = (*COLUMNS, *_task_columns(run))
    found = [(name, cells) for name, show, _ in columns if (cells := _column(run, show))]
    notes = [f"{name}: {meaning}" for name, show, meaning in columns if meaning and _column(run, show)]
    rows = zip(*(cells for _, cells in found), strict=True) if found else ()
    return Table(
        name="more",
        title="Judged, checked and tested",
        columns=("model", *(name for name, _ in found)),
        rows=tuple((label(name), *cells) for name, cells in zip(run.models, rows, strict=True)) if found else (),
        methods=tuple(run.models) if found else (),
        note=f"Mean ± standard error. {'; '.join(notes)}.{''.join(_unjudged(run))}" if found else "",
    )


def _task_columns(run: RunRecords) -> Iterator[Column]:
    """The first metric of each task of lm-evaluation-harness; its name is a part of the column's."""
    for task in dict.fromkeys(task for model in run.models.values() for task in model.tasks):
        metrics = next(model.tasks[task] for model in run.models.values() if task in model.tasks)
        if not metrics:
            continue
        metric = next(iter(metrics))

        def show(model: ModelScores, task: str = task, metric: str = metric) -> str:
            found = model.tasks.get(task, {}).get(metric)
            return MISSING if found is None else estimate(Estimate(found.value, found.stderr, found.count))

        yield f"{task.partition(':')[0]} {metric.replace('_', ' ')}", show, ""


def _column(run: RunRecords, show: Callable[[ModelScores], str]) -> list[str]:
    """A cell for each model; empty if no model has a value."""
    cells = [show(model) for model in run.models.values()]
    return cells if any(cell != MISSING for cell in cells) else []


def _unjudged(run: RunRecords) -> Iterator[str]:
    """A sentence on answers that judges were asked about, and of which none gave a score."""
    for name, model in run.models.items():
        judged = [answer for answer in model.answers if answer.judges]
        if silent := sum(answer.accepted is None for answer in judged):
            yield f" No judge scored {silent} of {len(judged)} answers of {label(name)}: they are left out."
