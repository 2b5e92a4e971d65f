"""kill -9 at several moments, then the same command: nothing done twice, nothing lost, the undisturbed numbers."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import write_run

TIMES = ("seconds", "rollout_seconds", "tokens_per_second")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("given"))


@pytest.fixture(scope="module")
def start(config, program_environment):
    """Starts a run."""

    def start(run_dir: Path, *overrides: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "raft_jax", "run", str(config), f"run_dir={run_dir}", *overrides],
            env=program_environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
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
        "tokens": {(line["stage"], line["method"]): line["tokens"] for line in lines(run_dir / "timings.jsonl")},
        "weights": (run_dir / "raft/hf/model.safetensors").read_bytes(),
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, start):
    """The folder of a run that nothing stopped."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(start(run_dir))
    assert [line["step"] for line in results(run_dir)["metrics"]] == list(range(1, 7))
    return run_dir


@pytest.fixture
def refined(undisturbed, tmp_path):
    """The folder of a run that has its refined rows."""
    shutil.copytree(undisturbed / "refined", tmp_path / "run/refined")
    with (undisturbed / "timings.jsonl").open() as timings:
        (tmp_path / "run/timings.jsonl").write_text(next(timings))
    return tmp_path / "run"


def test_killed_while_refining_and_while_training_and_the_newest_checkpoint_damaged(tmp_path, start, undisturbed):
    """One run that meets all of it: each start costs what a run does. tests/test_train_loop.py kills training alone."""
    run_dir = tmp_path / "run"
    stop_after(start(run_dir), run_dir / "refined/ledger.jsonl", 1, signal.SIGKILL)
    ledger_then = (run_dir / "refined/ledger.jsonl").read_text("utf-8")
    stop_after(start(run_dir), run_dir / "raft/metrics.jsonl", 5, signal.SIGKILL)
    ledger = (run_dir / "refined/ledger.jsonl").read_text("utf-8")
    assert ledger.startswith(ledger_then[: ledger_then.rfind("\n") + 1])
    done = [(record["stage"], record["key"]) for record in lines(run_dir / "refined/ledger.jsonl")]
    assert len(done) == len(set(done))
    damage_the_newest(run_dir / "raft/checkpoints")
    # Step 2 is saved, step 4 perhaps: it is being saved while training goes on.
    assert re.search(r"checkpoints/[24]: damaged or unfinished; (falling back|training begins)", finish(start(run_dir)))
    assert results(run_dir) == results(undisturbed)


def damage_the_newest(checkpoints: Path) -> None:
    """One bit of its largest file."""
    step = max(int(path.name.partition(".")[0]) for path in checkpoints.glob("*.sha256.json"))
    files = (path for path in (checkpoints / str(step)).rglob("*") if path.is_file())
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(bytes(content))


def test_asked_to_stop_it_saves_and_goes_on_there(refined, start, undisturbed):
    process = start(refined, "train.checkpoint_every=100")
    stop_after(process, refined / "raft/metrics.jsonl", 2, signal.SIGTERM)
    assert process.returncode == 130
    kept = len(lines(refined / "raft/metrics.jsonl"))
    assert (refined / f"raft/checkpoints/{kept}").is_dir()
    finish(start(refined, "train.checkpoint_every=100"))
    assert results(refined) == results(undisturbed)
