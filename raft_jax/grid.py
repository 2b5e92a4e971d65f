"""The grid of a comparison: every combination of some settings' values, each with a run folder of its own."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from raft_jax import bucket
from raft_jax.config import Config
from raft_jax.config_file import load_config, to_dict
from raft_jax.errors import InputError
from raft_jax.files import is_there, parse_record, read_bytes
from raft_jax.settings_text import flat

RATE, SEED = "train.learning_rate", "train.seed"
NOT_VARIED = ("run_dir", "methods", "seed", SEED)  # and compare.*
FOLDER = "compare"  # in a run folder


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Attributes:
      name: its folder below RUN_DIR/compare, such as "learning_rate=1e-05,seed=0".
      values: its value of each setting that the grid varies, by dotted key.
      config: of its run.
    """

    name: str
    values: dict[str, Any]
    config: Config


@dataclass(frozen=True)
class GridRecord:
    """RUN_DIR/compare/cells.json: the setting that is varied beside the seed, and the values of each cell by name."""

    over: str
    cells: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Grid:
    """The runs of a comparison.

    Attributes:
      config: of what all cells share, in the run folder itself: refined rows and the base model's scores.
      over: the setting that is varied beside the seed.
      cells: in the order in which they run: all values of the first seed, then of the next.
    """

    config: Config
    over: str
    cells: tuple[Cell, ...]

    @property
    def path(self) -> Path:
        return bucket.local_path(self.config.run_dir) / FOLDER


def make_grid(path: str | Path, words: Sequence[str] = (), over: str | None = None) -> Grid:
    """The grid of a config.

    Args:
      path, words: as for `load_config`.
      over: "KEY=VALUE,VALUE,..."; None: train.learning_rate with the values of compare.learning_rates.

    Raises:
      InputError: as `load_config` does, also for each value; a key that cannot be varied, or fewer than two values.
    """
    config = load_config(path, list(words))
    seeds = config.compare.seeds or [config.seed if config.train.seed is None else config.train.seed]
    if over is None:
        key, texts = RATE, [repr(rate) for rate in config.compare.learning_rates or [config.train.learning_rate]]
    else:
        key, texts = _parsed(over)
    cells = []
    for seed, text in product(seeds, texts):
        varied = load_config(path, [*words, f"{key}={text}", f"{SEED}={seed}"])
        values = {key: flat(to_dict(varied))[key], SEED: seed}
        name = ",".join(f"{name.rpartition('.')[2]}={_in_a_name(value)}" for name, value in values.items())
        folder = f"{config.run_dir.rstrip('/')}/{FOLDER}/{name}"
        cells.append(Cell(name, values, dataclasses.replace(varied, run_dir=folder)))
    if len({cell.name for cell in cells}) < len(cells):
        raise InputError(f"{key}: {', '.join(texts)}; allowed: different values")
    return Grid(config, key, tuple(cells))


def _parsed(over: str) -> tuple[str, list[str]]:
    """Key and values of "KEY=VALUE,VALUE"; values in brackets keep their commas."""
    key, equals, values = over.partition("=")
    texts = [text.strip() for text in re.findall(r"(?:\[[^\]]*\]|[^,\[\]])+", values)]
    if not equals or len(texts) < 2 or not all(texts):
        raise InputError(f"--over {over}: expected KEY=VALUE,VALUE, such as train.temperature=1,1.5,2")
    if key in NOT_VARIED or key.startswith("compare."):
        raise InputError(f"--over {key}: cannot be varied; seeds are in compare.seeds, methods in methods")
    return key, texts


def _in_a_name(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else "null" if value is None else str(value)
    return re.sub(r"[^\w.+-]+", "_", text)[:80]


def read_record(folder: Path) -> GridRecord | None:
    """The record of a comparison below a run folder; None if there is none."""
    path = folder / FOLDER / "cells.json"
    if not is_there(path):
        return None
    try:
        return parse_record(GridRecord, read_bytes(path))
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error}); remove it, and raft-jax compare writes it again") from error


def add_to_record(grid: Grid) -> None:
    """Records the cells of a grid beside those that were recorded before.

    Raises:
      InputError: the folder has a comparison over another setting.
    """
    from raft_jax.run_folder import write_atomically

    known = read_record(grid.path.parent) or GridRecord(grid.over, {})
    if known.over != grid.over:
        raise InputError(
            f"{grid.path}: compares values of {known.over}; for {grid.over}, set run_dir to another folder"
        )
    cells = known.cells | {cell.name: cell.values for cell in grid.cells}
    grid.path.mkdir(parents=True, exist_ok=True)
    record = dataclasses.asdict(GridRecord(grid.over, cells))
    write_atomically(grid.path / "cells.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
