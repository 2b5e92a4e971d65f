"""Reads a run folder in whatever state it is: finished, interrupted or just begun."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raft_jax.errors import InputError

LABELS = {
    "base": "base",
    "sft": "SFT",
    "sdft": "SDFT",
    "fused_sft": "fused SFT",
    "on_policy": "on-policy",
    "raft": "RAFT",
}


@dataclass(frozen=True)
class Run:
    """What one run folder holds; a part that is not there yet is empty."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    refined: tuple[dict[str, Any], ...] = ()
    refinement_begun: bool = False
    metrics: dict[str, tuple[dict[str, Any], ...]] = field(default_factory=dict)
    timings: tuple[dict[str, Any], ...] = ()
    evaluation: dict[str, Any] = field(default_factory=dict)
    exported: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that left metrics, a model or scores, baselines first."""
        found = {*self.metrics, *self.exported, *self.evaluation.get("models", {})} - {"base"}
        order = list(LABELS)
        return tuple(
            sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name))
        )

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        """The evaluation's entries, base first."""
        models = self.evaluation.get("models", {})
        return {name: models[name] for name in ("base", *self.methods) if name in models}


def label(name: str) -> str:
    """The name of a method as people write it."""
    return LABELS.get(name, name)


def read_bytes(path: Path) -> bytes:
    """The content of a file.

    Raises:
      InputError: the system does not let it be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); restore it or its permissions") from error


def read_run(run_dir: Path) -> Run:
    """Reads everything that the report shows.

    Files that a run appends to may end in half a line when the process was killed: such lines are left
    out and noted. A step that was logged twice, before and after a resume, counts once (the later line).

    Args:
      run_dir: a run folder.

    Returns:
      The run.

    Raises:
      InputError: no such folder, nothing of a run in it, or a damaged file that is written in one piece.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise InputError(f"{run_dir}: no such run folder; give the folder that `raft-jax run` wrote to")
    notes: list[str] = []
    metric_files = {path.parent.name: path for path in sorted(run_dir.glob("*/metrics.jsonl"))}
    refined = run_dir / "refined" / "refined.jsonl"
    run = Run(
        path=run_dir,
        config=_config(run_dir / "config.yaml"),
        refined=tuple(_lines(refined)) if refined.exists() else (),
        refinement_begun=(run_dir / "refined").is_dir(),
        metrics={method: _steps(path, notes) for method, path in metric_files.items()},
        timings=tuple(_appended(run_dir / "timings.jsonl", notes)),
        evaluation=_evaluation(run_dir / "evaluation.json"),
        exported=tuple(sorted(path.parent.name for path in run_dir.glob("*/hf") if any(path.glob("*")))),
        notes=tuple(notes),
    )
    if not (run.config or run.refinement_begun or run.metrics or run.timings or run.evaluation):
        raise InputError(f"{run_dir}: no run in this folder; give the folder that `raft-jax run` wrote to")
    return run


def _config(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    from omegaconf import OmegaConf

    text = read_bytes(path)
    try:
        config = OmegaConf.to_container(OmegaConf.create(text.decode("utf-8")), resolve=False)
    except Exception as error:  # the YAML parser and OmegaConf share no base class
        raise InputError(
            f"{path}: not readable as YAML ({_first_line(error)}); restore it or run again"
        ) from error
    return config if isinstance(config, dict) else {}


def _evaluation(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        evaluation = json.loads(read_bytes(path).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged ({_first_line(error)}); run `raft-jax evaluate` again") from error
    if not isinstance(evaluation, dict) or not isinstance(evaluation.get("models", {}), dict):
        raise InputError(f'{path}: expected an object with "models"; run `raft-jax evaluate` again')
    for name, model in evaluation.get("models", {}).items():
        if not _is_scored(model):
            raise InputError(f"{path}: the scores of {name!r} are not those of a model; run `raft-jax evaluate` again")
    return evaluation


def _is_scored(model: Any) -> bool:
    """Whether an entry has the shape of a model's scores, as far as it has any."""
    if not isinstance(model, dict):
        return False
    parts = [model.get(key) or {} for key in ("domain", "general", "weight_distance")]
    answers = [model.get(key) or [] for key in ("answers", "general_answers")]
    return (
        all(isinstance(part, dict) for part in parts)
        and all(_is_score(score) for part in parts[:2] for key, score in part.items() if key != "cut")
        and _is_number(parts[2].get("mean")) and isinstance(parts[2].get("layers") or [], list)
        and all(isinstance(rows, list) and all(isinstance(row, dict) for row in rows) for rows in answers)
        and all(_is_number(row.get(key)) for rows in answers for row in rows
                for key in ("token_f1", "similarity", "gold_logprob", "divergence"))
    )


def _is_score(score: Any) -> bool:
    return score is None or (isinstance(score, dict) and all(map(_is_number, score.values())))


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, int | float)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(read_bytes(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        row = _object(line)
        if row is None or not _is_refined(row):
            raise InputError(f"{path}:{number}: damaged line; run `raft-jax refine` again")
        yield row


def _is_refined(row: dict[str, Any]) -> bool:
    """Whether a row has the types of a RefinedRow, as far as it has its fields."""
    texts = ("id", "question", "context", "gold", "rewrite", "rewrite_status", "rewrite_note", "answer", "reason")
    rounds, turns = row.get("rounds") or [], row.get("turns") or []
    return (
        all(isinstance(row.get(key, ""), str) for key in texts)
        and all(_is_number(row.get(key)) for key in ("similarity", "gold_mean", "chosen_round"))
        and isinstance(rounds, list) and all(
            isinstance(one, dict) and _is_number(one.get("mean")) and _is_score(one.get("scores")) for one in rounds
        )
        and _is_score(row.get("gold_scores"))
        and isinstance(turns, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in turns)
    )


def _appended(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = [line for line in read_bytes(path).split(b"\n") if line.strip()]
    rows = [row if row and _is_measured(row) else None for row in map(_object, lines)]
    lost = rows.count(None)
    if lost:
        place = path.relative_to(path.parents[1] if path.name == "metrics.jsonl" else path.parent)
        notes.append(f"{lost} unfinished or damaged line{'s' if lost > 1 else ''} in {place} left out")
    return [row for row in rows if row is not None]


def _is_measured(row: dict[str, Any]) -> bool:
    """Whether a line of metrics or timings holds numbers, but for its names and its machine."""
    return all(_is_number(value) for key, value in row.items() if key not in ("stage", "method", "machine"))


def _steps(path: Path, notes: list[str]) -> tuple[dict[str, Any], ...]:
    rows = {row["step"]: row for row in _appended(path, notes) if isinstance(row.get("step"), int)}
    return tuple(rows[step] for step in sorted(rows))


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
