"""Checkpoints: Orbax for the arrays, a manifest of content hashes beside them, and the newest whole step wins.

Orbax checks that a step was written to its end, but not what it holds: a flipped byte is restored in silence.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from raft_jax.errors import InputError


class Checkpoints:
    """The checkpoints of one training run.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     checkpoints = Checkpoints(Path(folder), keep=1)
      ...     checkpoints.save(3, {"x": jnp.arange(2)})
      ...     step, state = checkpoints.restore({"x": jnp.zeros(2, int)})
      >>> step, state["x"].tolist()
      (3, [0, 1])
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state: Any) -> None:
        """Writes a step; when this returns it is whole on disk, with its manifest.

        Raises:
          ValueError: a step as new or newer is there, which Orbax would pass over in silence.
        """
        newest = self._manager.latest_step()
        if newest is not None and step <= newest:
            raise ValueError(
                f"{self.folder}: step {step} is not newer than step {newest}, which is saved; go on from that one, "
                "or use another folder"
            )
        self._manager.save(step, args=ocp.args.StandardSave(state))
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            manifest = json.dumps({"arrays": _arrays(state), "files": _hashes(self.folder / str(step))}, indent=1)
            path = self._manifest(step)
            partial = path.with_suffix(".partial")
            partial.write_text(manifest)
            os.replace(partial, path)
            for old in self.folder.glob("*.sha256.json"):
                if not (self.folder / old.name.partition(".")[0]).exists():
                    old.unlink()

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """The newest step whose content is what was written, and its number; None where there is none.

        Args:
          like: a pytree of arrays with the shapes, dtypes and shardings wanted.

        Raises:
          InputError: the step holds other arrays, or arrays of other shapes or dtypes; names the first of them.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            if (manifest := self._whole(step)) is not None:
                self._require_same(step, manifest["arrays"], _arrays(like))
                abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
                return step, self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
            print(f"{self.folder / str(step)}: damaged or unfinished; falling back to the step before", file=sys.stderr)
            if jax.process_index() == 0:
                shutil.rmtree(self.folder / str(step), ignore_errors=True)
                self._manifest(step).unlink(missing_ok=True)
            self._manager.reload()
        return None

    def close(self) -> None:
        self._manager.close()

    def _manifest(self, step: int) -> Path:
        return self.folder / f"{step}.sha256.json"

    def _whole(self, step: int) -> dict[str, Any] | None:
        """The manifest of a step whose files are those that were written, else None."""
        try:
            manifest = json.loads(self._manifest(step).read_text())
            return manifest if manifest["files"] == _hashes(self.folder / str(step)) else None
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def _require_same(self, step: int, saved: dict[str, str], wanted: dict[str, str]) -> None:
        for name in sorted(saved.keys() | wanted.keys()):
            if saved.get(name) != wanted.get(name):
                raise InputError(
                    f"{self.folder / str(step)}: {name} is {saved.get(name, 'absent')} there and "
                    f"{wanted.get(name, 'absent')} in this run; give the model and the settings that this run began "
                    "with, or set run_dir to a new folder"
                )


def _arrays(state: Any) -> dict[str, str]:
    """Dtype and shape of every array, by its path in the tree."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{array.dtype}{list(array.shape)}"
        for path, array in jax.tree_util.tree_leaves_with_path(state)
    }


def _hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
