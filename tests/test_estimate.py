"""The estimate of a run's disk, memory and time: worked figures, measured runs, and what must grow with what."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import make_model

from raft_jax.config_file import load_config
from raft_jax.estimate import (
    ModelSize,
    RowLengths,
    estimate,
    estimate_lines,
    find_device,
    local_device,
    model_size,
    num_steps,
)

ROOT = Path(__file__).parents[1]
# SmolLM2-135M, and the quickstart's mean lengths under its tokenizer.
SMOLLM2 = ModelSize(134_515_008, 134_515_008, 30, 576, 1536, 576, 192)
QUICKSTART = RowLengths(train=[(47, 58)] * 48, test=[(54, 58)] * 24, general=[42] * 55)
CPU = find_device("cpu", cores=2)
GB = 1e9


def quickstart(*overrides: str):
    return load_config(ROOT / "configs/quickstart.yaml", overrides)


def test_disk_by_hand():
    """float32: an export has 4 bytes a parameter, a checkpoint 12, of which 93 % are written."""
    export, checkpoint = 4 * 134_515_008, 0.93 * 12 * 134_515_008
    found = estimate(quickstart(), SMOLLM2, QUICKSTART, CPU)
    assert found.disk_after == pytest.approx(2 * export)
    # While RAFT is trained: SFT's export, its own checkpoint and the next one, before the first goes.
    assert found.disk_peak == pytest.approx(export + 2 * checkpoint)
    kept = estimate(quickstart("train.keep_finished=true"), SMOLLM2, QUICKSTART, CPU)
    assert kept.disk_after == pytest.approx(2 * (export + checkpoint))
    half = estimate(quickstart("export.dtype=bfloat16"), SMOLLM2, QUICKSTART, CPU)
    assert half.disk_after == pytest.approx(found.disk_after / 2)


def test_the_quickstart_takes_what_was_measured():
    """An earlier quickstart: 6 min 46 s with installation, 6.5 GB, 4.1 GB of folder with all checkpoints."""
    found = estimate(quickstart("train.keep_finished=true"), SMOLLM2, QUICKSTART, CPU)
    for estimated, measured in ((found.disk_after, 4.07 * GB), (found.memory, 6.5 * GB), (found.seconds, 406)):
        assert measured / 1.5 < estimated < measured * 1.5


@pytest.mark.parametrize(
    ("batch_size", "rollout", "seconds", "memory"),
    [
        (4, 64, 6.64, 4.11),
        (4, 256, 15.67, 4.68),
        (16, 64, 18.40, 5.52),
    ],
)
def test_a_train_step_takes_what_was_measured(batch_size, rollout, seconds, memory):
    """docs/performance.md, sample data: answers of about 58 tokens."""
    config = quickstart(
        "methods=[raft]",
        f"train.batch_size={batch_size}",
        f"train.rollout.max_new_tokens={rollout}",
        "refine.batch_size=1",
        "evaluate.batch_size=1",
    )
    one, two = (
        estimate(replace(config, train=replace(config.train, max_steps=steps, epochs=9)), SMOLLM2, QUICKSTART, CPU)
        for steps in (1, 2)
    )
    assert seconds / 1.5 < two.train - one.train < seconds * 1.5
    assert memory / 1.5 < one.memory / GB < memory * 1.5


@pytest.mark.parametrize(
    ("override", "figure", "grows"),
    [
        ("train.num_micro_batches=8", "memory", False),
        ("model.remat=true", "memory", False),
        ("model.remat=true", "train", True),
        ("refine.batch_size=4096", "memory", True),
        ("evaluate.max_new_tokens=500", "evaluate", True),
        ("refine.rounds=3", "refine", True),
        ("train.rollout.max_new_tokens=256", "train", True),
        ("train.epochs=5", "train", True),
        ("train.keep_checkpoints=3", "disk_peak", True),
        ("methods=[sft]", "train", False),
        ("methods=[raft,sft,asft]", "train", True),
        ("mesh.fsdp=4", "memory", False),
    ],
)
def test_what_a_setting_changes(override, figure, grows):
    before = getattr(estimate(quickstart(), SMOLLM2, QUICKSTART, CPU), figure)
    after = getattr(estimate(quickstart(override), SMOLLM2, QUICKSTART, CPU), figure)
    assert (after > before) is grows and after != before


def test_a_run_without_refined_answers_refines_nothing():
    assert estimate(quickstart("methods=[sft,on_policy]"), SMOLLM2, QUICKSTART, CPU).refine == 0
    assert "refine" not in "".join(estimate_lines(quickstart("methods=[sft]"), SMOLLM2, QUICKSTART, device="cpu"))


def test_steps_are_those_of_the_training():
    assert num_steps(quickstart(), 48) == 6 and num_steps(quickstart("train.max_steps=4"), 48) == 4
    assert num_steps(quickstart("train.epochs=0.01"), 48) == 1


def test_size_of_a_model_and_of_its_adapters():
    model = make_model()
    config = quickstart()
    found = model_size(model.config, config)
    assert found.num_parameters == found.num_trained == sum(array.size for array in model.params.values())
    # Two layers, rank 2, query only: width 32 to 4 heads of 8.
    lora = model_size(model.config, quickstart("train.lora.rank=2", "train.lora.targets=[q_proj]"))
    assert lora.num_trained == 2 * 2 * (32 + 32)
    assert estimate(config, lora, QUICKSTART, CPU).memory < estimate(config, found, QUICKSTART, CPU).memory


def test_lines():
    lines = estimate_lines(quickstart(), SMOLLM2, QUICKSTART, device="cpu", free_disk=10**9)
    assert [line.partition(":")[0] for line in lines] == [
        "disk",
        "  only 1.0 GB are free there; set run_dir, train.keep_checkpoints or export.dtype",
        "memory",
        "time",
    ]
    assert all("\n" not in line for line in lines)
    enough = estimate_lines(quickstart(), SMOLLM2, QUICKSTART, device="TPU v5 lite", free_disk=10**12)
    assert len(enough) == 3 and "on one TPU v5 lite" in enough[-1] and "each device" in enough[1]
    unknown = estimate_lines(quickstart(), SMOLLM2, QUICKSTART, device="Abacus 3000")
    assert unknown[-1] == "time: not known for Abacus 3000"


def test_devices(monkeypatch):
    assert find_device("NVIDIA H100 80GB HBM3").name == "one NVIDIA H100" and find_device("Abacus 3000") is None
    assert find_device("NVIDIA H100").flops > find_device("NVIDIA A100-SXM4-80GB").flops > find_device("cpu").flops
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert local_device() == "cpu"


@pytest.mark.parametrize(
    "rows",
    [
        RowLengths([(10, 5)], [(10, 5)], [10]),
        RowLengths([(10, 5)] * 3, [(1, 1)], []),
    ],
)
def test_few_rows_are_no_trouble(rows):
    found = estimate(quickstart(), SMOLLM2, rows, CPU)
    assert all(math.isfinite(value) and value >= 0 for value in vars(found).values())


def test_import():
    code = "import sys, raft_jax.estimate; print('jax' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"
