"""Reads a run folder as it lies: finished, interrupted or hardly begun."""

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

    try:
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # the YAML parser and OmegaConf share no base class
        raise InputError(
            f"{path}: not readable as YAML ({_first_line(error)}); restore it or run again"
        ) from error
    return config if isinstance(config, dict) else {}


def _evaluation(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: damaged ({_first_line(error)}); run `raft-jax evaluate` again") from error
    if not isinstance(evaluation, dict) or not isinstance(evaluation.get("models", {}), dict):
        raise InputError(f'{path}: expected an object with "models"; run `raft-jax evaluate` again')
    return evaluation


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        row = _object(line)
        if row is None:
            raise InputError(f"{path}:{number}: damaged line; run `raft-jax refine` again")
        yield row


def _appended(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    rows = [_object(line) for line in lines]
    lost = rows.count(None)
    if lost:
        place = path.relative_to(path.parents[1] if path.name == "metrics.jsonl" else path.parent)
        notes.append(f"{lost} unfinished line{'s' if lost > 1 else ''} in {place} left out")
    return [row for row in rows if row is not None]


def _steps(path: Path, notes: list[str]) -> tuple[dict[str, Any], ...]:
    rows = {row["step"]: row for row in _appended(path, notes) if isinstance(row.get("step"), int)}
    return tuple(rows[step] for step in sorted(rows))


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode("utf-8"))
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
