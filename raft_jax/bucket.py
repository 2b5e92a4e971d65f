"""Run folders in a bucket, `run_dir: gs://BUCKET/FOLDER`.

A command works on a local copy of the folder, in the user's cache. `kept` brings the bucket's files there, sends what
changes every few seconds, oldest first, and sends the rest at the end. Checkpoints have no copy: Orbax and TensorStore
write them to the bucket from every process. The bucket is right where the two differ when a command begins, so it can
go on on another machine.

Of several machines each has a copy. The first process alone writes; `share` and `receive` let the others see
what it wrote.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import hashlib
import os
import shutil
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from raft_jax import interrupt
from raft_jax.errors import InputError, MissingExtra
from raft_jax.files import files_below, is_there, user_cache
from raft_jax.progress import progress

if TYPE_CHECKING:
    from etils import epath

    AnyPath = Path | epath.Path  # a local one, or one in a bucket

SCHEME = "gs://"
EVERY = 5.0  # seconds between two looks at what has changed
WORTH_A_BAR = 64 << 20  # bytes from which on sending shows its progress
DIRECT = ("checkpoints", "best")  # folders that are written to the bucket itself
LOCK, OWNER = "run.lock", ".owner"  # of a machine, so neither is sent


@dataclass(frozen=True)
class _Seen:
    """An object and its local copy when they were last alike."""

    digest: str | None  # the object's; None for one that this process sent
    time: int  # the copy's, in nanoseconds
    size: int


_seen: dict[Path, _Seen] = {}
_sending = threading.Lock()
_reads: set[Path] = set()  # copies that `receive` brings up to date in this process: the first process has another one


def local_path(run_dir: str | Path) -> Path:
    """The folder that a command works on: the copy of a bucket's folder, any other folder itself.

    Raises:
      InputError: the bucket's folder has no name.
    """
    text = str(run_dir)
    if not text.startswith(SCHEME):
        return Path(run_dir).expanduser()
    names = text.removeprefix(SCHEME).rstrip("/").split("/")
    if len(names) < 2 or any(name in ("", ".", "..") for name in names):
        raise InputError(f"run_dir={text}: expected gs://BUCKET/FOLDER")
    return _copies().joinpath(*names)


def url_of(path: Path) -> str | None:
    """The bucket's folder or file whose copy a path is; None for any other path."""
    try:
        return SCHEME + path.relative_to(_copies()).as_posix()
    except ValueError:
        return None


def checkpoint_folder(path: Path) -> AnyPath:
    """Where the checkpoints of a local path lie: in the bucket if the path is in a copy."""
    url = url_of(path)
    if url is None:
        return path.absolute()
    from etils import epath

    _file_system(url)  # before epath makes its own, without the settings
    return epath.Path(url)


def is_remote(path: AnyPath | str) -> bool:
    """Whether a path is in a bucket."""
    return str(path).startswith(SCHEME)


def files_in(folder: AnyPath) -> list[str]:
    """`files_below` a folder, which may be in a bucket."""
    if not is_remote(folder):
        return files_below(Path(folder))
    return sorted(_objects(str(folder)))


@contextmanager
def os_errors(path: AnyPath | str) -> Iterator[None]:
    """Raises OSError for what gcsfs and Google's libraries raise where a path in a bucket cannot be read or written."""
    if not is_remote(path):
        yield
        return
    _file_system(str(path))
    from aiohttp import ClientError
    from gcsfs.retry import ChecksumError, HttpError
    from google.auth.exceptions import GoogleAuthError

    try:
        yield
    except (OSError, HttpError, ChecksumError, GoogleAuthError, ClientError) as error:
        if isinstance(error, FileNotFoundError) or getattr(error, "errno", None) is not None:
            raise
        raise OSError(errno.EIO, " ".join(str(error).split())[:300] or type(error).__name__, str(path)) from error


def rename(path: AnyPath, target: AnyPath) -> None:
    """Renames a file or a folder. In a bucket the objects are copied, without coming to this machine."""
    if is_remote(path):
        with _errors(str(path)):
            _file_system(str(path)).copy(str(path), str(target), recursive=True)
            _file_system(str(path)).rm(str(path), recursive=True)
    else:
        os.replace(path, target)


def remove_tree(path: AnyPath) -> None:
    """Removes a folder with all that is in it."""
    if is_remote(path):
        with _errors(str(path)):
            _file_system(str(path)).rm(str(path), recursive=True)
    else:
        shutil.rmtree(path)


def write_whole(path: AnyPath, text: str) -> None:
    """Writes a file that is there only once all of it is; objects always are so."""
    partial = path if is_remote(path) else path.with_name(path.name + ".partial")
    partial.write_text(text)
    if partial != path:
        os.replace(partial, path)


@contextmanager
def kept(run_dir: str | Path, *, writes: bool = True, several: bool = True) -> Iterator[None]:
    """Brings a bucket's folder to this machine, and sends what changes until the context ends.

    For any other folder it does nothing. If another process of this machine works on the copy, it is used as it is.

    Args:
      run_dir: the run folder, as in the config.
      writes: whether anything is sent.
      several: whether JAX may have several processes, of which the first sends.

    Raises:
      InputError: the bucket cannot be read or written.
    """
    folder = local_path(run_dir)
    url = url_of(folder)
    if url is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    sends = writes and (not several or _is_first())
    with folder.with_name(folder.name + ".lock").open("w") as lock:
        if sends:
            _require_writable(url)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _bring(url, folder, prune=True)
            fcntl.flock(lock, fcntl.LOCK_SH)
        except BlockingIOError:
            fcntl.flock(lock, fcntl.LOCK_SH)  # waits for a process that is bringing the files
            for path, seen in _changed(folder):  # another process sends these
                _seen[path] = seen
        if several:
            _tell_apart(folder)
        with _sent(url, folder) if sends else _read(folder):
            yield


def send(folder: Path, title: str | None = None) -> None:
    """Sends what has changed in a copy, oldest first, and removes what is gone; nothing for other folders.

    With a title, shows the progress of large files.
    """
    url = url_of(folder)
    if url is None:
        return
    with _sending, _errors(url):
        changed = sorted(_changed(folder), key=lambda item: item[1].time)
        total = sum(seen.size for _, seen in changed)
        shown = progress(title, total >> 20, "MB") if title and total >= WORTH_A_BAR else nullcontext()
        # The thread sends without a title: what it does must not defer a signal to the main thread.
        with interrupt.deferred() if title else nullcontext(), shown as bar:
            for path, seen in changed:
                _send_file(path, seen)
                if bar is not None:
                    bar.advance(seen.size >> 20)
        gone = [path for path in _seen if path.is_relative_to(folder) and not is_there(path)]
        for path in gone:
            with suppress(FileNotFoundError):
                _file_system(url).rm_file(url_of(path))
            del _seen[path]


def share(folder: Path) -> None:
    """Before several processes wait for each other: the first sends what it wrote."""
    if url_of(folder) is not None and _is_first_of_several():
        send(folder)


def receive(folder: Path) -> None:
    """After processes waited for each other: the machines without the first process bring what it sent."""
    url = url_of(folder)
    if url is not None and any(folder.is_relative_to(copy) for copy in _reads):
        _bring(url, folder, prune=False)


def _copies() -> Path:
    return user_cache() / "raft_jax/buckets"


def _is_first() -> bool:
    from raft_jax.sharding import is_writer

    return is_writer()


def _is_first_of_several() -> bool:
    import jax

    return jax.process_count() > 1 and jax.process_index() == 0


def _file_system(url: str):
    """The bucket's file system. Its listings are not cached: other processes and TensorStore change them."""
    try:
        import fsspec
        import gcsfs  # noqa: F401
    except ImportError as error:
        raise MissingExtra(f"run_dir={url} needs gcsfs: pip install 'raft-jax[gcs]'") from error
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return fsspec.filesystem("gcs", finalize_on_close=True)


@contextmanager
def _errors(url: str) -> Iterator[None]:
    """Turns what cannot be read or written into an InputError of one line."""
    try:
        with os_errors(url):
            yield
    except OSError as error:
        raise InputError(
            f"{url}: cannot be read or written ({error.strerror or error}); is there such a bucket, and may this "
            "account use it? `gcloud auth application-default login` logs in; or set run_dir to another folder"
        ) from error


def _require_writable(url: str) -> None:
    """Raises InputError unless an object can be written and removed."""
    name = f"{url}/.write-test-{uuid.uuid4().hex}"
    with _errors(url):
        _file_system(url).pipe_file(name, b"")
        _file_system(url).rm_file(name)


def _objects(url: str) -> dict[str, str]:
    """The digest of every object below a folder, by its path in the folder."""
    bare = url.removeprefix(SCHEME)
    listing = _file_system(url).find(bare, detail=True)
    objects = {}
    for name, about in listing.items():
        path = PurePosixPath(name.removeprefix(bare).lstrip("/"))
        if path.parts and ".." not in path.parts:
            objects[str(path)] = about.get("md5Hash") or str(about.get("generation"))
    return objects


def _is_copied(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return not (
        parts[-1] in (LOCK, OWNER)
        or any(part.endswith((".partial", ".lock")) for part in parts)
        or any(part in DIRECT for part in parts[:-1])
    )


def _bring(url: str, folder: Path, *, prune: bool) -> None:
    """Makes the copy like the bucket's folder. With `prune`, also removes what the bucket lacks."""
    with _errors(url):
        objects = {name: digest for name, digest in _objects(url).items() if _is_copied(name)}
        for name, digest in objects.items():
            interrupt.check()
            path = folder / name
            seen = _seen.get(path)
            if seen is not None and seen.digest == digest and _state(path) == (seen.time, seen.size):
                continue
            if not path.is_file() or _digest(path) != digest:
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
                _file_system(url).get_file(f"{url}/{name}", str(partial))
                os.replace(partial, path)
            _seen[path] = _Seen(digest, *_state(path))
    for name in files_below(folder):
        path = folder / name
        if name not in objects and _is_copied(name) and (prune or path in _seen):
            path.unlink(missing_ok=True)
            _seen.pop(path, None)
            for parent in path.parents:
                if parent == folder or any(parent.iterdir()):
                    break
                parent.rmdir()


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode()


def _changed(folder: Path) -> Iterator[tuple[Path, _Seen]]:
    """The files of a copy that are not as they were last sent or brought."""
    paths = [Path(place, name) for place, _, names in os.walk(folder) for name in names]
    for path in paths:
        if not _is_copied(str(path.relative_to(folder))):
            continue
        try:
            time, size = _state(path)
        except FileNotFoundError:  # renamed meanwhile, as folders may be while they are walked
            continue
        seen = _seen.get(path)
        if seen is None or (seen.time, seen.size) != (time, size):
            yield path, _Seen(None, time, size)


def _send_file(path: Path, seen: _Seen) -> None:
    try:
        _file_system(SCHEME).put_file(str(path), url_of(path))
    except FileNotFoundError:
        if path.exists():
            raise
        return  # renamed meanwhile
    _seen[path] = seen


@contextmanager
def _sent(url: str, folder: Path) -> Iterator[None]:
    """Sends what changes every few seconds from a thread, and the rest at the end."""
    ended = threading.Event()

    def run() -> None:
        told = False
        while not ended.wait(EVERY):
            try:
                send(folder)
                told = False
            except (InputError, OSError) as error:
                if not told:
                    print(f"{error}; it is tried again", file=sys.stderr, flush=True)
                told = True

    thread = threading.Thread(target=run, name=f"sender to {url}", daemon=True)
    thread.start()
    failed = True
    try:
        yield
        failed = False
    finally:
        ended.set()
        thread.join()
        try:
            send(folder, f"send to {url}")
        except InputError as error:
            text = f"{error}; what was not sent is in {folder}, until the next command"
            if not failed:
                raise InputError(text) from error
            print(text, file=sys.stderr, flush=True)  # the command's own error is raised


@contextmanager
def _read(folder: Path) -> Iterator[None]:
    yield
    _reads.discard(folder)


def _tell_apart(folder: Path) -> None:
    """Finds out whether the first process works on this copy, too; waits until all processes have theirs."""
    from raft_jax.sharding import from_first_process, is_writer, wait_for_writer

    wait_for_writer("copies of the bucket")
    number = from_first_process(uuid.uuid4().int & 0x7FFFFFFF)
    if is_writer():
        (folder / OWNER).write_text(str(number))
    wait_for_writer("owner of a copy")
    owner = folder / OWNER
    if not is_writer() and (not owner.exists() or owner.read_text() != str(number)):
        _reads.add(folder)
