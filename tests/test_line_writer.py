"""Lines are written in the background, in order, and none is lost, however slow or full the file system is."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from raft_jax.line_writer import LineWriter
from raft_jax.metrics import MetricsLog, read_metrics


@pytest.fixture
def slow_disk(monkeypatch):
    """Opening a file to append to it waits for the returned event; the number of times it was opened is counted."""
    open_path, ready = Path.open, threading.Event()
    opened = []

    def slow(path, mode="r", *arguments, **keywords):
        if mode == "a":
            assert ready.wait(60)
            opened.append(path)
        return open_path(path, mode, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", slow)
    ready.opened = opened
    return ready


def test_appending_waits_for_nothing_and_flushing_for_everything(tmp_path, slow_disk):
    writer = LineWriter(tmp_path / "a")
    for number in range(1000):
        writer.append(str(number))
    assert not (tmp_path / "a").exists()
    slow_disk.set()
    writer.flush()
    assert (tmp_path / "a").read_text().split() == [str(number) for number in range(1000)]
    assert len(slow_disk.opened) <= 3  # the thread's first lines, and all others
    writer.append("last")
    writer.close()
    writer.close()
    assert (tmp_path / "a").read_text().endswith("999\nlast\n")


def test_lines_reach_the_file_without_being_flushed(tmp_path):
    writer = LineWriter(tmp_path / "a")
    writer.append("one")
    for _ in range(6000):
        if (tmp_path / "a").exists() and (tmp_path / "a").read_text() == "one\n":
            break
        threading.Event().wait(0.01)
    else:
        pytest.fail("nothing was written in a minute")
    writer.close()


def test_an_error_of_the_thread_is_one_of_the_run(tmp_path, monkeypatch):
    open_path, failed = Path.open, threading.Event()

    def full(path, mode="r", *arguments, **keywords):
        if mode == "a":
            failed.set()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return open_path(path, mode, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", full)
    log = MetricsLog(tmp_path / "metrics.jsonl", keep=0)
    log.append({"step": 1})
    assert failed.wait(60)
    with pytest.raises(OSError, match="No space left"):
        log.flush()
    with pytest.raises(OSError, match="No space left"):
        log.append({"step": 2})
    with pytest.raises(OSError, match="No space left"), log:
        pass


def test_an_exception_loses_no_line(tmp_path, slow_disk):
    threading.Timer(0.2, slow_disk.set).start()
    with pytest.raises(KeyboardInterrupt), MetricsLog(tmp_path / "metrics.jsonl", keep=0) as log:
        log.append({"step": 1})
        log.append({"step": 2})
        raise KeyboardInterrupt
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_killed_after_a_flush_nothing_before_it_is_missing(tmp_path):
    program = (
        "import os, signal, sys; from pathlib import Path; from raft_jax.line_writer import LineWriter\n"
        "writer = LineWriter(Path(sys.argv[1]))\n"
        "for number in range(100): writer.append(str(number))\n"
        "writer.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_text().split() == [str(number) for number in range(100)]
