"""XLA's compiler for NVIDIA's GPUs takes the programs of a run, on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_plan import HF, write_config

pytestmark = pytest.mark.slow
pytest.importorskip("jax_cuda13_plugin", reason="the extra [plan] is not installed")

ROOT = Path(__file__).parents[1]
MODELS = json.loads((ROOT / "benchmarks/tpu_models.json").read_text())
SMALL = HF | {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
METHODS = ["raft", "on_policy", "asft", "sft"]


def plan(path: Path, topology: str, *words: str) -> dict:
    """The plan that the command prints as JSON, in a process of its own that sets its environment itself."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "TPU_", "XLA_"))}
    command = [sys.executable, "-m", "raft_jax", "plan", str(path), "--topology", topology, "--json", "--quick", *words]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("mesh", [(1, 8, 1), (8, 1, 1), (1, 2, 4), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("more", [(), ("train.lora.rank=4",), ("train.kl=reverse", "train.top_k=null")], ids=str)
def test_eight_gpus_in_every_mix(mesh, more, tmp_path):
    path = write_config(
        tmp_path,
        SMALL,
        methods=METHODS,
        model={"dtype": "bfloat16"},
        train={"batch_size": 8},
        mesh=dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)),
    )
    found = plan(path, "h100x8", *more)
    assert found["chips"] == 8 and found["chip"]["kind"] == "NVIDIA H100" and found["fits"]
    assert [phase["name"] for phase in found["phases"]][:3] == ["refine", "rollout", "train raft"]
    assert all(phase["collective_bytes"] for phase in found["phases"] if phase["name"].startswith("train"))


@pytest.mark.parametrize("topology", ["l4", "rtx4090", "a100-40gb", "a100", "h200", "b200x2"])
def test_other_gpus(topology, tmp_path):
    fsdp = 2 if topology.endswith("x2") else 1
    path = write_config(tmp_path, SMALL, model={"dtype": "bfloat16"}, mesh={"data": 1, "fsdp": fsdp})
    assert plan(path, topology)["fits"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("hardware", "topology"), [("24gb", "rtx4090"), ("80gb", "h100"), ("h100x8", "h100x8")])
def test_the_papers_models_fit_the_hardware_of_the_configs(model, hardware, topology, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MODELS[model]))
    found = plan(ROOT / f"configs/llama-3.2-3b-{hardware}.yaml", topology, f"model.source={tmp_path}")
    assert found["fits"] and found["batch_size"] == 16
