"""Checkpoints: Orbax saves the arrays, manifests next to them have content hashes, the newest intact step is restored.

A save goes on beside the training: `Checkpoints.save` returns once the arrays are copied to the host's memory. Each
process then hashes the files that it wrote, and writes its manifest last, so a step without all of its manifests was
interrupted. Orbax checks that a step was written completely, but not its content: it restores a flipped byte without an
error. A step that is damaged or incomplete is renamed, never removed. A step that cannot be read is an error and is not
touched.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from raft_jax.errors import InputError, require_train

if TYPE_CHECKING:
    from raft_jax.bucket import AnyPath

require_train("orbax")

import orbax.checkpoint as ocp

from raft_jax.bucket import checkpoint_folder, files_in, is_remote, os_errors, remove_tree, rename, write_whole
from raft_jax.files import parse_json, sha256_of, unreadable
from raft_jax.sharding import any_process, from_first_process, platform

Shape = tuple[int, ...]


class Checkpoints:
    """The checkpoints of one training run.

    Args:
      folder: of the steps and their manifests; created if necessary. In the local copy of a bucket's folder, they lie
        in the bucket.
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
        self.folder, self._unpadded = checkpoint_folder(folder), unpadded
        if not is_remote(self.folder):  # a bucket has no folders
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                os.listdir(self.folder)
            except OSError as error:
                raise unreadable(self.folder, error) from error
        self.keep = keep
        # Orbax would delete an old step once the arrays of the new one are saved, but before its manifest is.
        options = ocp.CheckpointManagerOptions(max_to_keep=None, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        self._finishing: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._last = time.monotonic()

    def save(self, step: int, state: Any) -> None:
        """Begins to save a step, and returns once the state may be changed or donated. A save before it ends first.

        Raises:
          ValueError: this step or a newer one exists; Orbax would skip the save without an error.
        """
        self.wait()
        self._last, newest = time.monotonic(), self._manager.latest_step()
        if newest is not None and step <= newest:
            raise ValueError(
                f"{self.folder}: step {step} is not newer than step {newest}, which is saved; go on from that one, "
                "or use another folder"
            )
        arrays = self._arrays(state)
        if platform() == "cpu":  # where the host's memory is the device's: a step that donates the state would wait
            state = jax.tree.map(jnp.copy, state)
        self._manager.save(step, args=ocp.args.StandardSave(state))
        self._finishing = threading.Thread(target=self._finish, args=(step, arrays))
        self._finishing.start()

    def wait(self) -> None:
        """Waits until the last save is on disk, with its manifests; the oldest steps are deleted only then.

        All processes must call it. Raises what the save raised.
        """
        if self._finishing is None:
            return
        self._finishing.join()
        self._finishing, failure, self._failure = None, self._failure, None
        if any_process(failure is not None):
            raise failure or OSError(f"{self.folder}: another process could not save its part")
        for old in sorted(self._manager.all_steps())[: -self.keep]:
            if jax.process_index() == 0:
                for path in _manifests(self.folder, old):
                    path.unlink()
            self._manager.delete(old)

    def _finish(self, step: int, arrays: dict[str, str]) -> None:
        """Waits until this process's files of a step are written, and writes its manifest."""
        try:
            with os_errors(self.folder):
                self._write_manifest(step, arrays)
        except BaseException as error:  # raised by `wait`, in the thread that saves
            self._failure = error

    def _write_manifest(self, step: int, arrays: dict[str, str]) -> None:
        """Of the files of a step that this process wrote, once they are all written."""
        self._manager.wait_until_finished()
        folder, process = self.folder / str(step), jax.process_index()
        files = [name for name in files_in(folder) if _writer_of(name) == process]
        manifest: dict[str, Any] = {"files": {name: sha256_of(folder / name) for name in files}}
        if process == 0:
            manifest |= {"arrays": arrays, "processes": jax.process_count()}
        write_whole(self._manifest(step, process), json.dumps(manifest, indent=1))

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """Returns the number and the state of the newest step with intact content; None if there is none.

        Args:
          like: a pytree of arrays with the expected shapes, dtypes and shardings.

        Raises:
          InputError: the step holds other arrays, or arrays of other shapes or dtypes (names the first of them); or a
            file of a step cannot be read, so that it is unknown whether it is intact.
        """
        self.wait()
        newest = self._newest_whole()
        self._manager.reload()
        if newest is None:
            return None
        self._require_same(newest, json.loads(self._manifest(newest).read_text())["arrays"], like)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        # Not strict: Orbax adds or drops padding. Any other difference in shape was refused.
        return newest, self._manager.restore(newest, args=ocp.args.StandardRestore(abstract, strict=False))

    @property
    def seconds_since(self) -> float:
        """Seconds since the last save began, or since this object was made."""
        return time.monotonic() - self._last

    @property
    def newest(self) -> int | None:
        """The newest step in the folder; None if there is none."""
        return self._manager.latest_step()

    def close(self) -> None:
        """Waits for the last save, see `wait`, and ends Orbax's threads."""
        self.wait()
        self._manager.close()

    def _manifest(self, step: int, process: int = 0) -> AnyPath:
        return self.folder / f"{step}.sha256{f'.{process}' if process else ''}.json"

    def _newest_whole(self) -> int | None:
        """The newest step whose files match its manifests; newer steps are renamed. All processes must call it."""
        steps = sorted(self._manager.all_steps(), reverse=True)
        for place in itertools.count():
            # The first process says what there is: a shared folder may look different to another for a while.
            step = from_first_process(steps[place] if place < len(steps) else None)
            if step is None or self._is_whole(step):
                return step
            if jax.process_index() == 0:
                moved = self._move_aside(step)
                older = "falling back to the step before" if step != steps[-1] else "training begins at step 0"
                print(
                    f"{self.folder / str(step)}: damaged or unfinished; {older} (it is moved to {moved})",
                    file=sys.stderr,
                )

    def _is_whole(self, step: int) -> bool:
        """Whether a step's files match its manifests, of which each process reads a part. All processes must call it.

        Raises:
          InputError: a file exists but cannot be read, in any process.
        """
        failure, whole = None, False
        try:
            with os_errors(self.folder):
                whole = self._part_is_whole(step)
        except OSError as error:
            failure = error
        if any_process(failure is not None):
            path = Path(failure.filename or self.folder) if failure else self.folder
            raise InputError(
                f"{unreadable(path, failure or OSError('by another process'))}; nothing was removed: make it "
                "readable, and the same command goes on from that step"
            ) from failure
        return not any_process(not whole)

    def _part_is_whole(self, step: int) -> bool:
        folder = self.folder / str(step)
        try:
            first = parse_json(self._manifest(step).read_bytes())
            others = range(1, first.get("processes", 1))
            manifests = [first, *(parse_json(self._manifest(step, process).read_bytes()) for process in others)]
            hashes = {name: digest for manifest in manifests for name, digest in manifest["files"].items()}
            names = files_in(folder)
            part = names[jax.process_index() :: jax.process_count()]
            return (
                isinstance(first["arrays"], dict)
                and sorted(hashes) == names
                and all(sha256_of(folder / name) == hashes[name] for name in part)
            )
        except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):
            return False

    def _move_aside(self, step: int) -> AnyPath:
        """Renames a step and its manifest to names that Orbax does not take for steps; returns the new path."""
        names = (f"damaged-{step}{suffix}" for suffix in ("", *(f"-{number}" for number in range(2, 1000))))
        place = next(place for name in names if not (place := self.folder / name).exists())
        rename(self.folder / str(step), place)
        for path in _manifests(self.folder, step):
            rename(path, place.with_name(path.name.replace(str(step), place.name, 1)))
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


def _manifests(folder: AnyPath, step: int) -> list[AnyPath]:
    """The manifests of a step, one of each process that saved it."""
    return sorted(folder.glob(f"{step}.sha256*.json"))


def _writer_of(name: str) -> int:
    """The process that wrote a file of a step, from its path: Orbax gives each process a folder for its arrays."""
    match = re.search(r"(?:^|/)ocdbt\.process_(\d+)/", name)
    return int(match[1]) if match else 0


def has_steps(folder: Path) -> bool:
    """Whether there is a folder of checkpoints."""
    return checkpoint_folder(folder).exists()


def remove_steps(folder: Path) -> None:
    """Removes all steps of a training run that will not be resumed; renamed damaged steps are kept."""
    place = checkpoint_folder(folder)
    for path in list(place.iterdir()) if place.is_dir() else ():
        if path.name.isdigit():
            for manifest in _manifests(place, int(path.name)):
                manifest.unlink()
            remove_tree(path)
    if place.is_dir() and not any(place.iterdir()):
        place.rmdir()
