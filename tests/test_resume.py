"""kill -9 at several moments, then the same command: nothing done twice, nothing lost, the undisturbed numbers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import write_run

TIMES = ("seconds", "rollout_seconds")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts a run. All runs share what they compile, and none looks for the eight devices of the other tests."""
    environment = os.environ | {
        "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def start(config: Path) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "raft_jax", "run", str(config)], env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )

    return start


def finish(process: subprocess.Popen) -> str:
    try:
        output, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, output
    return output


def lines(path: Path) -> list[dict]:
    """The whole lines of a file that may be written to at this moment."""
    text = path.read_text("utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def stop_after(process: subprocess.Popen, path: Path, count: int, number: int) -> None:
    """Signals the process as soon as the file has `count` lines."""
    deadline = time.monotonic() + 600
    while len(lines(path)) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{path} has not got {count} lines"
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=600)


def results(run_dir: Path) -> dict:
    metrics = [
        {name: value for name, value in line.items() if name not in TIMES}
        for line in lines(run_dir / "raft/metrics.jsonl")
    ]
    return {
        "refined": (run_dir / "refined/refined.jsonl").read_text("utf-8"),
        "metrics": metrics,
        "evaluation": json.loads((run_dir / "evaluation.json").read_text("utf-8")),
        "weights": (run_dir / "raft/hf/model.safetensors").read_bytes(),
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, start):
    config = write_run(tmp_path_factory.mktemp("undisturbed"))
    finish(start(config))
    return results(config.parent / "run")


def test_killed_while_refining_and_while_training(tmp_path, start, undisturbed):
    config = write_run(tmp_path)
    run_dir = tmp_path / "run"
    stop_after(start(config), run_dir / "refined/ledger.jsonl", 1, signal.SIGKILL)
    ledger_then = (run_dir / "refined/ledger.jsonl").read_text("utf-8")
    stop_after(start(config), run_dir / "raft/metrics.jsonl", 3, signal.SIGKILL)
    ledger = (run_dir / "refined/ledger.jsonl").read_text("utf-8")
    assert ledger.startswith(ledger_then[: ledger_then.rfind("\n") + 1])
    done = [(record["stage"], record["key"]) for record in lines(run_dir / "refined/ledger.jsonl")]
    assert len(done) == len(set(done))
    finish(start(config))
    assert results(run_dir) == undisturbed
    assert [line["step"] for line in undisturbed["metrics"]] == list(range(1, len(undisturbed["metrics"]) + 1))

    # A whole run has nothing left to do.
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*.safetensors")}
    finish(start(config))
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*.safetensors")} == before


def test_asked_to_stop_it_saves_and_goes_on_there(tmp_path, start, undisturbed):
    config = write_run(tmp_path, train={"checkpoint_every": 100})
    process = start(config)
    stop_after(process, tmp_path / "run/raft/metrics.jsonl", 2, signal.SIGTERM)
    assert process.returncode == 130
    kept = len(lines(tmp_path / "run/raft/metrics.jsonl"))
    assert (tmp_path / f"run/raft/checkpoints/{kept}").is_dir()
    finish(start(config))
    assert results(tmp_path / "run")["metrics"] == undisturbed["metrics"]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, start, undisturbed):
    config = write_run(tmp_path)
    run_dir = tmp_path / "run"
    stop_after(start(config), run_dir / "raft/metrics.jsonl", 5, signal.SIGKILL)
    steps = [int(path.name.partition(".")[0]) for path in (run_dir / "raft/checkpoints").glob("*.sha256.json")]
    folder = run_dir / "raft/checkpoints" / str(max(steps))
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(bytes(content))
    output = finish(start(config))
    assert "falling back" in output
    assert results(run_dir)["metrics"] == undisturbed["metrics"]
    shutil.rmtree(run_dir)
