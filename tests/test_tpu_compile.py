"""The TPU's own compiler takes the programs of a run of the paper's three models, on a machine without a TPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
pytest.importorskip("libtpu", reason="the extra [tpu] is not installed")

ROOT = Path(__file__).parents[1]
MODELS = json.loads((ROOT / "benchmarks/tpu_models.json").read_text())


def rows(tmp_path, *arguments: str) -> dict[str, dict]:
    """What benchmarks/tpu_programs.py reads of each program."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "XLA_FLAGS": "",
    }
    command = [sys.executable, "benchmarks/tpu_programs.py", "--json", str(tmp_path / "rows.json"), *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    return {row["program"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}


@pytest.mark.parametrize("model", MODELS)
def test_a_v5e_slice_of_16_chips(model, tmp_path):
    """Bytes per chip and bytes exchanged of each program, and the seconds of a step at 90 GB/s."""
    read = rows(tmp_path, "--model", model)
    rollout, losses, step = (read[name] for name in ("rollout", "losses", "step"))
    assert max(row["gigabytes"] for row in read.values()) < 16
    assert rollout["exchanged"] <= 40 and rollout["busy_seconds"] <= 2
    assert losses["exchanged"] <= 4 and losses["gigabytes"] <= 0.8
    assert step["exchanged"] <= 35 and step["gigabytes"] <= 4.7
    assert sum(row[part] for row in (rollout, step) for part in ("busy_seconds", "exchange_seconds")) <= 4


@pytest.mark.parametrize(
    ("topology", "mesh"),
    [("v5e:2x4", "1,8,1"), ("v6e:4x4", "1,16,1"), ("v5p:2x2x4", "1,16,1"), ("tpu7x:2x2x1", "1,8,1")],
)
def test_other_slices(topology, mesh, tmp_path):
    read = rows(tmp_path, "--topology", topology, "--mesh", mesh, "--programs", "rollout", "step")
    assert max(row["gigabytes"] for row in read.values()) < 16  # the smallest memory of these chips


def test_four_rows_on_each_chip(tmp_path):
    read = rows(tmp_path, "--batch-size", "64", "--programs", "step")
    assert read["step"]["gigabytes"] < 16
