"""The table of scores that a run has only where its settings ask for them: answers judged and checked, tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from raft_jax.evaluate.statistics import gained_and_lost
from raft_jax.report.folder import RunRecords, label
from raft_jax.report.summary import MISSING, Table, estimate, number
from raft_jax.scores import Estimate, ModelScores, Writing

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
        "open prompts accepted",
        lambda model: estimate(model.general.accepted),
        "share of the general prompts without a check whose answer a majority of the judges that are models accepts",
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
    named_cells = [(name, cells) for name, show, _ in columns if (cells := _column(run, show))]
    notes = [f"{name}: {meaning}" for name, show, meaning in columns if meaning and _column(run, show)]
    note = f"Mean ± standard error. {'; '.join(notes)}.{''.join(_unjudged(run))}" if named_cells else ""
    return _table(run, "more", "Judged, checked and tested", named_cells, note)


def _table(run: RunRecords, name: str, title: str, columns: Sequence[tuple[str, list[str]]], note: str) -> Table:
    """A row for each model, of columns by name; without rows if there are no columns."""
    models = list(run.models) if columns else []
    cells = zip(*(column for _, column in columns), strict=True)
    return Table(
        name=name,
        title=title,
        columns=("model", *(column for column, _ in columns)),
        rows=tuple((label(model), *row) for model, row in zip(models, cells, strict=True)),
        methods=tuple(models),
        note=note,
    )


def _task_columns(run: RunRecords) -> Iterator[Column]:
    """The first metric of each task of lm-evaluation-harness; its name is a part of the column's."""
    for task in dict.fromkeys(task for model in run.models.values() for task in model.tasks):
        metrics = next(model.tasks[task] for model in run.models.values() if task in model.tasks)
        if not metrics:
            continue
        metric = next(iter(metrics))

        def show(model: ModelScores, task: str = task, metric: str = metric) -> str:
            score = model.tasks.get(task, {}).get(metric)
            return MISSING if score is None else estimate(Estimate(score.value, score.stderr, score.count))

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


def forgetting(run: RunRecords) -> Table:
    """What the divergence on general prompts does not show: on the domain's prompts, in the writing, in the answers."""
    columns = (
        ("domain divergence", lambda model: estimate(model.domain.divergence, 4)),
        ("teacher gap", lambda model: estimate(model.domain.teacher_gap, 3)),
        ("ended", lambda model: _both(model, lambda writing: writing.ended, 2)),
        ("length", lambda model: _both(model, lambda writing: writing.length, 0)),
        ("distinct", lambda model: _both(model, lambda writing: writing.distinct, 2)),
    )
    named_cells = [(name, cells) for name, show in columns if (cells := _column(run, show))]
    changes = [(f"{name}: gained, lost (p)", _changes(run, part, key)) for name, part, key in CHANGED]
    named_cells += [(name, cells) for name, cells in changes if any(cell != MISSING for cell in cells)]
    return _table(
        run,
        "forgetting",
        "Forgetting in detail",
        named_cells,
        "Domain divergence: KL(base ‖ model) on the base model's own answers to the held-out questions. Teacher "
        "gap: how much likelier the teacher, which is given the gold answer, finds its own answers than the model "
        "does, in nats per token. Domain / general: share of answers that end before the limit of length, mean length "
        "in tokens, share of an answer's runs of three words that are different. Gained, lost: right answers that the "
        "base model has wrong, and the reverse; p is McNemar's exact test's.",
    )


# Right and wrong answers that are compared with the base model's: (name, part of the scores, field).
CHANGED = (
    ("accepted", "answers", "accepted"),
    ("checks", "answers", "correct"),
    ("general", "general_answers", "correct"),
)


def _both(model: ModelScores, pick: Callable[[Writing], Estimate], digits: int) -> str:
    means = [pick(writing).mean for writing in (model.domain.writing, model.general.writing)]
    return MISSING if None in means else " / ".join(f"{mean:.{digits}f}" for mean in means)


def _changes(run: RunRecords, part: str, key: str) -> list[str]:
    """The answers that each model has gained and lost against the base model; a dash for the base model itself."""
    right = {
        name: {answer.id: value for answer in getattr(model, part) if (value := getattr(answer, key)) is not None}
        for name, model in run.models.items()
    }
    base, cells = right.get("base", {}), []
    for name, now in right.items():
        shared = [id for id in now if id in base]
        if name == "base" or not shared:
            cells.append(MISSING)
            continue
        gained, lost, p_value = gained_and_lost([base[id] for id in shared], [now[id] for id in shared])
        cells.append(f"{gained}, {lost} ({p_value:.2f})")
    return cells
