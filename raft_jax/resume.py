"""Opens a run folder: locks it, and compares config and data with those that its results were made with."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from raft_jax.config import STUDENT, Config
from raft_jax.config_file import read_saved, to_dict, to_yaml
from raft_jax.data.files import fingerprint
from raft_jax.data.prompts import load_prompts
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
    """The run folder, locked for this process.

    A folder without results accepts any config and data, so that errors in them can be fixed after a first try. For a
    folder with results, prints which results a changed config keeps and which are made again.

    Raises:
      InputError: the folder cannot be created, another process uses it, a file in it is damaged, or a changed setting
        or other data would require a new refinement or training (names the changes).
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
            records.setdefault(stage, settings_for(stage, settings))  # stages that begin with these settings
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
    """Every key of a config, and for keys that name files or folders also fingerprints of their content."""
    settings = {key: value for key, value in flat(to_dict(config)).items() if not key.startswith("endpoints.")}
    settings |= _role_settings(config)
    if config.train.student_init is not None:
        with suppress(InputError):  # the training reports the error
            settings["train.student_init" + CONTENT] = fingerprint_files(resolve(config.train.student_init))
    for key in ("data.path", "evaluate.general_path"):
        settings[key + CONTENT] = fingerprint(settings[key])
    settings["model.source" + CONTENT] = fingerprint_files(resolve(config.model.source))
    with suppress(InputError):  # not every run needs an encoder; a stage that does reports the error
        settings["encoder.source" + CONTENT] = fingerprint_files(resolve(config.encoder.source))
    return settings


def _role_settings(config: Config) -> dict[str, Any]:
    """What results depend on of the endpoints that have a role, and fingerprints of other models and of prompts."""
    settings: dict[str, Any] = {}
    for key, role in config.model_roles.items():
        if (endpoint := config.endpoints.get(role)) is not None:
            settings[f"endpoints.{role}.model"] = endpoint.model
            settings[f"endpoints.{role}.temperature"] = endpoint.temperature
            settings[f"endpoints.{role}.max_tokens"] = endpoint.max_tokens
            # As one value: of a key that only one side has, a change would not be seen.
            settings[f"endpoints.{role}.extra_body"] = json.dumps(endpoint.extra_body, sort_keys=True)
        elif role != STUDENT:
            with suppress(InputError):  # the stage that needs it reports the error
                settings[f"{key}{CONTENT}"] = fingerprint_files(resolve(role))
    if config.refine.prompts is not None:
        with suppress(InputError):
            prompts = load_prompts(config.refine.prompts)
            settings[f"refine.prompts{CONTENT}"] = {f"{name}.txt": prompts.digest(name) for name in prompts.texts}
    return settings


def settings_for(stage: str, settings: Settings) -> dict[str, Any]:
    """The settings that the result of a stage depends on; a stage is "refine", "train sft", "evaluate base", …"""
    name = stage.partition(" ")[2]
    return settings_of(stage, settings, name in METHODS and METHODS[name].refines)


def require_unchanged(config: Config) -> Plan:
    """Which results of the run folder remain valid with this config.

    Raises:
      InputError: a file of the folder is damaged or missing, or a changed setting or other data would require a new
        refinement or training.
    """
    return _compare(config, all_settings(config))[0]


def _compare(config: Config, settings: Settings) -> tuple[Plan, dict[str, Settings]]:
    """The plan, and the settings that each existing result was made with."""
    records = read_results(RunFolder(config.run_dir))
    names = ("", "base", *config.methods)
    compared = {stage: record for stage, record in records.items() if stage.partition(" ")[2] in names}
    return plan(config.run_dir, compared, {stage: settings_for(stage, settings) for stage in compared}), records


def _present(folder: RunFolder) -> list[str]:
    """The stages that have files in a run folder, except for evaluations."""
    stages = ["refine"] if folder.refined.exists() else []
    for name in METHODS:
        stages += [f"train {name}"] if folder.method(name).path.exists() else []
        stages += [f"export {name}"] if folder.method(name).is_exported else []
    return stages


def read_results(folder: RunFolder) -> dict[str, Settings]:
    """The settings that each result in the folder was made with.

    A folder with refined rows only needs no config: copying them is how a new run reuses them.

    Raises:
      InputError: one of the folder's records is damaged or missing.
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
    # An export without a record was finished by a process that was killed before it wrote the record.
    by_stage = {stage: records.get(stage, records.get(stage.replace("export ", "train "))) for stage in present}
    evaluated = evaluation.settings.items()
    by_stage |= {f"evaluate {name}": record for name, record in evaluated if name in evaluation.models}
    return {stage: record for stage, record in by_stage.items() if record is not None}


def missing_files(folder: RunFolder, config: Config) -> Iterator[str]:
    """A line about each missing file of a finished stage, with the consequence."""
    for path, consequence in _left_behind(folder, config):
        if not path.exists():
            yield f"{path}: is gone; {consequence}"


def _left_behind(folder: RunFolder, config: Config) -> Iterator[tuple[Path, str]]:
    """(path, consequence if it is missing) of the files of finished stages, as inferred from the other files."""
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
        trained = name not in METHODS or METHODS[name].pruned_from is None
        if trained:
            yield method.metrics_jsonl, "the report lacks its curves"
        yield method.export / SUMS, "the files beside it are no longer checked"
        if config.train.lora.rank and trained:
            yield method.adapter, f"remove {method.export}, too, and {again}"
        for file in named_in_sums(method.export):
            yield file, f"remove {method.export}, and {again}"
