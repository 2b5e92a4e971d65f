"""The append-only record of a refinement: results in it are not computed again."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from raft_jax.errors import InputError
from raft_jax.files import require_regular, sync, unreadable
from raft_jax.line_writer import PAUSE

# "ask": a judge's reply that has no score in it, and after which it is asked again.
STAGES = ("rewrite", "similarity", "fuse", "score", "ask")
TYPES = {
    "text": str,
    "status": str,
    "num_tokens": int,
    "value": int | float | None,
    "reason": str,
    "model": str,
    "settings": str,
    "prompt": str,
    "prompt_tokens": int,
    "seconds": int | float,
    "finish": str,
    "retries": int,
    "try": int,
}


class Ledger:
    """A JSONL file of records `{"stage": …, "key": …, …}`, one for each result.

    Records are on disk when `append` returns. A process that is killed during an append leaves complete lines and at
    most one incomplete last line, which the next `open` removes. Only one process at a time may have a ledger open for
    writing.

    Example:
      >>> import tempfile
      >>> ledger = Ledger.open(Path(tempfile.mkdtemp()) / "ledger.jsonl")
      >>> ledger.append([{"stage": "rewrite", "key": "q1", "text": "An answer."}])
      >>> ("rewrite", "q1") in ledger, ledger.get("rewrite", "q1")["text"], ledger.get("rewrite", "q2")
      (True, 'An answer.', None)
    """

    def __init__(self, path: Path, records: dict[tuple[str, str], dict], writes: bool = True):
        self._path, self._writes = path, writes
        self._records = records
        self._failures: dict[tuple[str, str], str] = {}
        self._used: dict[tuple[str, str], None] = {}  # a set that keeps its order
        # Called when records have been added, but not while less than PAUSE times as long as its last call has passed:
        # on a mounted bucket, each file that it writes is a second or more.
        self.on_append: Callable[[], None] = lambda: None
        self._quiet_until = 0.0

    @classmethod
    def open(cls, path: str | Path, writes: bool = True) -> Ledger:
        """Reads a ledger, or creates an empty one; creates the folder if necessary.

        With `writes` false, as in all but the first of several processes that do the same work, records are kept in
        memory and the file is not changed.

        Raises:
          InputError: a line other than an incomplete last one is damaged or contradicts an earlier one, or the file
            cannot be read.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            data = require_regular(path).read_bytes() if path.exists() else b""
        except OSError as error:
            raise unreadable(path, error) from error
        lines = data.split(b"\n")
        torn = len(lines.pop())
        if not torn and lines and not _is_json(lines[-1]):
            torn = len(lines.pop()) + 1
        records: dict[tuple[str, str], dict] = {}
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            if not _is_json(line):
                raise InputError(
                    f"{where}: the ledger is damaged here; restore a copy, or cut it off "
                    "before this line: what followed is then computed again"
                )
            record = json.loads(line)
            name = _name(record, where)
            if records.setdefault(name, record) != record:
                raise InputError(
                    f"{where}: a second record for {name[0]} {name[1]!r} contradicts the first; "
                    "remove one of the two lines"
                )
        if not writes:
            return cls(path, records, writes)
        # "ab" creates the file if there is none.
        with path.open("ab") as file:
            file.truncate(len(data) - torn)
            os.fsync(file.fileno())
        sync(path.parent)
        return cls(path, records)

    def append(self, records: list[dict]) -> None:
        """Adds records, which are on disk when it returns; skips records that are already there.

        Raises:
          ValueError: a record is malformed, or differs from one with the same stage and key; then none is added.
        """
        added: dict[tuple[str, str], dict] = {}
        lines = []
        for entry in records:
            line = json.dumps(entry, ensure_ascii=False, allow_nan=False)
            record = json.loads(line)
            name = _name(record, f"{self._path}: appending")
            known = self._records.get(name) or added.get(name)
            if known is None:
                added[name] = record
                lines.append(line + "\n")
            elif known != record:
                raise ValueError(f"{self._path}: {name[0]} {name[1]!r} is recorded with other content")
        if lines and self._writes:
            self._write(lines)
        self._records.update(added)
        began = time.monotonic()
        if lines and began >= self._quiet_until:
            self.on_append()
            ended = time.monotonic()
            self._quiet_until = ended + PAUSE * (ended - began)

    def _write(self, lines: list[str]) -> None:
        data = "".join(lines).encode()
        # Unbuffered: after an error, closing a buffered file would try to write the rest of the buffer again.
        with self._path.open("ab", buffering=0) as file:
            start = file.tell()
            try:
                written = 0
                while written < len(data):
                    written += file.write(data[written:])
                os.fsync(file.fileno())
            except BaseException:
                # A partial line, as a full disk leaves it, would be damage inside the file after the next append.
                file.truncate(start)
                raise

    def get(self, stage: str, key: str) -> dict | None:
        """The record of a stage and key, or None. It must not be modified."""
        return self._records.get((stage, key))

    def __getitem__(self, name: tuple[str, str]) -> dict:
        """The record of a stage and key, which must exist; it counts as used."""
        self._used[name] = None
        return self._records[name]

    def used(self) -> list[dict]:
        """The records that were read with `[]`: those that the results of this process are made of."""
        return [self._records[name] for name in self._used]

    def fail(self, stage: str, key: str, why: str) -> None:
        """Notes that there is no result. This is not written to the file, so that the next process tries again."""
        self._failures[stage, key] = why

    def failure(self, stage: str, key: str) -> str:
        """Why there is no result; "" if that was not noted."""
        return self._failures.get((stage, key), "")

    @property
    def num_failures(self) -> int:
        return len(self._failures)

    def records(self) -> list[dict]:
        """All records in the order in which they were added. They must not be modified."""
        return list(self._records.values())

    def __contains__(self, name: tuple[str, str]) -> bool:
        return name in self._records


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _name(record: object, where: str) -> tuple[str, str]:
    if isinstance(record, dict) and record.get("stage") in STAGES and isinstance(record.get("key"), str):
        if wrong := [key for key, type in TYPES.items() if key in record and not isinstance(record[key], type)]:
            raise InputError(f"{where}: {wrong[0]} is {record[wrong[0]]!r:.40}; remove the line: it is made again")
        return record["stage"], record["key"]
    raise InputError(f"{where}: a record needs a stage ({', '.join(STAGES)}) and a key that is text")
