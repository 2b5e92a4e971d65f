"""The session's JSON: one file, in which each part has a section that is written whole after every measurement."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


class Skipped(Exception):
    """What a part needs is not on this machine; the message says what."""


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8")) if path.exists() else {"parts": {}}


def write(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: a process may be ended at any moment."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(_finite(content), indent=1) + "\n", "utf-8")
    os.replace(partial, path)


def _finite(value):
    """NaN and infinities by name, as JSON has none of them."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


class Record:
    """One part's section. Parts run one at a time, so nobody else writes the file meanwhile."""

    def __init__(self, path: Path, part: str, kept: Path):
        self.path, self.part = path, part
        self.kept = kept  # a folder for what is too large for the JSON's

    def set(self, **values: Any) -> None:
        """Values of the section itself: device, status, predicted."""
        content = read(self.path)
        content["parts"].setdefault(self.part, {}).update(values)
        write(self.path, content)

    def add(self, name: str, **values: Any) -> None:
        """One named measurement, kept even if the part is cut off after it."""
        content = read(self.path)
        content["parts"].setdefault(self.part, {}).setdefault("results", {})[name] = values
        write(self.path, content)
        print(name, json.dumps(_finite(values)), flush=True)

    def of(self, part: str) -> dict[str, Any]:
        """The results of a part that has run before."""
        return read(self.path)["parts"].get(part, {}).get("results", {})
