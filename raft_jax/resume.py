"""Opens a run folder: held by one process, and tied to the config and the data that it was begun with."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from raft_jax.config import Config, read_saved, to_dict, to_yaml
from raft_jax.data.files import fingerprint
from raft_jax.errors import InputError
from raft_jax.files import SUMS, kind_of, named_in_sums, read_json
from raft_jax.methods import METHODS, any_refines
from raft_jax.run_folder import RunFolder, write_atomically
from raft_jax.settings_text import flat
from raft_jax.sharding import is_writer
from raft_jax.sources import fingerprint_files, resolve
from raft_jax.stages import CONTENT, Plan, Settings, plan, settings_of


@contextmanager
def open_run_folder(config: Config) -> Iterator[RunFolder]:
    """The run folder, held by this process alone.

    A folder in which nothing has been computed yet takes any config and data: what a first try complained about
    may be mended and tried again. What a changed config leaves standing in one with results is printed.

    Raises:
      InputError: the folder cannot be made, another process uses it, a file of it is damaged, or a changed setting or
        other data ask for refinement or training anew (says which).
    """
    folder = RunFolder(config.run_dir)
    with _lock_file(folder) as lock:
        if is_writer():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"{folder}: another process is running in this folder; wait for it, or set run_dir"
                ) from error
            except OSError as error:
                raise InputError(
                    f"{folder}: cannot be locked ({error.strerror}); set run_dir to a local folder"
                ) from error
        settings = all_settings(config)
        planned, records = _compare(config, settings)
        if lines := [*planned.lines(), *missing_files(folder, config)] if is_writer() else []:
            print(*lines, sep="\n", flush=True)
        if "refine" in planned.stale:
            del records["refine"]
        for stage in ("refine", *(f"train {name}" for name in config.methods)):
            records.setdefault(stage, settings_for(stage, settings))  # of what begins now
        folder.start_date()
        folder.write_results(records)
        write_atomically(folder.config_yaml, to_yaml(config))
        yield folder


def _lock_file(folder: RunFolder):
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        if folder.lock.exists() and not folder.lock.is_file():
            raise InputError(f"{folder.lock}: expected a file, found {kind_of(folder.lock.stat().st_mode)}; remove it")
        return folder.lock.open("w")
    except OSError as error:
        raise InputError(f"{folder}: cannot be used as run folder ({error.strerror}); set run_dir") from error


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
    return settings_of(stage, settings, name in METHODS and METHODS[name].refines)


def require_unchanged(config: Config) -> Plan:
    """What of the run folder stands with this config.

    Raises:
      InputError: a file of the folder is damaged or gone, or a changed setting or other data ask for refinement or
        training anew.
    """
    return _compare(config, all_settings(config))[0]


def _compare(config: Config, settings: Settings) -> tuple[Plan, dict[str, Settings]]:
    """The plan, and with which settings each result that is there was made."""
    records = read_results(RunFolder(config.run_dir))
    names = ("", "base", *config.methods)
    compared = {stage: record for stage, record in records.items() if stage.partition(" ")[2] in names}
    return plan(config.run_dir, compared, {stage: settings_for(stage, settings) for stage in compared}), records


def _present(folder: RunFolder) -> list[str]:
    """The stages of which there is something in a run folder, but for evaluations."""
    stages = ["refine"] if folder.refined.exists() else []
    for name in METHODS:
        stages += [f"train {name}"] if folder.method(name).path.exists() else []
        stages += [f"export {name}"] if folder.method(name).is_exported else []
    return stages


def read_results(folder: RunFolder) -> dict[str, Settings]:
    """The settings with which each result that is in the folder was made.

    Refined rows alone may lie there without a config: so they are taken along into a new run.

    Raises:
      InputError: what says so is damaged or gone.
    """
    evaluation = folder.evaluation()
    present = [*_present(folder), *(f"evaluate {name}" for name in evaluation.models)]
    if not present:
        return {}
    if present != ["refine"]:
        for needed in (folder.config_yaml, folder.results_json, folder.date_file):
            if not needed.exists():
                raise InputError(
                    f"{needed}: is gone, and with it what the results beside it are of; put it back, or "
                    "set run_dir to a new folder"
                )
    folder.timings()
    if folder.config_yaml.exists():
        read_saved(folder.config_yaml)
    if not folder.results_json.exists():
        return {}
    records = read_json(folder.results_json)
    if not isinstance(records, dict) or not all(isinstance(record, dict) for record in records.values()):
        raise InputError(
            f"{folder.results_json}: damaged, expected an object of objects; put it back, or set run_dir "
            "to a new folder"
        )
    # An export that is there without a record was finished by a process that was killed just then.
    found = {stage: records.get(stage, records.get(stage.replace("export ", "train "))) for stage in present}
    found |= {f"evaluate {name}": record for name, record in evaluation.settings.items() if name in evaluation.models}
    return {stage: record for stage, record in found.items() if record is not None}


def missing_files(folder: RunFolder, config: Config) -> Iterator[str]:
    """A line about each file that a finished stage has left and that is not there any more, with what comes of it."""
    for path, consequence in _left_behind(folder, config):
        if not path.exists():
            yield f"{path}: is gone; {consequence}"


def _left_behind(folder: RunFolder, config: Config) -> Iterator[tuple[Path, str]]:
    """The files that finished stages have left, as far as the others tell, and what it means where one is not there."""
    timed = {(timing.stage, timing.method) for timing in folder.timings()}
    recorded = read_json(folder.results_json) if folder.results_json.exists() else {}
    methods = {name: folder.method(name) for name in config.methods}
    exported = [name for name, method in methods.items() if method.is_exported]
    again = "the same command makes it again"
    if exported or folder.evaluation_json.exists():
        yield folder.timings_jsonl, "the report lacks the time and the machine of what was finished before"
    if any(stage == "evaluate" for stage, _ in timed) and not folder.evaluation_new_json.exists():
        yield folder.evaluation_json, "every model is evaluated again"
    if folder.refined_manifest.exists() or folder.refined_jsonl.exists() or any_refines(exported):
        yield folder.ledger_jsonl, "what is refined again is written anew"
        yield folder.refined_jsonl, "the report lacks the refined rows, and raft-jax refine makes it again"
        yield folder.refined_manifest, "raft-jax refine makes it again"
    for name, method in methods.items():
        if not method.is_exported:
            if f"export {name}" in recorded or ("export", name) in timed:
                yield method.export, again + ", training what no checkpoint holds"
            continue
        yield method.metrics_jsonl, "the report lacks its curves"
        yield method.export / SUMS, "the files beside it are no longer checked"
        if config.train.lora.rank:
            yield method.adapter, f"remove {method.export}, too, and {again}"
        for file in named_in_sums(method.export):
            yield file, f"remove {method.export}, and {again}"
