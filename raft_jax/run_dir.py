"""The folder of a run: held by one process, and tied to the config and the data that it was begun with."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
from contextlib import contextmanager
from pathlib import Path

import jax

from raft_jax.config import METHOD_NAMES, Config, changed_keys, to_yaml
from raft_jax.data.files import fingerprint
from raft_jax.errors import InputError


@contextmanager
def open_run_dir(config: Config):
    """The run folder, held by this process alone.

    A folder in which nothing has been computed yet takes any config and data: what a first try complained about
    may be mended and tried again.

    Raises:
      InputError: the folder cannot be made, another process uses it, or it was begun with another config (says which
        keys) or other data.
    """
    run_dir = Path(config.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / "run.lock").open("w")
    except OSError as error:
        raise InputError(f"{run_dir}: cannot be used as run folder ({error.strerror}); set run_dir") from error
    with lock:
        if is_writer():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"{run_dir}: another process is running in this folder; wait for it, or set run_dir"
                ) from error
        require_unchanged(config)
        for name, path in _sources(config).items():
            digest = fingerprint(path)
            write_atomically(run_dir / f"{name}.sha256", digest + "\n")
        write_atomically(run_dir / "config.yaml", to_yaml(config))
        yield run_dir


def _sources(config: Config) -> dict[str, str]:
    """The files whose content results are of."""
    return {"data": config.data.path, "general": config.evaluate.general_path}


def require_unchanged(config: Config) -> None:
    """Results of two configs or of two versions of the data must not mix.

    Refined rows alone may lie there without a config: so they are taken along into a new run.

    Raises:
      InputError: the run folder has results of another config or of other data, or does not say of which.
    """
    run_dir, sources = Path(config.run_dir), _sources(config)
    if not any((run_dir / name).exists() for name in ("refined", "evaluation.json", *METHOD_NAMES)):
        return
    saved, marks = run_dir / "config.yaml", {name: run_dir / f"{name}.sha256" for name in sources}
    if any((run_dir / name).exists() for name in ("evaluation.json", *METHOD_NAMES)):
        for path in (saved, *marks.values()):
            if not path.exists():
                raise InputError(f"{path}: is gone, and with it what the results beside it are of; put it back, or set "
                                 "run_dir to a new folder")
    if saved.exists() and (changed := changed_keys(config, saved.read_text("utf-8"))):
        raise InputError(
            f"{run_dir}: was made with another config ({'; '.join(changed)}); "
            "change that back, or set run_dir to a new folder"
        )
    for name, path in marks.items():
        if path.exists() and path.read_text().strip() != fingerprint(sources[name]):
            raise InputError(f"{sources[name]}: has changed since {run_dir} was started; set run_dir to a new folder")


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
    return datetime.date.fromisoformat(path.read_text("utf-8").strip()) if path.exists() else None


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
    lines.append({"stage": stage, "method": method, "seconds": round(seconds, 3), "tokens": tokens})
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))


def _timings(run_dir: Path) -> list[dict]:
    path = run_dir / "timings.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
