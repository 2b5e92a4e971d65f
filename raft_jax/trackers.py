"""Sends the metrics of a training to other programs that show them: TensorBoard, Weights & Biases, Trackio."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raft_jax.errors import InputError
from raft_jax.terminal import one_line

PROJECT = "raft-jax"
# The package of each tracker, which pip installs by the same name.
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
Log = Callable[[int, Mapping[str, float]], None]


def require_trackers(names: Sequence[str]) -> None:
    """Raises InputError unless the packages of trackers are installed."""
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise InputError(f"train.trackers: {name} needs {PACKAGES[name]}; pip install {PACKAGES[name]}")


class Trackers:
    """The trackers of one training. One that fails is named once on stderr and left out; training goes on.

    Example:
      >>> with Trackers([], Path("runs/mine/raft"), {}) as trackers:
      ...     trackers.log({"step": 1, "loss": 2.5})
    """

    def __init__(self, names: Sequence[str], folder: Path, settings: Mapping[str, Any]):
        """
        Args:
          names: some of `PACKAGES`.
          folder: of the method in its run folder; the last two parts of its path are the run's name.
          settings: shown with the run.
        """
        self._run = "/".join(folder.absolute().parts[-2:])
        self._open: dict[str, tuple[Log, Callable[[], object]]] = {}
        for name in names:
            opened = self._guarded(name, lambda name=name: OPEN[name](self._run, folder, settings))
            if opened is not None:
                self._open[name] = opened

    def log(self, line: Mapping[str, float]) -> None:
        """Sends a line of metrics.jsonl; what is not finite is left out."""
        step, values = int(line["step"]), {key: value for key, value in line.items() if math.isfinite(value)}
        for name, (log, _) in list(self._open.items()):
            self._guarded(name, lambda log=log: log(step, values))

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_) -> None:
        for name, (_, close) in list(self._open.items()):
            self._guarded(name, close)
        self._open.clear()

    def _guarded(self, name: str, call: Callable[[], Any]) -> Any:
        """What the call returns; None if it fails, and the tracker is left out from then on."""
        try:
            return call()
        except Exception as error:  # whatever another program does must not end a training
            self._open.pop(name, None)
            why = one_line(f"{type(error).__name__}: {error}", 200)
            print(f"train.trackers: {name} failed and is left out ({why})", file=sys.stderr, flush=True)
            return None


def _tensorboard(run: str, folder: Path, settings: Mapping[str, Any]) -> tuple[Log, Callable[[], object]]:
    writer = importlib.import_module(PACKAGES["tensorboard"]).SummaryWriter(str(folder / "tensorboard"))

    def log(step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return log, writer.close


def _like_wandb(package: str):
    """Weights & Biases, or Trackio, which has the same functions."""

    def begin(run: str, folder: Path, settings: Mapping[str, Any]) -> tuple[Log, Callable[[], object]]:
        module = importlib.import_module(package)
        named = {"id": run.replace("/", "-"), "dir": str(folder)} if package == "wandb" else {}
        module.init(project=PROJECT, name=run, config=dict(settings), resume="allow", **named)
        return lambda step, values: module.log(dict(values), step=step), module.finish

    return begin


OPEN = {"tensorboard": _tensorboard, "wandb": _like_wandb("wandb"), "trackio": _like_wandb("trackio")}
