"""Metrics sent to other programs: stand-ins for them, and TensorBoard's own files."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest

from raft_jax.errors import InputError
from raft_jax.trackers import Trackers, require_trackers


@pytest.fixture
def stand_in(monkeypatch):
    """A module with the functions of wandb and trackio, and what they were called with."""

    def make(name: str, fails_at: int | None = None):
        calls = []

        def log(values, step):
            if step == fails_at:
                raise ConnectionError("no\nserver")
            calls.append((step, values))

        module = SimpleNamespace(
            init=lambda **given: calls.append(given), log=log, finish=lambda: calls.append("finished"), calls=calls
        )
        monkeypatch.setitem(sys.modules, name, module)
        return calls

    return make


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_every_line_arrives_under_the_name_of_the_run(stand_in, tmp_path, name):
    calls = stand_in(name)
    folder = tmp_path / "law" / "raft"
    with Trackers([name], folder, {"train.learning_rate": 1e-5}) as trackers:
        trackers.log({"step": 3, "loss": 2.5, "mfu": math.nan})
    begun, line, end = calls
    assert begun["project"] == "raft-jax"
    assert begun["name"] == "law/raft"
    assert begun["config"] == {"train.learning_rate": 1e-5}
    assert begun["resume"] == "allow"
    assert begun.get("id") == ("law-raft" if name == "wandb" else None)
    assert line == (3, {"step": 3, "loss": 2.5})
    assert end == "finished"


def test_one_that_fails_is_named_once_and_the_other_goes_on(stand_in, tmp_path, capsys):
    broken, whole = stand_in("wandb", fails_at=2), stand_in("trackio")
    with Trackers(["wandb", "trackio"], tmp_path / "run" / "sft", {}) as trackers:
        for step in (1, 2, 3):
            trackers.log({"step": step})
    assert [call for call in whole if isinstance(call, tuple)] == [(step, {"step": step}) for step in (1, 2, 3)]
    assert [call for call in broken if isinstance(call, tuple)] == [(1, {"step": 1})]
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "wandb failed and is left out (ConnectionError: no" in error


def test_one_that_cannot_begin_is_left_out(monkeypatch, tmp_path, capsys):
    def init(**given):
        raise RuntimeError("not logged in")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with Trackers(["wandb"], tmp_path / "run" / "sft", {}) as trackers:
        trackers.log({"step": 1})
    assert "not logged in" in capsys.readouterr().err


def test_tensorboard_reads_what_is_written(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    with Trackers(["tensorboard"], tmp_path / "run" / "sft", {}) as trackers:
        trackers.log({"step": 7, "loss": 2.5})
    (path,) = (tmp_path / "run" / "sft" / "tensorboard").iterdir()
    data, place, found = path.read_bytes(), 0, []
    while place < len(data):  # TFRecord: length, checksum, record, checksum
        length = int.from_bytes(data[place : place + 8], "little")
        event = Event.FromString(data[place + 12 : place + 12 + length])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        place += length + 16
    assert ("loss", 7, 2.5) in found


def test_a_missing_package_is_named_before_anything_is_computed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="trackio needs trackio; pip install trackio"):
        require_trackers(["trackio"])
    require_trackers([])
