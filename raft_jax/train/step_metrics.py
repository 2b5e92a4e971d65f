"""The metrics of a step, read one step late: while the host waits for them, the devices have the next work already."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from raft_jax.errors import InputError
from raft_jax.metrics import MetricsLog
from raft_jax.tokens import Batch
from raft_jax.train.throughput import Throughput


class TrainingDiverged(InputError):
    """A loss or gradient is not finite. The last checkpoint was written before that step."""


class _Pending(NamedTuple):
    step: int
    names: tuple[str, ...]
    values: jax.Array  # [names], on the devices
    learning_rate: float
    batch: Batch  # on the host
    times: dict[str, float]  # rollout_seconds, and seconds once the step has been waited for
    last_process: dict[str, float]  # see `StepMetrics.note_last_process`


class StepMetrics:
    """Reads the metrics of a step once the next one is under way, and writes the line of metrics.jsonl.

    `seconds` of a step is the time from the end of the step before, or from `restart`, to its own end;
    `rollout_seconds` ends when the rollout is sampled. Both are seen by the host as it waits, with work still queued on
    the devices, so measuring them delays nothing.
    """

    def __init__(self, log: MetricsLog, throughput: Throughput, folder: Path, on_line: Callable[[dict], None]):
        """
        Args:
          folder: named in the error of a loss that is not finite.
          on_line: called with each line, to show progress.
        """
        self._log, self._throughput, self._folder, self._on_line = log, throughput, folder, on_line
        self._pending: _Pending | None = None
        self._rollout_seconds = 0.0
        self.total_seconds = 0.0  # of the steps that were waited for
        self.restart()

    def restart(self) -> None:
        """The next step's time begins now, not at the end of the last one, as after a checkpoint."""
        self._began = time.perf_counter()

    def rollout_sampled(self) -> None:
        """The rollout of the step that is added next is complete. All earlier steps have been read."""
        self._rollout_seconds = time.perf_counter() - self._began

    def add(self, step: int, metrics: dict[str, jax.Array], learning_rate: float, batch: Batch) -> None:
        """Notes the metrics of a step that has been dispatched, counted from 1. The step before has been read."""
        values = _stacked(metrics)  # one array, so one transfer
        values.copy_to_host_async()
        self._pending = _Pending(
            step, tuple(metrics), values, learning_rate, batch, {"rollout_seconds": self._rollout_seconds}, {}
        )
        self._rollout_seconds = 0.0

    def note_last_process(self, last: tuple[int, float] | None) -> None:
        """Adds to the step that was added last which process was the last to dispatch the one before, and how many
        seconds after the first one."""
        if self._pending is not None and last is not None:
            self._pending.last_process["last_process"], self._pending.last_process["last_process_seconds"] = last

    def wait(self) -> None:
        """Waits for the end of the step that was added last, without writing its line."""
        if self._pending is None or "seconds" in self._pending.times:
            return
        jax.block_until_ready(self._pending.values)
        now = time.perf_counter()
        self._pending.times["seconds"] = now - self._began
        self._began, self.total_seconds = now, self.total_seconds + now - self._began

    def read(self, more: Callable[[], dict[str, float]] | None = None) -> None:
        """Waits for the metrics of the step that was added last, and writes its line; nothing if that was done.

        `more` computes further metrics of the step, once those it has are known to be finite.

        Raises:
          TrainingDiverged: a metric is not finite.
        """
        if self._pending is None:
            return
        self.wait()
        (step, names, values, learning_rate, batch, times, last_process), self._pending = self._pending, None
        metrics = dict(zip(names, map(float, jax.device_get(values)), strict=True))
        self._require_finite(metrics, step)
        mfu = self._throughput.metrics(batch, metrics.get("rollout_tokens", 0), **times)
        metrics |= more() if more else {}
        line = {"step": step, **metrics, "learning_rate": learning_rate, **times, **last_process, **mfu}
        self._log.append(line)
        self._on_line(line)

    def _require_finite(self, metrics: dict[str, float], step: int) -> None:
        bad = ", ".join(f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value))
        if bad:
            raise TrainingDiverged(
                f"{self._folder}: step {step} is not finite ({bad}); lower train.learning_rate or set "
                "train.max_gradient_norm, and start again in a new run_dir"
            )


@jax.jit
def _stacked(metrics: dict[str, jax.Array]) -> jax.Array:
    return jnp.stack(list(metrics.values()))
