"""The paper's own figures beside those of a comparison, where the same was measured."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

from raft_jax.evaluate.statistics import relative_change
from raft_jax.report.comparison import Comparison, best_values
from raft_jax.report.folder import label
from raft_jax.report.summary import MISSING, Table
from raft_jax.scores import ModelScores

# Table 1 of the paper: (D-Acc, MS-Bench, IFEval), %, averaged over five domains, by backbone.
PAPER: dict[str, dict[str, tuple[float, float, float]]] = {
    "SmolLM3-3B": {
        "base": (10.6, 68.0, 31.2),
        "sft": (12.8, 61.5, 24.9),
        "sdft": (13.1, 60.3, 25.2),
        "on_policy": (12.7, 60.7, 26.8),
        "fapm": (10.7, 59.2, 31.2),
        "raft": (17.2, 66.8, 31.4),
    },
    "Llama-3.2-3B-Instruct": {
        "base": (7.3, 46.0, 51.2),
        "sft": (15.1, 36.8, 49.9),
        "sdft": (14.5, 36.1, 48.8),
        "on_policy": (13.6, 40.4, 48.3),
        "fapm": (7.3, 43.2, 51.2),
        "raft": (16.5, 40.1, 51.6),
    },
    "Phi-4-mini-instruct": {
        "base": (11.6, 52.5, 55.5),
        "sft": (17.1, 31.5, 53.4),
        "sdft": (17.4, 33.6, 53.8),
        "on_policy": (17.4, 40.2, 53.4),
        "fapm": (14.2, 53.6, 55.5),
        "raft": (21.6, 43.2, 53.9),
    },
}
Read = Callable[[ModelScores], float | None]


def _ifeval(model: ModelScores) -> float | None:
    tasks = [scores for name, scores in model.tasks.items() if name.partition(":")[0] == "ifeval"]
    return next(iter(tasks[0].values())).value if tasks and tasks[0] else None


# The paper's measure, ours, and how to read it.
MEASURES: tuple[tuple[str, str, Read], ...] = (
    ("D-Acc", "domain accuracy", lambda model: model.domain.accepted.mean),
    ("MS-Bench", "open prompts accepted", lambda model: model.general.accepted.mean),
    ("IFEval", "ifeval", _ifeval),
)


def paper_table(comparison: Comparison) -> Table:
    """Relative changes against SFT, the paper's and those of the comparison at the methods' best values (App. G)."""
    chosen = {one.method: one.models for one in best_values(comparison)[0]}
    known = [name for name in chosen if name != "sft" and name in PAPER["SmolLM3-3B"]]
    rows = []
    if "sft" in chosen:
        for name in known:
            cells = []
            for index, (_, _, read) in enumerate(MEASURES):
                scores = [[row[method][index] for row in PAPER.values()] for method in (name, "sft")]
                cells += [f"{relative_change(*scores):+.1%}", _ours(chosen[name], chosen["sft"], read)]
            rows.append((label(name), *cells))
    columns = tuple(column for theirs, ours, _ in MEASURES for column in (f"{theirs}, paper", f"{ours}, here"))
    return Table(
        name="paper",
        title="Against SFT, as the paper reports it",
        columns=("method", *columns),
        rows=tuple(rows),
        methods=tuple(known) if rows else (),
        note="Relative change against SFT. Paper: Table 1, one run per cell, mean over three backbones of 3 to 4 "
        "billion parameters and five domains. Its judges, questions and models are others: compare signs, not sizes.",
    )


def _ours(models: tuple[ModelScores, ...], reference: tuple[ModelScores, ...], read: Read) -> str:
    means = []
    for group in (models, reference):
        values = [value for model in group if (value := read(model)) is not None]
        means.append(fmean(values) if values else None)
    return f"{means[0] / means[1] - 1:+.1%}" if means[0] is not None and means[1] else MISSING
