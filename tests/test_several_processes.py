"""Two processes with two devices each give the numbers of one process with four devices."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from storage_server import StorageServer
from tiny import write_run

pytestmark = pytest.mark.slow

RUN = ("-m", "raft_jax", "run")
PARTS = ("sha256.json", "sha256.1.json")  # the manifests of two processes
TIMES = ("seconds", "rollout_seconds", "tokens_per_second", "last_process", "last_process_seconds")


def start(*arguments: str | Path, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> None:
    try:
        output, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, output


def start_together(*arguments: str | Path, own: Sequence[dict[str, str]] = ({}, {})) -> list[subprocess.Popen]:
    """A program in two processes with two devices each, and what each has in its environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_NUM_PROCESSES": "2",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
    }
    return [start(*arguments, **shared, **own[number], JAX_PROCESS_ID=str(number)) for number in range(2)]


def run_together(config: Path, own: Sequence[dict[str, str]] = ({}, {})) -> None:
    processes = start_together(*RUN, config, own=own)
    try:
        for process in processes:
            finish(process)
    finally:
        for process in processes:
            process.kill()


def wait_for_lines(path: Path, count: int, processes: list[subprocess.Popen]) -> None:
    while not path.exists() or path.read_text().count("\n") < count:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)


def assert_same_losses(found: list[dict], expected: list[dict]) -> None:
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, other in zip(expected, found, strict=True):
        for name in ("sft_loss", "kl_loss", "weight"):
            assert other[name] == pytest.approx(line[name], rel=1e-5), name


def metrics_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "raft/metrics.jsonl").read_text().splitlines()]


def test_two_processes_run_as_one(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = (write_run(tmp_path / name, mesh={"data": -1}, train={"keep_finished": True}) for name in ("one", "two"))
    # Not one device: its products round differently, and where the tiny model's flat distribution has a draw next to a
    # border between tokens, another is taken. tests/test_sharding.py compares several devices with one.
    finish(start(*RUN, one, XLA_FLAGS="--xla_force_host_platform_device_count=4"))
    run_together(two)

    def results(name: str):
        run_dir = tmp_path / name / "run"
        return metrics_of(run_dir), json.loads((run_dir / "evaluation.json").read_text())["models"]["raft"]["domain"]

    (expected, marks), (found, found_marks) = results("one"), results("two")
    assert_same_losses(found, expected)
    assert not any("last_process" in line for line in (*expected, found[0]))
    assert all(line["last_process"] in (0, 1) and line["last_process_seconds"] >= 0 for line in found[1:])
    assert found_marks["gold_logprob"]["mean"] == pytest.approx(marks["gold_logprob"]["mean"], rel=1e-5)

    # What a slice that is taken away during a save leaves: arrays without a manifest. Both go on from the step before.
    run_dir = two.parent / "run"
    steps = sorted(int(path.name.partition(".")[0]) for path in (run_dir / "raft/checkpoints").glob("*.sha256.json"))
    assert len(steps) == 2
    parts = [set(json.loads((run_dir / f"raft/checkpoints/{steps[-1]}.{name}").read_text())["files"]) for name in PARTS]
    assert all(parts) and not set.intersection(*parts)  # each process hashed the files that it wrote
    (run_dir / f"raft/checkpoints/{steps[-1]}.sha256.json").unlink()
    for path in (run_dir / "raft/hf").iterdir():
        path.unlink()
    run_together(two)
    for line, other in zip(found, metrics_of(run_dir), strict=True):
        assert {**other, **dict.fromkeys(TIMES)} == {**line, **dict.fromkeys(TIMES)}


LAST = """
from types import SimpleNamespace
import os, sys
import jax
from raft_jax import sharding
address, count, number = (os.environ["JAX_" + name] for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID"))
jax.distributed.initialize(address, int(count), int(number))
sharding.time = SimpleNamespace(time=lambda: 1.7e9 + (0.25 if number == sys.argv[1] else 0.0))
mesh = sharding.make_mesh(-1)
last_process = sharding.make_last_process(mesh)
print("found", last_process(), last_process())
"""


@pytest.mark.parametrize("late", ["0", "1"])
def test_the_last_process_is_told(late):
    processes = start_together("-c", LAST, late)
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(f"found None ({late}, 0.25)" in output for output in outputs), outputs


def test_two_machines_that_share_nothing_but_a_bucket(tmp_path):
    """Each has a cache folder of its own; a step without one of its manifests is not gone on from."""
    pytest.importorskip("gcsfs", reason="the extra [gcs] is not installed")
    for name in ("shared", "bucket"):
        (tmp_path / name).mkdir()
    settings = {"mesh": {"data": -1}, "train": {"keep_finished": True}, "methods": ["sft", "raft"]}
    shared = write_run(tmp_path / "shared", **settings)
    config = write_run(tmp_path / "bucket", run_dir="gs://runs/one", **settings)
    run_together(shared)
    with StorageServer("runs") as server:
        own = [server.environment | {"XDG_CACHE_HOME": str(tmp_path / name)} for name in ("first", "second")]
        run_together(config, own)
        objects = server.buckets["runs"]
        lines = objects["one/raft/metrics.jsonl"].content.splitlines()
        assert_same_losses([json.loads(line) for line in lines], metrics_of(shared.parent / "run"))
        weights = objects["one/raft/hf/model.safetensors"].content
        assert weights == (shared.parent / "run/raft/hf/model.safetensors").read_bytes()
        # The second machine's copy has what the first wrote.
        copy = tmp_path / "second/raft_jax/buckets/runs/one"
        assert (copy / "raft/hf/model.safetensors").read_bytes() == weights
        manifests = sorted(name for name in objects if "one/raft/checkpoints/" in name and name.endswith(PARTS[1]))
        del objects[manifests[-1]], objects["one/evaluation.json"]
        for name in [name for name in objects if name.startswith("one/raft/hf/")]:
            del objects[name]
        run_together(config, own[::-1])  # the machines' parts exchanged
        assert objects["one/raft/hf/model.safetensors"].content == weights


def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path):
    config = write_run(tmp_path, mesh={"data": -1}, methods=["sft"], train={"epochs": 200.0, "checkpoint_every": 1000})
    metrics = tmp_path / "run/sft/metrics.jsonl"
    processes = start_together(*RUN, config)
    try:
        wait_for_lines(metrics, 3, processes)
        processes[1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [130, 130], outputs
    done = len(metrics.read_text().splitlines())
    assert f"stopped by SIGTERM after step {done}; the same command" in outputs[1]
    assert f"stopped by a signal to another process after step {done}; the same command" in outputs[0]
    assert (tmp_path / f"run/sft/checkpoints/{done}.sha256.json").exists()


@pytest.mark.parametrize(("killed", "together"), [(1, True), (0, False)])
def test_when_a_process_is_killed_the_other_ends_and_the_run_goes_on(tmp_path, killed, together):
    """Killed between two checkpoints; then both go on, or one process with all four devices. No number changes."""
    for name in ("undisturbed", "disturbed"):
        (tmp_path / name).mkdir()
    training = {"train": {"epochs": 10.0, "checkpoint_every": 7}, "mesh": {"data": -1}, "methods": ["raft"]}
    undisturbed, disturbed = (write_run(tmp_path / name, **training) for name in ("undisturbed", "disturbed"))
    run_together(undisturbed)
    metrics = tmp_path / "disturbed/run/raft/metrics.jsonl"
    processes = start_together(*RUN, disturbed)
    try:
        wait_for_lines(metrics, 10, processes)
        processes[killed].kill()
        output, _ = processes[1 - killed].communicate(timeout=90)  # JAX gives up after 45 s
    finally:
        for process in processes:
            process.kill()
    # 3 where the exchange failed, -6 (SIGABRT) where JAX noticed first; resume.sh starts the run again after both.
    assert processes[1 - killed].returncode in (3, -6), output
    assert "another process" in output or "distributed service detected fatal errors" in output, output
    if together:
        run_together(disturbed)
    else:
        finish(start(*RUN, disturbed, XLA_FLAGS="--xla_force_host_platform_device_count=4"))
    expected, found = (metrics_of(tmp_path / name / "run") for name in ("undisturbed", "disturbed"))
    assert_same_losses(found, expected)
