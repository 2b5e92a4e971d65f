"""The folder of a run: the names of its files, and reading and writing its records."""

from __future__ import annotations

import datetime
import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raft_jax import bucket
from raft_jax.errors import InputError
from raft_jax.files import is_there, parse_record, read_bytes, read_text
from raft_jax.metrics import read_metrics
from raft_jax.outcome import Work
from raft_jax.scores import ModelScores
from raft_jax.stages import Settings


@dataclass(frozen=True)
class Timing:
    """Seconds and tokens of a stage (of one method, for stages that have one), and the machine that it ran on."""

    stage: str
    method: str | None
    seconds: float
    tokens: int
    machine: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """The scores of each evaluated model, and the settings that each was evaluated with."""

    models: dict[str, ModelScores]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Account:
    """What each model of the refinement took."""

    works: list[Work]


@dataclass(frozen=True)
class NearDuplicates:
    """The rows that ask nearly what an earlier row asks, as id → id, and what questions and encoder these are of."""

    made_with: str
    rows: dict[str, str]


class MethodFolder:
    """The files of one method in a run folder."""

    def __init__(self, path: Path):
        self.path = path
        self.metrics_jsonl = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"  # of a run folder in a bucket, these two lie in the bucket only
        self.best = path / "best"
        self.adapter = path / "adapter"
        self.profile = path / "profile"
        self.diverged = path / "diverged.txt"  # why a comparison goes on without the method
        self.export = path / "hf"
        self.model_card = self.export / "README.md"

    @property
    def is_exported(self) -> bool:
        return self.export.is_dir()

    def metrics(self) -> list[dict[str, float]]:
        """All intact lines of metrics.jsonl, sorted by step."""
        return read_metrics(self.metrics_jsonl)


class RunFolder:
    """The files of a run folder by name, and their records.

    Reading raises an InputError of one line if a file is damaged. Writing replaces a file atomically, and does nothing
    in processes other than the first. Of a folder in a bucket, these are the files of the local copy.
    """

    def __init__(self, path: str | Path):
        self.path = path = bucket.local_path(path)
        self.lock = path / "run.lock"
        self.config_yaml = path / "config.yaml"
        self.results_json = path / "results.json"
        self.date_file = path / "date"
        self.duplicates_json = path / "duplicates.json"
        self.timings_jsonl = path / "timings.jsonl"
        self.evaluation_json = path / "evaluation.json"
        self.evaluation_new_json = path / "evaluation.new.json"  # with changed settings, until it is complete
        self.tasks = path / "evaluation" / "tasks"  # NAME/TASK.json: a task's scores and samples for one model
        self.verdicts_jsonl = path / "evaluation" / "verdicts.jsonl"  # of judges on answers to held-out questions
        self.report_html = path / "report.html"
        self.comparison_html = path / "comparison.html"
        self.refined = path / "refined"
        self.ledger_jsonl = self.refined / "ledger.jsonl"
        self.refined_jsonl = self.refined / "refined.jsonl"
        self.account_json = self.refined / "account.json"
        self.refined_manifest = self.refined / "manifest.json"

    def __str__(self) -> str:
        return shown(self.path)

    def method(self, name: str) -> MethodFolder:
        return MethodFolder(self.path / name)

    def wait_for_writer(self, what: str) -> None:
        """Makes all processes wait for each other; then the others see the files that the first has written."""
        from raft_jax.sharding import wait_for_writer

        bucket.share(self.path)
        wait_for_writer(what)
        bucket.receive(self.path)

    def num_bytes(self) -> int:
        """The total size of all files in bytes."""
        return sum(status.st_size for path in self.path.rglob("*") if stat.S_ISREG((status := path.lstat()).st_mode))

    def timings(self) -> list[Timing]:
        """The record of each stage so far.

        Raises:
          InputError: a line is damaged (names the first).
        """
        timings, damaged = read_timings(self.timings_jsonl)
        if damaged:
            raise InputError(
                f"{self.timings_jsonl}:{damaged[0]}: damaged; remove this line: the report will lack a "
                "stage's time, and the same command goes on"
            )
        return timings

    def timing(self, stage: str, method: str | None = None) -> Timing:
        """The record of a stage so far; 0 seconds and tokens if there is none."""
        matching = [timing for timing in self.timings() if (timing.stage, timing.method) == (stage, method)]
        return matching[0] if matching else Timing(stage, method, 0.0, 0)

    def record_time(self, stage: str, method: str | None, seconds: float, tokens: int) -> None:
        """Writes the record of a stage, replacing an earlier one."""
        from raft_jax.machine import describe_machine

        timings = [timing for timing in self.timings() if (timing.stage, timing.method) != (stage, method)]
        timings.append(Timing(stage, method, round(seconds, 3), tokens, describe_machine()))
        write_atomically(self.timings_jsonl, "".join(json.dumps(asdict(timing)) + "\n" for timing in timings))

    def account(self) -> list[Work]:
        """What the models of the refinement took; empty if that is not recorded."""
        if not is_there(self.account_json):
            return []
        try:
            return list(parse_record(Account, read_bytes(self.account_json)).works)
        except ValueError as error:
            raise InputError(f"{self.account_json}: damaged ({error}); remove it") from error

    def write_account(self, works: Sequence[Work]) -> None:
        write_atomically(
            self.account_json, json.dumps(asdict(Account(list(works))), indent=1, ensure_ascii=False) + "\n"
        )

    def near_duplicates(self) -> NearDuplicates | None:
        """The near duplicates that were found before; None if that is not recorded."""
        if not is_there(self.duplicates_json):
            return None
        try:
            return parse_record(NearDuplicates, read_bytes(self.duplicates_json))
        except ValueError as error:
            raise InputError(
                f"{self.duplicates_json}: damaged ({error}); remove it, and they are found again"
            ) from error

    def write_near_duplicates(self, pairs: NearDuplicates) -> None:
        write_atomically(self.duplicates_json, json.dumps(asdict(pairs), indent=1, ensure_ascii=False) + "\n")

    def evaluation(self, *, begun: bool = False) -> Evaluation:
        """The existing scores; with `begun`, those of a new evaluation with changed settings that is not complete."""
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
        """Records the settings that each result was made with; those of evaluations are stored with the scores."""
        known = self.evaluation().settings
        records = {stage: records[stage] for stage in sorted(records) if stage.removeprefix("evaluate ") not in known}
        text = json.dumps(records, indent=1, ensure_ascii=False) + "\n"
        if not self.results_json.exists() or self.results_json.read_text("utf-8") != text:
            write_atomically(self.results_json, text)

    def start_date(self) -> datetime.date:
        """The day on which the run began; records today if none is recorded.

        Some chat templates print the current date, so without the record a run resumed on another day would have
        different prompts.
        """
        if self.date_begun() is None:
            write_atomically(self.date_file, datetime.date.today().isoformat() + "\n")
        self.wait_for_writer("date")
        return self.date_begun()

    def date_begun(self) -> datetime.date | None:
        """The day on which the run began; None if none is recorded."""
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


def shown(path: Path) -> str:
    """A path in a run folder as it is printed: of a folder in a bucket, the bucket's."""
    return bucket.url_of(path) or str(path)


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
    """Replaces a file atomically, in the first process only."""
    from raft_jax.sharding import is_writer

    if not is_writer():
        return
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
