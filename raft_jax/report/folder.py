"""Reads a run folder in any state: finished, interrupted or just begun."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raft_jax.data.refined import RefinedRow
from raft_jax.errors import InputError
from raft_jax.files import parse_record, read_bytes, read_text
from raft_jax.methods import BASE, METHODS, OTHER, Style
from raft_jax.metrics import scan_metrics
from raft_jax.outcome import Work
from raft_jax.run_folder import RunFolder, Timing, read_timings
from raft_jax.scores import ModelScores
from raft_jax.settings_text import parse_yaml


@dataclass(frozen=True)
class RunRecords:
    """The contents of a run folder; parts that do not exist yet are empty."""

    folder: RunFolder
    config: dict[str, Any] = field(default_factory=dict)
    refined: list[RefinedRow] = field(default_factory=list)
    refinement_begun: bool = False
    works: list[Work] = field(default_factory=list)
    metrics: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)
    scores: dict[str, ModelScores] = field(default_factory=dict)
    exported: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods with metrics, an exported model or scores: the baselines, RAFT, then any not in `METHODS`."""
        order = [*(name for name in METHODS if name != "raft"), "raft"]
        names = {*self.metrics, *self.exported, *self.scores} - {"base"}
        return tuple(sorted(names, key=lambda name: (order.index(name) if name in order else len(order), name)))

    @property
    def models(self) -> dict[str, ModelScores]:
        """The scores of each evaluated model, with the base model first."""
        return {name: self.scores[name] for name in ("base", *self.methods) if name in self.scores}


def style_of(name: str) -> Style:
    """The style in which charts draw the base model or a method."""
    return BASE if name == "base" else METHODS[name].style if name in METHODS else OTHER


def label(name: str) -> str:
    """The display name of a model."""
    return name if style_of(name) is OTHER else style_of(name).label


def read_run(run_dir: Path) -> RunRecords:
    """Reads everything that the report shows.

    Damaged lines of metrics and timings are left out and noted. A step that was logged twice, before and after a
    resume, counts once (the later line).

    Args:
      run_dir: a run folder.

    Raises:
      InputError: the folder does not exist or holds no run, or a file that is written as a whole is damaged.
    """
    folder = RunFolder(run_dir)
    if not folder.path.is_dir():
        raise InputError(f"{run_dir}: no such run folder; give the folder that `raft-jax run` wrote to")
    notes: list[str] = []
    run = RunRecords(
        folder,
        config=_config(folder.config_yaml),
        refined=list(_refined(folder.refined_jsonl)) if folder.refined_jsonl.exists() else [],
        refinement_begun=folder.refined.is_dir(),
        works=folder.account(),
        metrics={path.parent.name: _metrics(path, notes) for path in sorted(folder.path.glob("*/metrics.jsonl"))},
        timings=_timings(folder.timings_jsonl, notes),
        scores=folder.evaluation().models,
        exported=tuple(sorted(path.parent.name for path in folder.path.glob("*/hf") if any(path.glob("*")))),
        notes=tuple(notes),
    )
    if not (run.config or run.refinement_begun or run.metrics or run.timings or run.scores):
        raise InputError(f"{run_dir}: no run in this folder; give the folder that `raft-jax run` wrote to")
    return run


def _config(path: Path) -> dict[str, Any]:
    return parse_yaml(read_text(path), str(path)) if path.exists() else {}


def _refined(path: Path) -> Iterator[RefinedRow]:
    for number, line in enumerate(read_bytes(path).splitlines(), start=1):
        try:
            yield parse_record(RefinedRow, line)
        except ValueError as error:
            raise InputError(f"{path}:{number}: damaged line ({error}); run `raft-jax refine` again") from error


def _metrics(path: Path, notes: list[str]) -> list[dict[str, float]]:
    lines, damaged = scan_metrics(path)
    notes += _left_out(f"{path.parent.name}/{path.name}", damaged)
    return [lines[step] for step in sorted(lines)]


def _timings(path: Path, notes: list[str]) -> list[Timing]:
    timings, damaged = read_timings(path)
    notes += _left_out(path.name, damaged)
    return timings


def _left_out(name: str, damaged: list[int]) -> list[str]:
    return [f"{len(damaged)} damaged line{'s' if len(damaged) > 1 else ''} in {name} left out"] if damaged else []
