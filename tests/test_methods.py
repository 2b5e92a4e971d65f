"""Runs of the methods beside the paper's: what each starts from, what it leaves on disk, what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
import tiny
from safetensors.numpy import load_file

from raft_jax.cli import main
from raft_jax.config_file import load_config
from raft_jax.dev import dev_rows
from raft_jax.errors import InputError
from raft_jax.methods import METHODS
from raft_jax.metrics import read_metrics
from raft_jax.models import Model
from raft_jax.models.export import export_hf
from raft_jax.stages import changes, plan


def weights(folder: Path, name: str) -> dict[str, np.ndarray]:
    return load_file(folder / "run" / name / "hf/model.safetensors")


@pytest.fixture(scope="module")
def anchored(tmp_path_factory) -> Path:
    """A trained run of SFT and the methods that are near it."""
    folder = tmp_path_factory.mktemp("anchored")
    config = tiny.write_run(folder, methods=["fapm", "sft_kl", "asft", "sft"], train={"max_steps": 2})
    assert main(["train", str(config)]) == 0
    return folder


def test_anchored_methods_start_as_sft_does(anchored):
    found = {name: read_metrics(anchored / "run" / name / "metrics.jsonl") for name in ("sft", "sft_kl", "asft")}
    first = {name: lines[0] for name, lines in found.items()}
    # The student is still the base model.
    assert first["sft_kl"]["sft_loss"] == pytest.approx(first["sft"]["sft_loss"], rel=1e-5)
    assert all(abs(first[name]["anchor_loss"]) < 1e-6 < found[name][1]["anchor_loss"] for name in ("sft_kl", "asft"))
    assert 0 < first["asft"]["dft_loss"] < first["sft"]["sft_loss"] and first["asft"]["answer_nll"] > 0
    second = found["sft_kl"][1]
    assert second["loss"] == pytest.approx(second["sft_loss"] + 0.1 * second["anchor_loss"], rel=1e-5)
    assert all("kl_loss" not in line and line["rollout_seconds"] == 0 for lines in found.values() for line in lines)


def test_fapm_prunes_what_sft_exported(anchored):
    base, sft, pruned = (
        load_file(anchored / "model/model.safetensors"),
        weights(anchored, "sft"),
        weights(anchored, "fapm"),
    )
    assert not (anchored / "run/fapm/metrics.jsonl").exists()
    for name, matrix in pruned.items():
        if matrix.ndim < 2:
            np.testing.assert_array_equal(matrix, sft[name])
            continue
        expected = numpy_reference.fapm(*(one[name].astype(np.float64) for one in (sft, base)), 0.9)
        # Scores in float32 may swap entries that are equal but for rounding.
        assert np.mean(matrix != expected.astype(np.float32)) < 2e-3, name
        changed = np.mean(matrix != base[name])
        assert 0.05 < changed <= 0.1 + 1 / matrix.size, name


def test_another_sparsity_makes_fapm_again_and_nothing_else(anchored, capsys):
    before = weights(anchored, "sft"), weights(anchored, "fapm")
    config = str(anchored / "config.yaml")
    assert main(["train", config, "methods=[fapm]", "fapm.sparsity=0.5"]) == 0
    assert "training and exporting again: fapm (fapm.sparsity: 0.9 → 0.5)" in capsys.readouterr().out
    name = "model.layers.0.mlp.up_proj.weight"
    assert np.array_equal(weights(anchored, "sft")[name], before[0][name])
    base = load_file(anchored / "model/model.safetensors")[name]
    assert np.mean(weights(anchored, "fapm")[name] != base) > 2 * np.mean(before[1][name] != base)
    card = (anchored / "run/fapm/hf/README.md").read_text("utf-8")
    assert METHODS["fapm"].title in card and "0.5 of each matrix reset" in card
    recorded = json.loads((anchored / "run/results.json").read_text())
    assert recorded["export fapm"]["fapm.sparsity"] == 0.5 and "fapm.sparsity" not in recorded["export sft"]
    assert "0.1 times, on the answers' tokens" in (anchored / "run/asft/hf/README.md").read_text("utf-8")


def test_fapm_without_sft_is_refused(tmp_path, capsys):
    config = str(tiny.write_run(tmp_path, methods=["fapm"]))
    words = "methods: fapm prunes what sft trained, and .* holds no sft of this config; add sft to methods"
    for verb in ("check", "train"):
        assert main([verb, config]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and re.search(words, message)


def test_whether_the_teacher_sees_the_answer_is_a_setting(tmp_path):
    path = tiny.write_run(tmp_path, methods=["raft", "on_policy", "sft"])
    found = {}
    for value in ("null", "true", "false"):
        methods = load_config(path, [f"train.teacher_sees_answer={value}"]).compared_methods
        found[value] = {method.name: (method.teacher_sees_answer, method.constant_weight(None)) for method in methods}
        assert [method.constant_weight(0.1) for method in methods] == [0.1] * 3
    # λ is 1 where the teacher sees no more than the student, and balanced where it does.
    assert found["null"] == {"raft": (True, None), "on_policy": (False, 1.0), "sft": (False, 1.0)}
    assert found["true"]["on_policy"] == found["null"]["raft"] and found["true"]["sft"] == found["null"]["sft"]
    assert found["false"]["raft"] == found["null"]["on_policy"]


def test_a_folder_of_before_a_setting_has_its_former_value():
    now = {"train.learning_rate": 1.0, "train.kl": "forward", "refine.rewriter": "student", "data.path": "x"}
    assert changes({"train.learning_rate": 1.0, "data.path": "x"}, now) == {}
    assert changes({"train.learning_rate": 1.0}, {**now, "train.kl": "reverse"}) == {
        "train.kl": "train.kl: forward → reverse"
    }
    assert changes({"data.path": "x"}, {**now, "train.kl": "reverse"}) == {}  # a result that no training is part of


def test_more_epochs_extend_a_constant_rate_only():
    settings = {"train.epochs": 1.0, "train.learning_rate": 1.0}
    longer = {**settings, "train.epochs": 2.0}
    assert plan("here", {"export sft": settings}, {"export sft": longer}).stale == {
        "export sft": {"train.epochs": "train.epochs: 1.0 → 2.0"}
    }
    decaying = {"train.schedule": "cosine"}
    with pytest.raises(InputError, match=r"another config \(train.epochs: 1.0 → 2.0\); change that back"):
        plan("here", {"export sft": settings | decaying}, {"export sft": longer | decaying})


# --- a student that starts as another model ---


def test_a_model_that_forgot_is_repaired_towards_the_base_model(anchored, tmp_path, capsys):
    start = str(anchored / "run/sft/hf")
    train = {"student_init": start, "max_steps": 8, "epochs": 4.0, "top_k": None}
    config = str(tiny.write_run(tmp_path, methods=["repair"], train=train))
    assert main(["check", config]) == 0 and main(["train", config]) == 0
    lines = read_metrics(tmp_path / "run/repair/metrics.jsonl")
    assert "sft_loss" not in lines[0] and "sft_tokens" not in lines[0] and lines[0]["loss"] == lines[0]["kl_loss"]
    assert np.mean([line["kl_loss"] for line in lines[-4:]]) < lines[0]["kl_loss"] and lines[0]["kl_loss"] > 1e-4
    base, forgot = (
        load_file(path) for path in (tmp_path / "model/model.safetensors", Path(start) / "model.safetensors")
    )
    assert all((value != forgot[name]).any() for name, value in weights(tmp_path, "repair").items())
    card = (tmp_path / "run/repair/hf/README.md").read_text("utf-8")
    assert f"| started from | `{start}` |" in card and "whole vocabulary" in card and base.keys() == forgot.keys()
    # The start is a setting that the result depends on.
    assert main(["train", config, f"train.student_init={tmp_path / 'model'}"]) == 2
    assert f"train.student_init: {start} → {tmp_path / 'model'}" in capsys.readouterr().err


def test_without_steps_to_speak_of_the_student_is_what_it_started_as(anchored, tmp_path):
    """The first step's loss is that of the start, not of the base model."""
    train = {"student_init": str(anchored / "run/sft/hf"), "max_steps": 1}
    assert main(["train", str(tiny.write_run(tmp_path, methods=["sft"], train=train))]) == 0
    first = read_metrics(tmp_path / "run/sft/metrics.jsonl")[0]
    before = read_metrics(anchored / "run/sft/metrics.jsonl")[0]
    assert first["sft_loss"] < before["sft_loss"] - 0.01


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 64}, "has width 64, and model.source has 32; it must be a model that was tuned from model.source"),
        ({"rope_theta": 500.0}, "has ropes .* and model.source has .*; it must be"),
        ({"vocabulary": True}, "the tokenizer of .* is not that of model.source"),
        (None, "train.student_init: .*none-such"),
    ],
)
def test_a_start_of_another_kind_is_refused(tmp_path, capsys, changes, words):
    other = tmp_path / "none-such"
    if changes is not None:
        model = tiny.make_model()
        config = model.config
        if changes.get("width"):
            config = tiny.make_config(config.vocab_size, width=64)
        hf_config = model.hf_config | {"hidden_size": config.width, "rope_theta": changes.get("rope_theta", 10_000.0)}
        tokenizer = model.tokenizer
        if "vocabulary" in changes:
            tokenizer = tiny.wrapped(tokenizer.backend, eos_token="<|endoftext|>")
        params = {name: jnp.asarray(array) for name, array in tiny.random_parameters(config, 0).items()}
        export_hf(Model(config, params, tokenizer, hf_config), params, tmp_path / "other", dtype=np.float32)
        other = tmp_path / "other"
    config = str(tiny.write_run(tmp_path, methods=["sft"], train={"student_init": str(other)}))
    for verb in ("check", "train"):
        assert main([verb, config]) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and re.search(words, message), message


# --- scores during training ---


def test_scores_during_training_are_those_of_the_evaluation(tmp_path, capsys):
    """Dev rows that are copies of the held-out rows: the last step's scores are the finished model's."""
    config = str(tiny.write_run(tmp_path, methods=["sft"], train={"max_steps": 3, "eval_every": 2}))
    copies = [{**row, "id": "d" + row["id"], "split": "validation"} for row in tiny.ROWS if row["split"] == "test"]
    for verb in ("check", "run"):
        assert main([verb, config]) == 2
        words = "has no rows of the split dev or validation or val (splits there: test, train); add some"
        assert words in capsys.readouterr().err
    tiny.write_jsonl(tmp_path / "data.jsonl", tiny.ROWS + copies)
    assert main(["run", config, "data.dev_split=test"]) == 2 and "use another split" in capsys.readouterr().err
    assert main(["check", config]) == 0 and "dev rows, for train.eval_every: 4" in capsys.readouterr().out
    assert main(["run", config]) == 0
    lines = read_metrics(tmp_path / "run/sft/metrics.jsonl")
    assert [line["step"] for line in lines if "dev_divergence" in line] == [2, 3]
    scores = json.loads((tmp_path / "run/evaluation.json").read_text())["models"]["sft"]
    assert lines[-1]["dev_gold_logprob"] == pytest.approx(scores["domain"]["gold_logprob"]["mean"], rel=1e-4)
    assert lines[-1]["dev_divergence"] == pytest.approx(scores["general"]["divergence"]["mean"], rel=1e-3)
    assert lines[-1]["dev_divergence"] > lines[1]["dev_divergence"] > 0
    # It does not change what is trained, and so it may be changed.
    assert main(["run", config, "train.eval_every=0"]) == 0
    assert main(["check", config, "data.max_dev=3"]) == 0
    assert "dev rows, for train.eval_every: 3" in capsys.readouterr().out
    assert main(["run", config, "data.max_dev=3"]) == 0
    assert main(["check", config, "data.max_dev=0"]) == 2
    assert "data.max_dev" in capsys.readouterr().err


def test_dev_rows_have_their_system_turn_as_other_rows_do(tmp_path):
    path = tiny.write_run(tmp_path, methods=["sft"], train={"eval_every": 1})
    rows = [{**row, "instructions": "Be brief.", "split": "dev"} for row in tiny.ROWS[:2]]
    tiny.write_jsonl(tmp_path / "data.jsonl", tiny.ROWS + [{**row, "id": "d" + row["id"]} for row in rows])
    found = dev_rows(load_config(path, ["data.system=instructions"]), tiny.make_tokenizer())
    assert [(row.id, row.turns) for row in found] == [
        ("dq01", (("system", "Be brief."),)),
        ("dq02", (("system", "Be brief."),)),
    ]


def test_the_best_step_is_exported(tmp_path):
    """Far too fast, so that the last step is not the best; the same run stopped there has the same weights."""
    train = {"learning_rate": 0.03, "eval_every": 1, "keep_best": True, "checkpoint_every": 100}
    copies = [{**row, "id": "d" + row["id"], "split": "dev"} for row in tiny.ROWS if row["split"] == "test"]
    (tmp_path / "best").mkdir(), (tmp_path / "short").mkdir()
    config = str(tiny.write_run(tmp_path / "best", methods=["sft"], train=train))
    tiny.write_jsonl(tmp_path / "best/data.jsonl", tiny.ROWS + copies)
    assert main(["train", config]) == 0
    scores = [line["dev_gold_logprob"] for line in read_metrics(tmp_path / "best/run/sft/metrics.jsonl")]
    best = int(np.argmax(scores)) + 1
    assert 1 < best < len(scores) == 6 and not (tmp_path / "best/run/sft/best").exists()
    train = {"learning_rate": 0.03, "max_steps": best}
    assert main(["train", str(tiny.write_run(tmp_path / "short", methods=["sft"], train=train))]) == 0
    expected = weights(tmp_path / "short", "sft")
    for name, value in weights(tmp_path / "best", "sft").items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
