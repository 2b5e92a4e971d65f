"""The folder of a run: the names of its files, and the records in those that one process writes for all."""

from __future__ import annotations

import datetime
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raft_jax.errors import InputError
from raft_jax.files import is_there, parse_record, read_bytes, read_text
from raft_jax.metrics import read_metrics
from raft_jax.scores import ModelScores
from raft_jax.stages import Settings


@dataclass(frozen=True)
class Timing:
    """Seconds and tokens of a stage, of one method where it has one, and the machine that it ran on."""

    stage: str
    method: str | None
    seconds: float
    tokens: int
    machine: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """The scores of each model that is evaluated, and the settings that each was evaluated with."""

    models: dict[str, ModelScores]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)


class MethodFolder:
    """What one method leaves in a run folder."""

    def __init__(self, path: Path):
        self.path = path
        self.metrics_jsonl = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.adapter = path / "adapter"
        self.export = path / "hf"
        self.model_card = self.export / "README.md"

    @property
    def is_exported(self) -> bool:
        return self.export.is_dir()

    def metrics(self) -> list[dict[str, float]]:
        """All whole lines of metrics.jsonl, in the order of their steps."""
        return read_metrics(self.metrics_jsonl)


class RunFolder:
    """A run folder's files by name, and their records.

    Reading raises InputError in one line where a file is damaged; writing replaces a file as a whole, and does nothing
    in any process but the first.
    """

    def __init__(self, path: str | Path):
        self.path = path = Path(path).expanduser()
        self.lock = path / "run.lock"
        self.config_yaml = path / "config.yaml"
        self.results_json = path / "results.json"
        self.date_file = path / "date"
        self.timings_jsonl = path / "timings.jsonl"
        self.evaluation_json = path / "evaluation.json"
        self.evaluation_new_json = path / "evaluation.new.json"  # made with other settings, until it is complete
        self.report_html = path / "report.html"
        self.refined = path / "refined"
        self.ledger_jsonl = self.refined / "ledger.jsonl"
        self.refined_jsonl = self.refined / "refined.jsonl"
        self.refined_manifest = self.refined / "manifest.json"

    def __str__(self) -> str:
        return str(self.path)

    def method(self, name: str) -> MethodFolder:
        return MethodFolder(self.path / name)

    def num_bytes(self) -> int:
        """The size of all files."""
        return sum(status.st_size for path in self.path.rglob("*") if stat.S_ISREG((status := path.lstat()).st_mode))

    def timings(self) -> list[Timing]:
        """A record of each stage so far.

        Raises:
          InputError: the first damaged line.
        """
        timings, damaged = read_timings(self.timings_jsonl)
        if damaged:
            raise InputError(
                f"{self.timings_jsonl}:{damaged[0]}: damaged; remove this line: the report will lack a "
                "stage's time, and the same command goes on"
            )
        return timings

    def timing(self, stage: str, method: str | None = None) -> Timing:
        """Time and tokens of a stage so far."""
        found = [timing for timing in self.timings() if (timing.stage, timing.method) == (stage, method)]
        return found[0] if found else Timing(stage, method, 0.0, 0)

    def record_time(self, stage: str, method: str | None, seconds: float, tokens: int) -> None:
        """Writes a stage's record, in place of an earlier one."""
        from raft_jax.machine import describe_machine

        timings = [timing for timing in self.timings() if (timing.stage, timing.method) != (stage, method)]
        timings.append(Timing(stage, method, round(seconds, 3), tokens, describe_machine()))
        write_atomically(self.timings_jsonl, "".join(json.dumps(asdict(timing)) + "\n" for timing in timings))

    def evaluation(self, *, begun: bool = False) -> Evaluation:
        """The scores that are there; with `begun`, those of an evaluation anew that is not complete."""
        path = self.evaluation_new_json if begun else self.evaluation_json
        if not is_there(path):
            return Evaluation({})
        try:
            return parse_record(Evaluation, read_bytes(path))
        except ValueError as error:
            raise InputError(f"{path}: damaged ({error}); remove it, and every model is evaluated again") from error

    def write_evaluation(self, evaluation: Evaluation, *, begun: bool = False) -> None:
        path = self.evaluation_new_json if begun else self.evaluation_json
        write_atomically(path, json.dumps(asdict(evaluation), indent=1, ensure_ascii=False))

    def write_results(self, records: Mapping[str, Settings]) -> None:
        """Records the settings that each result was made with; evaluations keep theirs beside their scores."""
        known = self.evaluation().settings
        records = {stage: records[stage] for stage in sorted(records) if stage.removeprefix("evaluate ") not in known}
        text = json.dumps(records, indent=1, ensure_ascii=False) + "\n"
        if not self.results_json.exists() or self.results_json.read_text("utf-8") != text:
            write_atomically(self.results_json, text)

    def start_date(self) -> datetime.date:
        """The day on which the run was begun, today where none is recorded.

        Some chat templates print today's date: a run that goes on another day must not ask other questions.
        """
        if self.date_begun() is None:
            write_atomically(self.date_file, datetime.date.today().isoformat() + "\n")
        from raft_jax.sharding import wait_for_writer

        wait_for_writer("date")
        return self.date_begun()

    def date_begun(self) -> datetime.date | None:
        """The day on which the run was begun; None where it was not."""
        if not self.date_file.exists():
            return None
        text = read_text(self.date_file).strip()
        try:
            return datetime.date.fromisoformat(text)
        except ValueError as error:
            raise InputError(
                f"{self.date_file}: damaged ({text[:40]!r}); write the day there on which the run was "
                "begun, as 2026-11-30"
            ) from error


def read_timings(path: Path) -> tuple[list[Timing], list[int]]:
    """The records of timings.jsonl, and the numbers of its damaged lines."""
    timings, damaged = [], []
    for number, line in enumerate(read_bytes(path).splitlines() if is_there(path) else [], start=1):
        try:
            timings.append(parse_record(Timing, line))
        except ValueError:
            damaged.append(number)
    return timings, damaged


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file as a whole, in the first process alone."""
    from raft_jax.sharding import is_writer

    if not is_writer():
        return
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
