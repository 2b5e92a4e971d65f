"""The ledger: what append returned for is there, whatever was killed when."""

import json
import os
import signal
import subprocess
import sys
from functools import partial

import pytest

from raft_jax.errors import InputError
from raft_jax.refine.ledger import Ledger

FIRST = {"stage": "rewrite", "key": "q1", "text": "Ärzte helfen.\nImmer."}
SECOND = {"stage": "similarity", "key": "q1", "value": 0.8125}
THIRD = {"stage": "score", "key": "q1/1", "scores": {"local": None, "other": 0.1}}


def test_records_survive_reopening(tmp_path):
    path = tmp_path / "deep" / "ledger.jsonl"
    ledger = Ledger.open(path)
    assert path.exists() and ("rewrite", "q1") not in ledger
    ledger.append([FIRST, SECOND])
    ledger.append([])
    ledger.append([THIRD])
    for again in (ledger, Ledger.open(path)):
        assert again.get("rewrite", "q1") == FIRST
        assert again.get("score", "q1/1") == THIRD
        assert ("similarity", "q1") in again and ("fuse", "q1") not in again
        assert again.get("fuse", "q1") is None
    assert path.read_text(encoding="utf-8").count("\n") == 3


def test_one_stage_and_key_have_one_content(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger.open(path)
    ledger.append([FIRST, dict(FIRST)])
    ledger.append([dict(reversed(FIRST.items()))])
    assert path.read_text(encoding="utf-8").count("\n") == 1
    other = {**FIRST, "text": "Something else."}
    for batch in ([SECOND, other], [SECOND, {**SECOND, "value": 0.5}]):
        with pytest.raises(ValueError, match="other content"):
            ledger.append(batch)
    # A refused batch leaves nothing behind.
    assert ("similarity", "q1") not in ledger
    assert ("similarity", "q1") not in Ledger.open(path)


def test_a_slow_listener_is_called_for_few_records(tmp_path, monkeypatch):
    """Of a record each second, every tenth where the listener takes a second; all where it takes no time."""
    path = tmp_path / "ledger.jsonl"
    clock, heard = [0.0], []
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    def record(seconds: float, number: int) -> None:
        heard.append(number)
        clock[0] += seconds
        assert path.read_text().count("\n") == number + 1  # what is told is on the disk

    for seconds, expected in ((1.0, [0, 10, 20]), (0.0, list(range(30)))):
        path.unlink(missing_ok=True)
        heard.clear()
        ledger = Ledger.open(path)
        for number in range(30):
            ledger.on_append = partial(record, seconds, number)
            ledger.append([{**SECOND, "key": str(number)}])
            clock[0] += 1
        ledger.append([{**SECOND, "key": "0"}])  # nothing new
        assert heard == expected and len(path.read_text().splitlines()) == 30


@pytest.mark.parametrize(
    "record",
    [
        {"stage": "guess", "key": "q1"},
        {"stage": "fuse"},
        {"stage": "fuse", "key": 7},
        ["fuse", "q1"],
        {"stage": "fuse", "key": "q1", "mean": float("nan")},
    ],
)
def test_malformed_records_are_refused(tmp_path, record):
    ledger = Ledger.open(tmp_path / "ledger.jsonl")
    with pytest.raises(ValueError):
        ledger.append([FIRST, record])
    assert (tmp_path / "ledger.jsonl").read_bytes() == b""


def test_truncated_at_every_byte(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger.open(path)
    ledger.append([FIRST])
    start = path.stat().st_size
    ledger.append([SECOND, THIRD])
    whole = path.read_bytes()
    end_of_second = whole.index(b"\n", start) + 1
    for cut in range(start, len(whole) + 1):
        path.write_bytes(whole[:cut])
        reopened = Ledger.open(path)
        assert reopened.get("rewrite", "q1") == FIRST
        assert (("similarity", "q1") in reopened) == (cut >= end_of_second)
        assert (("score", "q1/1") in reopened) == (cut == len(whole))
        # The torn line is gone from the file, so that going on gives the undisturbed one.
        reopened.append([SECOND, THIRD])
        assert path.read_bytes() == whole


@pytest.mark.parametrize("torn", [b"\0\0\0\0", b'{"stage": "fu\n', b"\xff\xfe\n"])
def test_a_garbled_last_line_is_dropped(tmp_path, torn):
    path = tmp_path / "ledger.jsonl"
    Ledger.open(path).append([FIRST])
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert ("rewrite", "q1") in Ledger.open(path)
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"stage": "fu', "damaged"),
        (b"", "damaged"),
        (b"\xff\xfe", "damaged"),
        (b"[1]", "needs a stage"),
        (b'{"stage": "fuse", "key": "k", "num_tokens": "x"}', "num_tokens is 'x'; remove the line"),
        (b'{"stage": "guess", "key": "q1"}', "needs a stage"),
        (b'{"stage": "rewrite", "key": "q1", "text": "Other."}', "contradicts"),
    ],
)
def test_damage_in_the_middle_is_refused_and_kept(tmp_path, line, message):
    path = tmp_path / "ledger.jsonl"
    Ledger.open(path).append([FIRST, SECOND])
    first, second = path.read_bytes().splitlines()
    data = b"\n".join([first, line, second, b'{"torn'])
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        Ledger.open(path)
    assert str(caught.value).startswith(f"{path}:2: ") and "\n" not in str(caught.value)
    assert path.read_bytes() == data


def test_a_ledger_that_cannot_be_read_is_a_line(tmp_path):
    with pytest.raises(InputError, match="expected a file, found a folder"):
        Ledger.open(tmp_path)


def test_a_failed_write_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger.open(path)
    ledger.append([FIRST])
    whole = path.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError):
            ledger.append([SECOND])
    assert path.read_bytes() == whole and ("similarity", "q1") not in ledger
    ledger.append([SECOND])
    assert ("similarity", "q1") in Ledger.open(path)


def test_a_full_disk_leaves_no_half_line(tmp_path):
    path = tmp_path / "ledger.jsonl"
    # The limit on file size stands in for the disk: a first write falls short, the next one fails.
    program = (
        "import resource; from raft_jax.refine.ledger import Ledger\n"
        f"ledger = Ledger.open({str(path)!r})\n"
        "ledger.append([{'stage': 'fuse', 'key': 'a', 'text': 'x' * 18_000}])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    ledger.append([{'stage': 'fuse', 'key': key, 'text': 'x' * 1500} for key in 'bcd'])\n"
        "except OSError as error:\n"
        "    print(type(error).__name__)\n"
        "ledger.append([{'stage': 'fuse', 'key': 'e'}])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "OSError\n"
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "e"]


def test_a_killed_process_loses_nothing_it_reported(tmp_path):
    path = tmp_path / "ledger.jsonl"
    program = (
        "import sys; from raft_jax.refine.ledger import Ledger\n"
        "assert 'jax' not in sys.modules\n"
        f"ledger = Ledger.open({str(path)!r})\n"
        "for n in range(10**9):\n"
        "    ledger.append([{'stage': 'rewrite', 'key': str(n), 'text': 'x' * 5000}])\n"
        "    print(n, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        reported = [process.stdout.readline() for _ in range(20)]
        process.send_signal(signal.SIGKILL)
        reported += process.stdout.readlines()
    last = int(reported[-1])
    reopened = Ledger.open(path)
    assert last >= 19
    assert all(("rewrite", str(n)) in reopened for n in range(last + 1))
    assert ("rewrite", str(last + 2)) not in reopened
