"""The folder of a run: held by one process, and tied to the config and the data that it was begun with."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax

from raft_jax.config import METHOD_NAMES, Config, read_saved, to_dict, to_yaml
from raft_jax.data.files import fingerprint
from raft_jax.errors import InputError
from raft_jax.files import SUMS, kind_of, named_in_sums, parse_json, read_bytes, read_json, read_text
from raft_jax.machine import describe_machine
from raft_jax.settings_text import flat
from raft_jax.sources import fingerprint_files, resolve
from raft_jax.stages import CONTENT, Plan, Settings, plan, settings_of
from raft_jax.train.methods import METHODS

RESULTS = "results.json"
SCORES = ("domain", "general", "weight_distance", "answers", "general_answers", "tokens")  # of an evaluated model


@contextmanager
def open_run_dir(config: Config):
    """The run folder, held by this process alone.

    A folder in which nothing has been computed yet takes any config and data: what a first try complained about
    may be mended and tried again. What a changed config leaves standing in one with results is printed.

    Raises:
      InputError: the folder cannot be made, another process uses it, a file of it is damaged, or a changed setting or
        other data ask for refinement or training anew (says which).
    """
    run_dir = Path(config.run_dir).expanduser()
    with _lock_file(run_dir) as lock:
        if is_writer():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"{run_dir}: another process is running in this folder; wait for it, or set run_dir"
                ) from error
            except OSError as error:
                raise InputError(f"{run_dir}: cannot be locked ({error.strerror}); set run_dir to a local folder"
                                 ) from error
        settings = all_settings(config)
        planned, records = _compare(config, settings)
        if lines := [*planned.lines(), *missing_files(run_dir, config)] if is_writer() else []:
            print(*lines, sep="\n", flush=True)
        if "refine" in planned.stale:
            del records["refine"]
        for stage in ("refine", *(f"train {name}" for name in config.methods)):
            records.setdefault(stage, settings_for(stage, settings))  # of what begins now
        start_date(run_dir)
        write_results(run_dir, records)
        write_atomically(run_dir / "config.yaml", to_yaml(config))
        yield run_dir


def _lock_file(run_dir: Path):
    path = run_dir / "run.lock"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: expected a file, found {kind_of(path.stat().st_mode)}; remove it")
        return path.open("w")
    except OSError as error:
        raise InputError(f"{run_dir}: cannot be used as run folder ({error.strerror}); set run_dir") from error


def all_settings(config: Config) -> dict[str, Any]:
    """Every key of a config, and beside the keys that name files or folders what is in them."""
    settings = flat(to_dict(config))
    for key in ("data.path", "evaluate.general_path"):
        settings[key + CONTENT] = fingerprint(settings[key])
    settings["model.source" + CONTENT] = fingerprint_files(resolve(config.model.source))
    with suppress(InputError):  # not every run takes one; a stage that does says what is wrong
        settings["encoder.source" + CONTENT] = fingerprint_files(resolve(config.encoder.source))
    return settings


def settings_for(stage: str, settings: Settings) -> dict[str, Any]:
    """What the result of a stage is made with, of all settings; a stage is "refine", "train sft", "evaluate base", …"""
    name = stage.partition(" ")[2]
    return settings_of(stage, settings, name in METHODS and METHODS[name].target != "gold")


def require_unchanged(config: Config) -> Plan:
    """What of the run folder stands with this config.

    Raises:
      InputError: a file of the folder is damaged or gone, or a changed setting or other data ask for refinement or
        training anew.
    """
    return _compare(config, all_settings(config))[0]


def _compare(config: Config, settings: Settings) -> tuple[Plan, dict[str, Settings]]:
    """The plan, and with which settings each result that is there was made."""
    run_dir = Path(config.run_dir).expanduser()
    records = read_results(run_dir)
    names = ("", "base", *config.methods)
    compared = {stage: record for stage, record in records.items() if stage.partition(" ")[2] in names}
    return plan(str(run_dir), compared, {stage: settings_for(stage, settings) for stage in compared}), records


def _present(run_dir: Path) -> list[str]:
    """The stages of which there is something in a run folder, but for evaluations."""
    stages = ["refine"] if (run_dir / "refined").exists() else []
    for name in METHOD_NAMES:
        stages += [f"train {name}"] if (run_dir / name).exists() else []
        stages += [f"export {name}"] if (run_dir / name / "hf").exists() else []
    return stages


def read_results(run_dir: Path) -> dict[str, Settings]:
    """The settings with which each result that is in the folder was made.

    Refined rows alone may lie there without a config: so they are taken along into a new run.

    Raises:
      InputError: what says so is damaged or gone.
    """
    evaluation = read_evaluation(run_dir / "evaluation.json")
    evaluated = [f"evaluate {name}" for name in evaluation["models"]]
    if not (present := [*_present(run_dir), *evaluated]):
        return {}
    saved, path = run_dir / "config.yaml", run_dir / RESULTS
    older = {"data.path": run_dir / "data.sha256", "evaluate.general_path": run_dir / "general.sha256"}
    is_old = all(file.exists() for file in older.values())  # versions before 0.2 wrote these in place of results.json
    if present != ["refine"]:
        for needed in (saved, *([] if is_old else [path, run_dir / "date"])):
            if not needed.exists():
                raise InputError(f"{needed}: is gone, and with it what the results beside it are of; put it back, or "
                                 "set run_dir to a new folder")
    _timings(run_dir)
    before = read_saved(saved) if saved.exists() else {}
    if path.exists():
        records = read_json(path)
        if not isinstance(records, dict) or not all(isinstance(record, dict) for record in records.values()):
            raise InputError(f"{path}: damaged, expected an object of objects; put it back, or set run_dir to a new "
                             "folder")
        # An export that is there without a record was finished by a process that was killed just then.
        found = {stage: records.get(stage, records.get(stage.replace("export ", "train "))) for stage in present}
        found |= {f"evaluate {name}": record for name, record in evaluation["settings"].items()
                  if name in evaluation["models"]}
        return {stage: record for stage, record in found.items() if record is not None}
    before |= {key + CONTENT: _digest(file) for key, file in older.items() if file.exists()}
    return {stage: settings_for(stage, before) for stage in present} if saved.exists() else {}


def missing_files(run_dir: Path, config: Config) -> Iterator[str]:
    """A line about each file that a finished stage has left and that is not there any more, with what comes of it."""
    for path, consequence in _left_behind(run_dir, config):
        if not path.exists():
            yield f"{path}: is gone; {consequence}"


def _left_behind(run_dir: Path, config: Config) -> Iterator[tuple[Path, str]]:
    """The files that finished stages have left, as far as the others tell, and what it means where one is not there."""
    timings, evaluation, refined = run_dir / "timings.jsonl", run_dir / "evaluation.json", run_dir / "refined"
    timed = {(line["stage"], line["method"]) for line in _timings(run_dir)}
    recorded = read_json(run_dir / RESULTS) if (run_dir / RESULTS).exists() else {}
    exported = [name for name in config.methods if (run_dir / name / "hf").exists()]
    again = "the same command makes it again"
    if exported or evaluation.exists():
        yield timings, "the report lacks the time and the machine of what was finished before"
    if any(stage == "evaluate" for stage, _ in timed) and not (run_dir / "evaluation.new.json").exists():
        yield evaluation, "every model is evaluated again"
    published = any((refined / name).exists() for name in ("manifest.json", "refined.jsonl"))
    if published or any(METHODS[name].target != "gold" for name in exported):
        yield refined / "ledger.jsonl", "what is refined again is written anew"
        yield refined / "refined.jsonl", "the report lacks the refined rows, and raft-jax refine makes it again"
        yield refined / "manifest.json", "raft-jax refine makes it again"
    for name in config.methods:
        folder = run_dir / name
        if name not in exported:
            if f"export {name}" in recorded or ("export", name) in timed:
                yield folder / "hf", again + ", training what no checkpoint holds"
            continue
        yield folder / "metrics.jsonl", "the report lacks its curves"
        yield folder / "hf" / SUMS, "the files beside it are no longer checked"
        if config.train.lora.rank:
            yield folder / "adapter", f"remove {folder / 'hf'}, too, and {again}"
        for file in named_in_sums(folder / "hf"):
            yield file, f"remove {folder / 'hf'}, and {again}"


def _digest(path: Path) -> str:
    text = read_text(path).strip()
    if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
        raise InputError(f"{path}: damaged, expected a sha256; put it back, or set run_dir to a new folder")
    return text


def write_results(run_dir: Path, records: Mapping[str, Settings]) -> None:
    """Notes with which settings each result was made; for an evaluation that stands beside its scores."""
    known = read_evaluation(run_dir / "evaluation.json")["settings"]
    records = {stage: records[stage] for stage in sorted(records) if stage.removeprefix("evaluate ") not in known}
    text, path = json.dumps(records, indent=1, ensure_ascii=False) + "\n", run_dir / RESULTS
    if not path.exists() or path.read_text("utf-8") != text:
        write_atomically(path, text)


def read_evaluation(path: Path) -> dict[str, Any]:
    """The scores of each model that is there ("models"), and the settings that each was evaluated with ("settings").

    Raises:
      InputError: the file is damaged, or an entry of it is not all that an evaluation gives.
    """
    if not path.exists():
        return {"models": {}, "settings": {}}
    advice = "remove it, and every model is evaluated again"
    try:
        found = read_json(path)
    except InputError as error:
        raise InputError(f"{error}; damaged: {advice}") from error
    if not isinstance(found, dict) or not isinstance(found.get("models"), dict):
        raise InputError(f'{path}: damaged, expected an object with "models"; {advice}')
    for model, scores in found["models"].items():
        if missing := [key for key in SCORES if not isinstance(scores, dict) or not scores.get(key)]:
            raise InputError(f"{path}: damaged, the scores of {model} lack {', '.join(missing)}; {advice}")
    settings = found.get("settings", {})
    if not isinstance(settings, dict) or not all(isinstance(record, dict) for record in settings.values()):
        raise InputError(f'{path}: damaged, expected "settings" of each model; {advice}')
    return {"models": found["models"], "settings": settings}


def start_date(run_dir: Path) -> datetime.date:
    """The day on which the run was begun. Some chat templates print today's: a run that goes on another day must not
    ask other questions."""
    if date_begun(run_dir) is None:
        write_atomically(run_dir / "date", datetime.date.today().isoformat() + "\n")
    wait_for_writer("date")
    return date_begun(run_dir)


def date_begun(run_dir: Path) -> datetime.date | None:
    """The day on which a run was begun, None where it was not."""
    path = run_dir / "date"
    if not path.exists():
        return None
    text = read_text(path).strip()
    try:
        return datetime.date.fromisoformat(text)
    except ValueError as error:
        raise InputError(f"{path}: damaged ({text[:40]!r}); write the day there on which the run was begun, as "
                         "2026-11-30") from error


def is_writer() -> bool:
    """Whether this process writes the run folder: of several that share it, the first."""
    return jax.process_index() == 0


def wait_for_writer(what: str) -> None:
    """Holds the other processes until the first has written something that they are about to look for."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file as a whole."""
    if not is_writer():
        return
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def recorded_time(run_dir: Path, stage: str, method: str | None = None) -> tuple[float, int]:
    """Seconds and tokens of a stage so far."""
    for line in _timings(run_dir):
        if (line["stage"], line["method"]) == (stage, method):
            return line["seconds"], line["tokens"]
    return 0.0, 0


def record_time(run_dir: Path, stage: str, method: str | None, seconds: float, tokens: int) -> None:
    """Writes a stage's line in timings.jsonl, in place of an earlier one."""
    path, lines = run_dir / "timings.jsonl", _timings(run_dir)
    lines = [line for line in lines if (line["stage"], line["method"]) != (stage, method)]
    lines.append({"stage": stage, "method": method, "seconds": round(seconds, 3), "tokens": tokens,
                  "machine": describe_machine()})
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))


def _timings(run_dir: Path) -> list[dict]:
    path, lines = run_dir / "timings.jsonl", []
    if not path.exists():
        return lines
    for number, text in enumerate(read_bytes(path).splitlines(), start=1):
        try:
            line = parse_json(text)
            _ = {line["stage"], line["method"]}, line["seconds"] + line["tokens"]
        except (ValueError, LookupError, TypeError) as error:
            raise InputError(f"{path}:{number}: damaged; remove this line: the report will lack a stage's time, and "
                             "the same command goes on") from error
        lines.append(line)
    return lines


def folder_bytes(run_dir: Path) -> int:
    """What a run folder takes on the disk."""
    return sum(status.st_size for path in run_dir.rglob("*") if stat.S_ISREG((status := path.lstat()).st_mode))
