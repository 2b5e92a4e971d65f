"""Checkpoints: Orbax saves the arrays, a manifest next to them has content hashes, the newest intact step is restored.

Orbax checks that a step was written completely, but not its content: it restores a flipped byte without an error. A
step that is damaged or incomplete is renamed, never removed. A step that cannot be read is an error and is not touched.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from raft_jax.errors import InputError, require_train

require_train("orbax")

import orbax.checkpoint as ocp

from raft_jax.files import hash_files, parse_json, unreadable
from raft_jax.sharding import any_process, from_first_process

Shape = tuple[int, ...]


class Checkpoints:
    """The checkpoints of one training run.

    Args:
      folder: of the steps and their manifests; created if necessary.
      keep: number of steps that are kept.
      unpadded: `(path of an array in the state, shape) -> shape`, without the rows that make an array divide over a
        mesh. They hold zeros, and their number may differ between save and restore.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     checkpoints = Checkpoints(Path(folder), keep=1)
      ...     checkpoints.save(3, {"x": jnp.arange(2)})
      ...     step, state = checkpoints.restore({"x": jnp.zeros(2, int)})
      >>> step, state["x"].tolist()
      (3, [0, 1])
    """

    def __init__(
        self, folder: Path, keep: int = 2, unpadded: Callable[[str, Shape], Shape] = lambda path, shape: shape
    ):
        self.folder, self._unpadded = folder.absolute(), unpadded
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            os.listdir(self.folder)
        except OSError as error:
            raise unreadable(self.folder, error) from error
        self.keep = keep
        # Orbax would delete an old step once the arrays of the new one are saved, but before its manifest is.
        options = ocp.CheckpointManagerOptions(max_to_keep=None, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state: Any) -> None:
        """Saves a step and its manifest; both are on disk when this returns. The oldest step is deleted only then.

        Raises:
          ValueError: this step or a newer one exists; Orbax would skip the save without an error.
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
            manifest = json.dumps(
                {"arrays": self._arrays(state), "files": hash_files(self.folder / str(step))}, indent=1
            )
            path = self._manifest(step)
            partial = path.with_suffix(".partial")
            partial.write_text(manifest)
            os.replace(partial, path)
        for old in sorted(self._manager.all_steps())[: -self.keep]:
            if jax.process_index() == 0:
                self._manifest(old).unlink(missing_ok=True)
            self._manager.delete(old)

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """Returns the number and the state of the newest step with intact content; None if there is none.

        Args:
          like: a pytree of arrays with the expected shapes, dtypes and shardings.

        Raises:
          InputError: the step holds other arrays, or arrays of other shapes or dtypes (names the first of them); or a
            file of a step cannot be read, so that it is unknown whether it is intact.
        """
        failure, newest = None, None
        if jax.process_index() == 0:
            try:
                newest = self._newest_whole()
            except OSError as error:
                failure = error
        if any_process(failure is not None):
            path = Path(failure.filename or self.folder) if failure else self.folder
            raise InputError(
                f"{unreadable(path, failure or OSError('by the first process'))}; nothing was removed: make it "
                "readable, and the same command goes on from that step"
            ) from failure
        newest = from_first_process(newest)
        self._manager.reload()
        if newest is None:
            return None
        self._require_same(newest, json.loads(self._manifest(newest).read_text())["arrays"], like)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        # Not strict: Orbax adds or drops padding. Any other difference in shape was refused.
        return newest, self._manager.restore(newest, args=ocp.args.StandardRestore(abstract, strict=False))

    @property
    def newest(self) -> int | None:
        """The newest step in the folder; None if there is none."""
        return self._manager.latest_step()

    def close(self) -> None:
        self._manager.close()

    def _manifest(self, step: int) -> Path:
        return self.folder / f"{step}.sha256.json"

    def _newest_whole(self) -> int | None:
        """The newest step whose files match its manifest; newer steps are renamed."""
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            if self._is_whole(step):
                return step
            place = self._move_aside(step)
            older = "falling back to the step before" if step != steps[-1] else "training begins at step 0"
            print(
                f"{self.folder / str(step)}: damaged or unfinished; {older} (it is moved to {place})", file=sys.stderr
            )
        return None

    def _is_whole(self, step: int) -> bool:
        """Whether a step's files match its manifest. Raises OSError if a file exists but cannot be read."""
        try:
            manifest = parse_json(self._manifest(step).read_bytes())
            return isinstance(manifest["arrays"], dict) and manifest["files"] == hash_files(self.folder / str(step))
        except (FileNotFoundError, ValueError, LookupError, TypeError):
            return False

    def _move_aside(self, step: int) -> Path:
        """Renames a step and its manifest to names that Orbax does not take for steps; returns the new path."""
        names = (f"damaged-{step}{suffix}" for suffix in ("", *(f"-{number}" for number in range(2, 1000))))
        place = next(place for name in names if not (place := self.folder / name).exists())
        os.replace(self.folder / str(step), place)
        if self._manifest(step).exists():
            os.replace(self._manifest(step), place.with_name(place.name + ".sha256.json"))
        return place

    def _require_same(self, step: int, saved: dict[str, str], like: Any) -> None:
        wanted, padded = self._arrays(like), _described(like, lambda path, shape: shape)
        for name in sorted(saved.keys() | wanted.keys()):
            # Earlier manifests have shapes with padding, which fit where the padding is the same.
            if saved.get(name) not in (wanted.get(name), padded.get(name)):
                raise InputError(
                    f"{self.folder / str(step)}: {name} is {saved.get(name, 'absent')} there and "
                    f"{wanted.get(name, 'absent')} in this run; give the model and the settings that this run began "
                    "with, or set run_dir to a new folder"
                )

    def _arrays(self, state: Any) -> dict[str, str]:
        """Dtype and shape, without padding, of every array, by its path in the pytree."""
        return _described(state, self._unpadded)


def _described(state: Any, shape_of: Callable[[str, Shape], Shape]) -> dict[str, str]:
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="/"): array
        for path, array in jax.tree_util.tree_leaves_with_path(state)
    }
    return {path: f"{array.dtype}{list(shape_of(path, array.shape))}" for path, array in arrays.items()}


def remove_steps(folder: Path) -> None:
    """Removes all steps of a training run that will not be resumed; renamed damaged steps are kept."""
    for path in folder.glob("*") if folder.is_dir() else ():
        if path.name.isdigit():
            path.with_name(f"{path.name}.sha256.json").unlink(missing_ok=True)
            shutil.rmtree(path)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
