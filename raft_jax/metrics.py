"""metrics.jsonl: one line per training step; the training curves of reports are drawn from it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from raft_jax.files import is_there, parse_json, read_bytes
from raft_jax.line_writer import LineWriter


class MetricsLog:
    """Appends to metrics.jsonl in the background (see LineWriter), in the first process only.

    As a context, it writes everything at the end, also when an exception or a signal ends the training.
    """

    def __init__(self, path: Path, keep: int):
        """Opens the file for appending, keeping only the lines of the first `keep` steps.

        Prints which lines are damaged or missing, and copies a damaged file to metrics.damaged.jsonl.
        """
        from raft_jax.sharding import is_writer

        self.path, self._writer = path, None
        if not is_writer():
            return
        lines, damaged = scan_metrics(path)
        if damaged:
            copy = path.with_name("metrics.damaged.jsonl")
            shutil.copyfile(path, copy)
            print(
                f"{path}:{damaged[0]}: {len(damaged)} damaged line(s), left out of the curves; the file as it was "
                f"is kept as {copy}",
                file=sys.stderr,
            )
        if missing := [step for step in range(1, keep + 1) if step not in lines]:
            print(
                f"{path}: nothing there about step {missing[0]} ({len(missing)} of {keep} steps lack their line); "
                "training goes on, and curves, time and token counts lack them",
                file=sys.stderr,
            )
        if keep == 0 and lines:
            print(
                f"{path.parent}: no checkpoint of the {len(lines)} steps that are logged; training begins at step 0",
                file=sys.stderr,
            )
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(lines[step]) + "\n" for step in sorted(lines) if step <= keep), "utf-8")
        partial.replace(path)
        self._writer = LineWriter(path)

    def append(self, record: dict[str, Any]) -> None:
        if self._writer:
            self._writer.append(json.dumps(record))

    def flush(self) -> None:
        """Returns once all lines are in the file. A checkpoint may be saved then: it needs the lines up to its step."""
        if self._writer:
            self._writer.flush()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_) -> None:
        if self._writer:
            self._writer.close()


def scan_metrics(path: Path) -> tuple[dict[int, dict[str, float]], list[int]]:
    """The lines of a metrics file by step, and the numbers of damaged lines.

    If two lines have the same step, the later one is used. An incomplete last line is not damage: its process was
    killed or is still running.
    """
    if not is_there(path):
        return {}, []
    lines, damaged = {}, []
    texts = read_bytes(path).split(b"\n")
    for number, text in enumerate(texts, start=1):
        try:
            line = parse_json(text)
            if not isinstance(line["step"], int) or not all(type(value) in (int, float) for value in line.values()):
                raise ValueError("expected numbers")
            lines[line["step"]] = line
        except (ValueError, LookupError, TypeError, AttributeError):
            if number < len(texts):
                damaged.append(number)
    return lines, damaged


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All intact lines of a metrics file, sorted by step."""
    lines, _ = scan_metrics(path)
    return [lines[step] for step in sorted(lines)]


def tokens_trained(metrics: Iterable[Mapping[str, float]]) -> int:
    """Number of tokens in the loss, over all steps."""
    return int(sum(line.get("sft_tokens", 0) + line.get("rollout_tokens", 0) for line in metrics))
