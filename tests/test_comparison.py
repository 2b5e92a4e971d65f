"""A whole comparison of a tiny model: what its cells share, that it survives, and what its page says."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from made_up_run import make_run

from raft_jax.cli import main
from raft_jax.config_file import load_config
from raft_jax.errors import InputError
from raft_jax.grid import add_to_record, make_grid, read_record
from raft_jax.report import write_comparison
from raft_jax.report.comparison import answer, best_values, limits, read_comparison, yardsticks
from raft_jax.run_folder import RunFolder

METHODS = ["sft", "raft"]
TIMES = ("seconds", "rollout_seconds", "tokens_per_second")
CELLS = ["learning_rate=0.001,seed=1", "learning_rate=0.01,seed=1"]


def write_config(folder: Path, **changes) -> Path:
    compare = {"learning_rates": [1e-3, 1e-2], "seeds": [1]} | changes.pop("compare", {})
    given = {"methods": METHODS, "train": {"max_steps": 2}, "compare": compare} | changes
    return tiny.write_run(folder, **given)


@pytest.fixture(scope="module")
def start(program_environment):
    def begin(*arguments: object) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "raft_jax", *map(str, arguments)],
            env=program_environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    return begin


@pytest.fixture(scope="module")
def command(start):
    def run(*arguments: object) -> str:
        process = start(*arguments)
        text, _ = process.communicate(timeout=1200)
        assert process.returncode == 0, text
        return text

    return run


@pytest.fixture(scope="module")
def here():
    """The command in this process, which saves the start of another one."""

    def run(*arguments: object) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = main([str(argument) for argument in arguments])
        assert code == 0, printed.getvalue()
        return printed.getvalue()

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, command) -> tuple[Path, str]:
    """A folder with a finished comparison, and what it printed."""
    folder = tmp_path_factory.mktemp("compared")
    return folder, command("compare", write_config(folder))


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def scores(run_dir: Path) -> dict:
    """The scores of every cell."""
    return {
        path.parent.name: json.loads(path.read_text())["models"] for path in run_dir.glob("compare/*/evaluation.json")
    }


def test_every_method_is_trained_in_every_cell_and_what_they_share_is_made_once(finished):
    folder, printed = finished
    cells = scores(folder / "run")
    assert sorted(cells) == sorted(CELLS)
    assert all(set(models) == {"base", *METHODS} for models in cells.values())
    assert printed.count("rewrite: 0/") == 1
    assert printed.count("base on questions: 0/") == 1
    for name in CELLS:
        ours, shared = (
            (path / "refined" / "refined.jsonl").read_bytes()
            for path in (folder / "run" / "compare" / name, folder / "run")
        )
        assert ours == shared
    assert "compare: 2/2: learning_rate=0.01,seed=1" in printed
    assert "Each method at its best value" in printed
    assert (folder / "run" / "comparison.html").exists()


def test_a_cell_is_what_a_run_with_its_settings_is(finished, command):
    folder, _ = finished
    config = folder / "config.yaml"
    command("run", config, f"run_dir={folder}/alone", "train.learning_rate=0.01", "train.seed=1", "methods=[raft]")
    cell = folder / "run" / "compare" / "learning_rate=0.01,seed=1"
    assert metrics(folder / "alone" / "raft") == metrics(cell / "raft")
    ours, alone = (json.loads((path / "evaluation.json").read_text())["models"] for path in (cell, folder / "alone"))
    assert ours["raft"] == alone["raft"]
    other = folder / "run" / "compare" / "learning_rate=0.001,seed=1"
    assert metrics(other / "raft") != metrics(cell / "raft")


def test_a_finished_comparison_trains_nothing_again(finished, here):
    folder, _ = finished
    before = scores(folder / "run")
    printed = here("compare", folder / "config.yaml")
    assert "train raft" not in printed
    assert "rewrite" not in printed
    assert scores(folder / "run") == before


def test_killed_at_three_moments_it_ends_with_the_same_scores(finished, tmp_path, start, command):
    folder, _ = finished
    config = write_config(tmp_path, methods=["sft"])
    for moment in ("base on questions: 0/", "compare: 1/2", "sft on questions: 0/"):
        process = start("compare", config)
        assert any(moment in line for line in process.stdout)
        time.sleep(0.3)  # into the work that the line announces
        process.send_signal(signal.SIGKILL)
        process.wait()
    command("compare", config)
    undisturbed = scores(folder / "run")
    assert scores(tmp_path / "run") == {
        cell: {name: models[name] for name in ("base", "sft")} for cell, models in undisturbed.items()
    }


def test_where_a_method_diverges_is_said_and_the_other_cells_are_whole(tmp_path, here):
    config = write_config(tmp_path, methods=["sft"], compare={"learning_rates": [1e30, 1e-3]})
    printed = here("compare", config)
    found = scores(tmp_path / "run")
    assert set(found["learning_rate=1e+30,seed=1"]) == {"base"}
    assert set(found["learning_rate=0.001,seed=1"]) == {"base", "sft"}
    assert "is not finite" in printed
    assert "SFT diverged at learning_rate=1e+30,seed=1" in " ".join(printed.split())
    assert "train sft" not in here("compare", config)


def test_weights_are_removed_on_request_once_all_is_evaluated(tmp_path, here):
    config = write_config(tmp_path, methods=["sft", "fapm"], compare={"learning_rates": [], "keep_models": False})
    here("compare", config)
    cell = tmp_path / "run" / "compare" / "learning_rate=0.001,seed=1"
    assert set(json.loads((cell / "evaluation.json").read_text())["models"]) == {"base", "sft", "fapm"}
    assert not list(cell.glob("*/hf/*.safetensors*"))
    assert (cell / "sft" / "hf" / "README.md").exists()
    printed = here("compare", config)
    assert "train sft" not in printed
    assert "is gone" not in printed


def test_a_sweep_varies_another_setting(tmp_path, here):
    config = write_config(tmp_path, methods=["sft"], compare={"learning_rates": [], "seeds": []})
    here("sweep", config, "--over", "train.max_steps=1,2")
    cells = {number: tmp_path / "run" / "compare" / f"max_steps={number},seed=0" for number in (1, 2)}
    assert {number: len(metrics(cell / "sft")) for number, cell in cells.items()} == {1: 1, 2: 2}
    found = read_comparison(tmp_path / "run")
    assert (found.over, found.reference) == ("train.max_steps", "sft")
    with pytest.raises(InputError, match="compares values of"):
        add_to_record(make_grid(config))


def test_a_dry_run_counts_and_measures_and_writes_nothing(tmp_path, capsys):
    config = write_config(tmp_path, methods=["sft", "fapm", "raft"])
    assert main(["compare", str(config), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "3 methods, 2 runs of train.learning_rate and train.seed: 6 models, 0 of them trained" in printed
    assert "sft: 4 steps in 2 runs, " in printed
    assert "raft: 4 steps in 2 runs, " in printed
    assert "fapm:" not in printed  # it trains nothing
    assert "compare.keep_models=false" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ("train.temperature", "expected KEY=VALUE,VALUE"),
        ("train.temperature=1", "expected KEY=VALUE,VALUE"),
        ("train.temperature=1,1.0", "allowed: different values"),
        ("train.temperature=1,-1", "train.temperature is -1.0; allowed: above 0"),
        ("train.temperatur=1,2", "temperatur"),
        ("methods=[sft],[raft]", "cannot be varied"),
        ("compare.gain=0.1,0.2", "cannot be varied"),
        ("train.seed=1,2", "cannot be varied"),
    ],
)
def test_bad_sweeps_are_one_line(tmp_path, over, message, capsys):
    config = write_config(tmp_path)
    assert main(["sweep", str(config), "--over", over]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_lists_keep_their_commas(tmp_path):
    config = write_config(tmp_path, compare={"seeds": [0]})
    grid = make_grid(config, [], "train.lora.targets=[q_proj,k_proj],[q_proj]")
    assert [cell.config.train.lora.targets for cell in grid.cells] == [["q_proj", "k_proj"], ["q_proj"]]
    assert len({cell.config.run_dir for cell in grid.cells}) == 2


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        ({"learning_rates": [1e-3, 1e-3]}, "each value once"),
        ({"gain": 0.0}, "above 0"),
        ({"learning_rates": [-1.0]}, "train.learning_rate is -1.0"),
        ({"seeds": [-1]}, "train.seed"),
    ],
)
def test_a_bad_grid_is_one_line(tmp_path, compare, message):
    with pytest.raises(InputError, match=message):
        make_grid(write_config(tmp_path, compare=compare))


# A made-up comparison whose answer is known.

RATES = (1e-5, 3e-5, 1e-4)


def made_up(folder: Path, seeds=(0, 1), methods=("sft", "raft")) -> Path:
    """At rate number p, sft has a gold log-likelihood 0.2 p above the base model's and diverges by 0.1 p; raft as much
    above, and diverges by 0.05 p. Questions and seeds differ by offsets that all models share."""
    run = make_run(folder / "run", methods=())
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "compare: {gain: 0.5}\n", "utf-8")
    base = json.loads((run / "evaluation.json").read_text())["models"]["base"]
    cells = {}
    for seed in seeds:
        for p, rate in enumerate(RATES, start=1):
            name = f"learning_rate={rate:g},seed={seed}"
            cells[name] = {"train.learning_rate": rate, "train.seed": seed}
            cell = make_run(run / "compare" / name, methods=methods, rows=2)
            models = {"base": base}
            for method in methods:
                model = json.loads(json.dumps(base))
                slope = 0.1 if method == "sft" else 0.05
                for answer_ in model["answers"]:
                    answer_["gold_logprob"] += 0.2 * p
                for number, answer_ in enumerate(model["general_answers"]):
                    answer_["divergence"] = slope * p * (1 + 0.1 * (-1) ** number)
                models[method] = model
            (cell / "evaluation.json").write_text(json.dumps({"models": models}), "utf-8")
    record = {"over": "train.learning_rate", "cells": cells}
    (run / "compare" / "cells.json").write_text(json.dumps(record), "utf-8")
    return run


def test_methods_at_equal_quality(tmp_path):
    comparison = read_comparison(made_up(tmp_path))
    found = {(one.domain.key, one.general.key): one for one in yardsticks(comparison)}
    one = found["gold_logprob", "divergence"]
    base = one.base[0]
    assert one.target == pytest.approx(base + 0.5 * 0.6)  # half of what sft gains at the third rate
    standing = {entry.method: entry for entry in one.standings}
    # A gain of 0.3 is one and a half rates' worth: divergences of 0.15 and 0.075.
    assert -standing["sft"].general == pytest.approx(0.15)
    assert -standing["raft"].general == pytest.approx(0.075)
    difference, reached = standing["raft"].difference
    assert difference.estimate == pytest.approx(0.075)
    assert difference.low <= 0.075 <= difference.high
    assert reached > 0.99
    # The mean over the frontier is that of a straight line from 0 to 0.3, and to 0.15.
    assert -standing["sft"].area == pytest.approx(0.15)
    assert -standing["raft"].area == pytest.approx(0.075)
    said = answer(comparison, [one])
    assert "better: 0.0750 nats per token less divergence from the base model" in said
    assert limits(comparison, [one]) == ["2 seeds: intervals over so few are somewhat too narrow."]
    # Where sft gains nothing, as in similarity, there is nothing to compare at.
    flat = found["similarity", "divergence"]
    assert flat.target is None
    assert "gains nothing in similarity" in answer(comparison, [flat])


def test_the_page_of_a_comparison(tmp_path):
    run = made_up(tmp_path)
    page = write_comparison(run).read_text("utf-8")
    assert "better: 0.0750 nats per token less divergence" in page
    assert "<script>alert" not in page
    assert page.count("<svg") >= 6
    assert 'href="compare/learning_rate%3D1e-05%2Cseed%3D0/report.html"' in page
    metrics = (run / "compare" / "learning_rate=0.0001,seed=0" / "raft" / "metrics.jsonl").read_text().splitlines()
    first, last = (
        (line["sft_loss"] / (line["weight"] * line["kl_loss"]))
        for line in map(json.loads, metrics[:: len(metrics) - 1])
    )
    assert f"CE / KL ratio over steps: RAFT from {first:.4g} to {last:.4g}" in page  # the paper's Fig. 2a
    assert 'id="distance-title"' in page
    chosen, how = best_values(read_comparison(run))
    assert [(one.method, one.value) for one in chosen] == [("sft", 1e-4), ("raft", 1e-4)]
    assert "which flatters every method" in how


def test_with_a_dev_split_the_best_value_is_chosen_there(tmp_path):
    run = made_up(tmp_path)
    for path in run.glob("compare/*/raft/metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[-1]["dev_gold_logprob"] = -1.0 if "3e-05" in str(path) else -2.0
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    chosen, how = best_values(read_comparison(run))
    assert {one.method: one.value for one in chosen} == {"sft": 1e-4, "raft": 3e-5}
    assert "dev split" in how


def test_cells_that_are_missing_or_incomplete_are_left_out_and_said(tmp_path):
    run = made_up(tmp_path)
    shutil.rmtree(run / "compare" / "learning_rate=0.0001,seed=1")
    comparison = read_comparison(run)
    (one, *_) = yardsticks(comparison)
    assert all(frontier.values == RATES[:2] for frontier in one.frontiers)
    assert any("1 runs are still missing" in line for line in limits(comparison, [one]))
    (run / "compare" / "learning_rate=1e-05,seed=0" / "evaluation.json").write_text("{")
    with pytest.raises(InputError, match="a cell of the comparison"):
        read_comparison(run)


def test_a_folder_without_a_comparison_has_no_page(tmp_path):
    run = make_run(tmp_path / "run")
    assert read_record(run) is None
    assert write_comparison(run) is None
    assert not RunFolder(run).comparison_html.exists()
    assert load_config(tiny.write_run(tmp_path / "tiny")).compare.learning_rates == []
