"""The table of scores that a run has only where its settings ask for them: judged, checked and labelled answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from raft_jax.report.folder import RunRecords, label
from raft_jax.report.summary import MISSING, Table, estimate, number
from raft_jax.scores import ModelScores

# (column, what it shows of a model, what it means)
COLUMNS: tuple[tuple[str, Callable[[ModelScores], str], str], ...] = (
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
    found = [(name, cells) for name, show, _ in COLUMNS if (cells := _column(run, show))]
    notes = [f"{name}: {meaning}" for name, show, meaning in COLUMNS if _column(run, show)]
    rows = zip(*(cells for _, cells in found), strict=True) if found else ()
    return Table(
        name="more",
        title="Judged and checked",
        columns=("model", *(name for name, _ in found)),
        rows=tuple((label(name), *cells) for name, cells in zip(run.models, rows, strict=True)) if found else (),
        methods=tuple(run.models) if found else (),
        note=f"Mean ± standard error. {'; '.join(notes)}.{''.join(_unjudged(run))}" if found else "",
    )


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
