"""Reads small files. Any problem with a file is an InputError of one line that names the file."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from raft_jax.errors import InputError, require_train

Record = TypeVar("Record")

SUMS = "SHA256SUMS"
MAX_BYTES = 256 << 20  # largest file that is read as a whole


def require_regular(path: Path) -> Path:
    """Returns the path. Raises InputError if it is not a regular file; reading a pipe could block forever."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: expected a file, found {kind_of(mode)}")
    return path


def kind_of(mode: int) -> str:
    """Names the kind of a path that is not a regular file."""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def unreadable(path: Path, error: OSError) -> InputError:
    """The error for a file that the system cannot read; its content is unknown, not damaged."""
    name = errno.errorcode.get(error.errno, "") if error.errno else ""
    return InputError(f"{path}: cannot be read ({error.strerror or error}{name and f', {name}'})")


def read_bytes(path: Path, most: int | None = None) -> bytes:
    """The content of a regular file of at most `most` bytes (default MAX_BYTES).

    Raises:
      InputError: the file does not exist, is not a regular file, is larger than `most`, or cannot be read.
    """
    most = most or MAX_BYTES
    try:
        with require_regular(path).open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(content) > most:
        raise InputError(f"{path}: larger than {most >> 20} MiB; this is not the file that is expected here")
    return content


def read_text(path: Path, most: int | None = None) -> str:
    """The text of a regular file; raises InputError as `read_bytes` does, and if it is not UTF-8."""
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 ({error})") from error


def parse_json(text: str | bytes) -> Any:
    """Parses JSON; raises ValueError also if it is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


@cache
def _adapter(kind: type):
    require_train("pydantic")
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def parse_record(kind: type[Record], text: str | bytes) -> Record:
    """Parses a JSON object whose values have the annotated types into a dataclass; unknown fields are ignored.

    Raises:
      ValueError: the first problem, in one line.

    Example:
      >>> from dataclasses import make_dataclass
      >>> parse_record(make_dataclass("Point", [("x", float)]), '{"x": "1"}')
      Traceback (most recent call last):
        ...
      ValueError: x: Input should be a valid number
    """
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from error


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises InputError as `read_bytes` does, and if it is not JSON."""
    content = read_bytes(path)
    try:
        return parse_json(content)
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error


def read_object(path: Path, optional: bool = False) -> dict[str, Any]:
    """The content of a JSON file that holds an object; with `optional`, {} if the file does not exist.

    Raises:
      InputError: as `read_json`, and if it does not hold an object.
    """
    if optional and not is_there(path):
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def is_there(path: Path) -> bool:
    """Whether a path exists; raises InputError if the system cannot tell."""
    try:
        return path.exists()
    except OSError as error:
        raise unreadable(path, error) from error


def user_cache() -> Path:
    """The folder that a user's programs keep their caches in."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def files_below(folder: Path) -> list[str]:
    """The path of every file below a folder, relative to the folder, sorted.

    Raises:
      OSError: a folder cannot be read. Its content is then unknown, not damaged.
    """

    def fail(error: OSError):
        raise error

    places = (Path(place, name) for place, _, names in os.walk(folder, onerror=fail) for name in names)
    return sorted(str(path.relative_to(folder)) for path in places if path.is_file())


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(folder: Path) -> dict[str, str]:
    """`sha256_of` every one of `files_below` a folder."""
    return {name: sha256_of(folder / name) for name in files_below(folder)}


def sync(path: Path) -> None:
    """Waits until all writes to a file, or all renames in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_sums(folder: Path) -> None:
    """Writes SHA256SUMS, in the format of the program sha256sum, for every file below a folder except README.md."""
    sums = {name: digest for name, digest in hash_files(folder).items() if name not in (SUMS, "README.md")}
    (folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()), "utf-8")


def named_in_sums(folder: Path) -> list[Path]:
    """The files that SHA256SUMS names; an empty list if there is no SHA256SUMS."""
    lines = read_text(folder / SUMS).splitlines() if (folder / SUMS).exists() else []
    return [folder / line.partition("  ")[2] for line in lines]


def require_sums(folder: Path) -> None:
    """Raises InputError unless every file in SHA256SUMS exists and is unchanged; a folder without SHA256SUMS passes."""
    if not (folder / SUMS).exists():
        return
    text = read_text(folder / SUMS)
    try:
        hashes = hash_files(folder)
    except OSError as error:
        raise unreadable(Path(error.filename or folder), error) from error
    for line in text.splitlines():
        digest, _, name = line.partition("  ")
        if name not in hashes:
            raise InputError(f"{folder / name}: is gone")
        if hashes[name] != digest:
            raise InputError(f"{folder / name}: damaged, not the bytes that were written")
