"""examples/slurm.sh with stand-ins for srun and scontrol: what is started, and after which exit codes it is queued."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples/slurm.sh"


@pytest.fixture
def slurm(tmp_path):
    """Runs the script as a job whose srun ends with `code`; returns the finished process and the commands it ran."""
    calls = tmp_path / "calls"
    for name in ("srun", "scontrol"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> {calls}\nexit ${{{name.upper()}_CODE:-0}}\n')
        program.chmod(0o755)

    def run(*arguments, code=0, **environment):
        path = f"{tmp_path}:{os.environ['PATH']}"
        given = {"PATH": path, "PYTHON": "python", "SRUN_CODE": str(code), **environment}
        done = subprocess.run(["bash", SCRIPT, *arguments], env=given, capture_output=True, text=True, timeout=60)
        return done, calls.read_text().splitlines() if calls.exists() else []

    return run


@pytest.mark.parametrize(
    ("code", "restarts", "queued"),
    [
        (0, 0, False),
        (2, 0, False),  # bad input
        (127, 0, False),
        (130, 0, True),  # stopped by a signal, after saving
        (130, 7, True),
        (1, 0, True),
        (134, 2, True),  # JAX ends the others so when a process has died
        (134, 3, False),
    ],
)
def test_what_is_queued_again(slurm, code, restarts, queued):
    job = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": str(restarts)}
    done, calls = slurm("my.yaml", "seed=1", code=code, **job)
    start = "srun --kill-on-bad-exit=1 python -m raft_jax run my.yaml seed=1"
    assert calls == [start] + ["scontrol requeue 17"] * queued
    assert done.returncode == (0 if queued else code)


def test_how_it_has_to_be_started(slurm):
    for arguments, job, message in (((), {"SLURM_JOB_ID": "17"}, "usage: sbatch"), (("my.yaml",), {}, "by sbatch")):
        done, calls = slurm(*arguments, **job)
        assert done.returncode == 2 and message in done.stderr and calls == []
