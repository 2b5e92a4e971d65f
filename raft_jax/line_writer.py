"""Appends lines to a file in the background, so that a slow file system does not delay the work."""

from __future__ import annotations

import threading
import time
from pathlib import Path

# After each write, the thread pauses for this many times as long as the write took. A local file has each line within
# a millisecond; on a mounted bucket, where every write uploads the file again, lines are collected for some seconds.
PAUSE = 10.0


class LineWriter:
    """A thread that appends lines to a file, in order. `flush` waits until they are in it.

    An error of the thread is raised by the next `append`, `flush` or `close`.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     writer = LineWriter(Path(folder) / "a.txt")
      ...     writer.append("one")
      ...     writer.flush()
      ...     writer.append("two")
      ...     writer.close()
      ...     writer.path.read_text()
      'one\\ntwo\\n'
    """

    def __init__(self, path: Path):
        self.path = path
        self._lines: list[str] = []
        self._error: OSError | None = None
        self._writing = threading.Lock()  # held from taking lines until they are in the file, which keeps their order
        self._arrived, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"writer of {path}", daemon=True)
        self._thread.start()

    def append(self, line: str) -> None:
        """Hands a line, without its end, to the thread."""
        self._raise_error()
        self._lines.append(line)
        self._arrived.set()

    def flush(self) -> None:
        """Writes what is waiting, and returns once all lines are in the file."""
        with self._writing:
            self._raise_error()
            self._write()

    def close(self) -> None:
        """`flush`, and the end of the thread. May be called again."""
        try:
            self.flush()
        finally:
            self._closed.set()
            self._arrived.set()
            self._thread.join()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _write(self) -> None:
        count = len(self._lines)  # `append` may add more meanwhile
        if count:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(line + "\n" for line in self._lines[:count]))
            del self._lines[:count]

    def _run(self) -> None:
        while not self._closed.is_set():
            self._arrived.wait()
            self._arrived.clear()
            began = time.perf_counter()
            with self._writing:
                try:
                    self._write()
                except OSError as error:
                    self._error = error
                    return
            self._closed.wait(PAUSE * (time.perf_counter() - began))
