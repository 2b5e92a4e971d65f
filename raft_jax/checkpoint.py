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
from raft_jax.sharding import from_first_process


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
        self.keep = keep
        # Orbax would drop an old step as soon as the new one's arrays are there, before its manifest is.
        options = ocp.CheckpointManagerOptions(max_to_keep=None, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state: Any) -> None:
        """Writes a step; when this returns it is whole on disk, with its manifest. Only then the oldest one goes.

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
        for old in sorted(self._manager.all_steps())[: -self.keep]:
            if jax.process_index() == 0:
                self._manifest(old).unlink(missing_ok=True)
            self._manager.delete(old)

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """The newest step whose content is what was written, and its number; None where there is none.

        Args:
          like: a pytree of arrays with the shapes, dtypes and shardings wanted.

        Raises:
          InputError: the step holds other arrays, or arrays of other shapes or dtypes; names the first of them.
        """
        newest = from_first_process(self._newest_whole() if jax.process_index() == 0 else None)
        self._manager.reload()
        if newest is None:
            return None
        self._require_same(newest, json.loads(self._manifest(newest).read_text())["arrays"], _arrays(like))
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return newest, self._manager.restore(newest, args=ocp.args.StandardRestore(abstract))

    def close(self) -> None:
        self._manager.close()

    def _manifest(self, step: int) -> Path:
        return self.folder / f"{step}.sha256.json"

    def _newest_whole(self) -> int | None:
        """The newest step whose files are those that were written; newer ones are removed."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            if self._is_whole(step):
                return step
            print(f"{self.folder / str(step)}: damaged or unfinished; falling back to the step before, if there is one",
                  file=sys.stderr)
            shutil.rmtree(self.folder / str(step), ignore_errors=True)
            self._manifest(step).unlink(missing_ok=True)
        return None

    def _is_whole(self, step: int) -> bool:
        try:
            manifest = json.loads(self._manifest(step).read_text())
            return isinstance(manifest["arrays"], dict) and manifest["files"] == _hashes(self.folder / str(step))
        except (OSError, ValueError, LookupError, TypeError):
            return False

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
