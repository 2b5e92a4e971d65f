"""A whole run of every method on a tiny model: what it leaves behind, and what it does when it is started again."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from made_up_run import scores
from safetensors.numpy import load_file

from raft_jax.cli import main
from raft_jax.config_file import load_config
from raft_jax.data.examples import Example, sampling_order
from raft_jax.data.prompts import fusion_prompt, question_prompt, rewrite_prompt, teacher_prompt
from raft_jax.data.refined import RefinedRow, load_refined
from raft_jax.data.tokenize import token_rows
from raft_jax.errors import InputError
from raft_jax.lengths import fitting
from raft_jax.methods import METHODS
from raft_jax.refine.generate import task_prompt
from raft_jax.resume import open_run_folder
from raft_jax.run import Run
from raft_jax.run_data import read_data
from raft_jax.run_folder import RunFolder

TIMES = ("seconds", "rollout_seconds", "tokens_per_second")
SECRET = "hf_canaryInTheEnvironment"


COMPARED = ("raft", "sft", "sdft", "fused_sft", "on_policy")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, program_environment) -> tuple[Path, str]:
    """A folder with a finished run of the paper's methods that are trained, and what the run printed."""
    folder = tmp_path_factory.mktemp("finished")
    train = {"max_steps": 2, "checkpoint_every": 1, "keep_finished": True}
    config = tiny.write_run(folder, methods=list(COMPARED), train=train)
    done = subprocess.run(
        [sys.executable, "-m", "raft_jax", "run", str(config)],
        env=program_environment | {"HF_TOKEN": SECRET},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return folder, done.stdout


@pytest.fixture
def command(capsys, monkeypatch):
    """`command(*arguments)`: what the program prints, run in this process, which has imported and compiled the most."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 0
        return "".join(capsys.readouterr())

    return run


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A copy of the finished run, to be spoilt."""
    folder = tmp_path / "copy"
    shutil.copytree(finished[0] / "run", folder / "run")
    for name in ("data.jsonl", "general.jsonl"):
        shutil.copy(finished[0] / name, folder / name)
    for name in ("config.yaml", "run/config.yaml", "run/results.json", "run/evaluation.json"):
        text = (finished[0] / name).read_text()
        for moved in ("run", "data.jsonl", "general.jsonl"):
            text = text.replace(str(finished[0] / moved), str(folder / moved))
        (folder / name).write_text(text)
    return folder


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def metrics(folder: Path, name: str) -> list[dict]:
    found = lines(folder / "run" / name / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMES} for line in found]


def files(run_dir: Path) -> dict[str, int]:
    """When each file was last written, but for those that are written at every start."""
    return {
        str(path.relative_to(run_dir)): path.stat().st_mtime_ns
        for path in run_dir.rglob("*")
        if path.is_file() and path.name not in ("config.yaml", "report.html", "run.lock")
    }


def test_the_rows_have_their_history(finished):
    folder, _ = finished
    rows = load_refined(folder / "run" / "refined")
    assert [row.id for row in rows] == [row["id"] for row in tiny.ROWS if row["split"] == "train"]
    # The tiny model is random, but what it writes is fixed: there is something of everything.
    assert {row.chosen for row in rows} == {"fusion", "gold"}
    assert {"ok", "truncated"} <= {row.rewrite_status for row in rows}
    for row in rows:
        gold = next(given["answer"] for given in tiny.ROWS if given["id"] == row.id)
        assert row.gold == gold and row.reason.endswith(".")
        assert row.accepted == (row.rewrite_status == "ok" and row.similarity >= 0.5) == bool(row.rounds)
        if row.chosen == "gold":
            assert row.answer == gold and row.chosen_round is None
        else:
            won = row.rounds[row.chosen_round - 1]
            assert row.answer == won.candidate and won.status == "ok"
            assert won.mean == max(found.mean for found in row.rounds if found.mean is not None)
            assert won.scores.keys() == {"likelihood"} and won.mean >= row.gold_mean
    ledger = lines(folder / "run" / "refined" / "ledger.jsonl")
    assert len({(record["stage"], record["key"]) for record in ledger}) == len(ledger)


def test_every_method_trains_on_its_own_targets(finished):
    folder, _ = finished
    found = {name: metrics(folder, name) for name in COMPARED}
    first = {name: steps[0]["sft_loss"] for name, steps in found.items()}
    assert all([line["step"] for line in steps] == [1, 2] for steps in found.values())
    # All start from the same weights, on the same rows: equal targets give equal losses.
    assert first["sft"] == pytest.approx(first["on_policy"], rel=1e-5)
    assert first["fused_sft"] == pytest.approx(first["raft"], rel=1e-5)
    assert len({round(first[name], 4) for name in ("sft", "sdft", "fused_sft")}) == 3
    for name, steps in found.items():
        assert all(("kl_loss" in line) == METHODS[name].distils for line in steps)
    # A teacher that sees what the student sees says the same as long as the student has learned nothing.
    assert found["on_policy"][0]["kl_loss"] < 1e-6 < 1e-4 < found["raft"][0]["kl_loss"]
    assert found["on_policy"][1]["kl_loss"] > found["on_policy"][0]["kl_loss"]
    assert all(line["weight"] == 1 for line in found["on_policy"]) and found["raft"][0]["weight"] != 1


def test_every_model_has_its_marks(finished):
    folder, _ = finished
    models = json.loads((folder / "run" / "evaluation.json").read_text())["models"]
    assert list(models) == ["base", *COMPARED]
    for name, marks in models.items():
        is_base = name == "base"
        assert (marks["general"]["divergence"]["mean"] == 0) == (marks["weight_distance"]["mean"] == 0) == is_base
        assert marks["general"]["divergence"]["count"] == 3 and marks["general"]["accuracy"]["count"] == 2
        assert [entry["id"] for entry in marks["answers"]] == ["q03", "q07", "q11", "q15"]
        assert len(marks["weight_distance"]["layers"]) == 2 and marks["domain"]["gold_logprob"]["mean"] < 0
    assert len({marks["domain"]["gold_logprob"]["mean"] for marks in models.values()}) == len(models)


def test_every_model_is_exported(finished):
    folder, _ = finished
    base = load_file(folder / "model" / "model.safetensors")
    for name in COMPARED:
        hf = folder / "run" / name / "hf"
        tuned = load_file(hf / "model.safetensors")
        assert tuned.keys() == base.keys() and any((tuned[key] != base[key]).any() for key in base)
        assert {"config.json", "tokenizer.json", "chat_template.jinja", "README.md"} <= {p.name for p in hf.iterdir()}
        assert not hf.with_name("hf.partial").exists()


def test_no_secret_of_the_environment_is_kept(finished):
    folder, output = finished
    holding = [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert not holding and SECRET not in output


def test_the_log_is_plain_and_ends_with_the_table(finished):
    folder, output = finished
    assert "\x1b" not in output and "\r" not in output and "Traceback" not in output
    for title in ("rewrite", "fuse, round 1", *(f"train {name}" for name in COMPARED)):
        assert re.search(rf"^{title}: 0/\d+ (rows|steps)$", output, re.MULTILINE), title
        assert re.search(rf"^{title}: (\d+)/\1 (rows|steps), [\d.]+/s", output, re.MULTILINE), title
    told = r"^refined 12 rows: \d+ have a fused answer, \d+ keep the gold one\n  rewritings: \d+ accepted, .*\d"
    assert re.search(told, output, re.MULTILINE)
    for words in ("Learned and forgotten", "\nTraining\n", "base", "RAFT", "SDFT", str(folder / "run/report.html")):
        assert words in output
    stages = lines(folder / "run" / "timings.jsonl")
    assert len({(line["stage"], line["method"]) for line in stages}) == len(stages) == 1 + 2 * 5 + 6
    assert all(line["seconds"] > 0 for line in stages)


def test_a_finished_run_has_nothing_left_to_do(copy):
    before = files(copy / "run")
    assert main(["run", str(copy / "config.yaml")]) == 0
    assert files(copy / "run") == before


def test_a_moved_run_goes_on_but_a_changed_one_is_refused(copy, capsys):
    before = files(copy / "run")
    moved = copy / "elsewhere"
    (copy / "run").rename(moved)
    config = copy / "config.yaml"
    assert main(["run", str(config), f"run_dir={moved}"]) == 0
    capsys.readouterr()
    assert main(["run", str(config), f"run_dir={moved}", "train.learning_rate=0.5", "refine.rounds=7"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and str(moved) in message
    assert "refine.rounds: 2 → 7; train.learning_rate: 0.001 → 0.5" in message and "run_dir to a new folder" in message
    with (copy / "data.jsonl").open("a") as file:
        file.write("\n")
    assert main(["run", str(config), f"run_dir={moved}"]) == 2
    message = capsys.readouterr().err
    assert f"(data.path: {copy / 'data.jsonl'} has changed since); change that back" in message
    assert message.count("\n") == 1
    assert files(moved) == before


def test_rows_that_nothing_is_trained_on_are_refined_again_where_settings_changed(copy, capsys):
    run, config = copy / "run", str(copy / "config.yaml")
    for name in (*COMPARED, "evaluation.json"):
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    rows, ledger = load_refined(run / "refined"), (run / "refined/ledger.jsonl").read_bytes()
    assert main(["refine", config, "refine.accept_floor=1.0"]) == 0
    output = capsys.readouterr().out
    assert "refining again, but for what the ledger has of it (refine.accept_floor: 0.0 → 1.0)" in output
    again = load_refined(run / "refined")
    assert [row.rewrite for row in again] == [row.rewrite for row in rows]
    assert all(row.chosen == "gold" or row.rounds[row.chosen_round - 1].mean == 1.0 for row in again)
    assert (run / "refined/ledger.jsonl").read_bytes().startswith(ledger)
    # Other texts under the same ids are refined, too; the published rows of the first ones are not taken for them.
    data = [{**row, "answer": row["answer"] + " Indeed."} for row in lines(copy / "data.jsonl")]
    tiny.write_jsonl(copy / "data.jsonl", data)
    assert main(["refine", config, "refine.accept_floor=1.0"]) == 0
    assert "made from other texts" in capsys.readouterr().out
    assert all(row.gold.endswith(" Indeed.") for row in load_refined(run / "refined"))


def test_a_damaged_data_set_comes_back_from_the_ledger(copy, capsys):
    path, ledger = copy / "run/refined/refined.jsonl", copy / "run/refined/ledger.jsonl"
    whole, recorded = path.read_bytes(), ledger.read_bytes()
    path.write_bytes(whole[:-40])
    assert main(["refine", str(copy / "config.yaml")]) == 0
    assert "refined.jsonl: expected" in capsys.readouterr().out
    assert path.read_bytes() == whole and ledger.read_bytes() == recorded
    assert len(lines(copy / "run/timings.jsonl")) == 17


def test_a_model_card_says_what_it_is_and_how_good(finished):
    run = finished[0] / "run"
    marks = json.loads((run / "evaluation.json").read_text("utf-8"))["models"]
    for name in COMPARED:
        card = (run / name / "hf/README.md").read_text("utf-8")
        assert f"# {METHODS[name].title}\n" in card and "12 rows of" in card and "| learning rate | 0.001 |" in card
        assert ("distillation" in card) == METHODS[name].distils
        for key in ("base", name):
            for part, score in (("domain", "similarity"), ("general", "divergence")):
                assert f"{marks[key][part][score]['mean']:.3f} ±" in card


def test_an_export_that_was_interrupted_is_made_again_without_training(copy):
    hf = copy / "run/sft/hf"
    weights, steps = (hf / "model.safetensors").read_bytes(), (copy / "run/sft/metrics.jsonl").read_bytes()
    hf.rename(hf.with_name("hf.partial"))
    assert main(["export", str(copy / "config.yaml")]) == 0
    assert (hf / "model.safetensors").read_bytes() == weights
    assert (copy / "run/sft/metrics.jsonl").read_bytes() == steps
    assert len(lines(copy / "run/timings.jsonl")) == 17


def test_a_model_just_trained_is_evaluated_without_reading_it_back(copy, monkeypatch):
    shutil.rmtree(copy / "run/sft/hf")
    config = load_config(copy / "config.yaml", ["methods=[sft]", "export.dtype=bfloat16"])  # which rounds
    run = Run(config, RunFolder(copy / "run"))
    run.train(keep=True)
    read = Run(run.config, run.folder)._params_of("sft")
    with monkeypatch.context() as patch:
        patch.setattr("raft_jax.run.load_pretrained", None)
        held = run._params_of("sft")
    jax.tree.map(np.testing.assert_array_equal, held, read)
    for name, array in held.items():
        assert (array.dtype, array.sharding) == (read[name].dtype, read[name].sharding)
    assert run._just_trained == {}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_export_is_to_be_made_again(copy, name):
    """One flipped bit is enough: what is evaluated is what was trained."""
    path = copy / "run/sft/hf" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    run = Run(load_config(copy / "config.yaml"), RunFolder(copy / "run"))
    words = rf"^{path}: damaged, .* \(remove {path.parent}, and the same command exports it again\)$"
    with pytest.raises(InputError, match=words):
        run._params_of("sft")
    path.unlink()
    with pytest.raises(InputError, match=f"^{path}: is gone"):
        run._params_of("sft")


def test_a_finished_run_is_extended_and_measured_again(copy, command):
    """More steps go on from the last checkpoint; what does not depend on the change stays as it is."""
    before, evaluation = files(copy / "run"), copy / "run/evaluation.json"
    old, first = json.loads(evaluation.read_text()), metrics(copy, "sft")
    output = command("run", copy / "config.yaml", "methods=[sft]", "train.max_steps=3", "evaluate.max_new_tokens=6")
    assert "training and exporting again: sft (train.max_steps: 2 → 3)" in output
    assert "evaluating again: base, sft (evaluate.max_new_tokens: 8 → 6; train.max_steps: 2 → 3)" in output
    assert "without fused_sft, on_policy, raft, sdft from here on" in output and "train sft: 2/3 steps" in output
    new = json.loads(evaluation.read_text())
    assert list(new["models"]) == ["base", "sft"] and not evaluation.with_name("evaluation.new.json").exists()
    assert new["settings"]["base"]["evaluate.max_new_tokens"] == 6
    assert new["models"]["base"]["tokens"] < old["models"]["base"]["tokens"]
    assert new["models"]["sft"]["weight_distance"] != old["models"]["sft"]["weight_distance"]
    changed = {name for name, time in files(copy / "run").items() if before.get(name) != time}
    assert {name.partition("/")[0] for name in changed} == {"sft", "evaluation.json", "timings.jsonl", "results.json"}
    assert [line["step"] for line in metrics(copy, "sft")] == [1, 2, 3] and metrics(copy, "sft")[:2] == first
    again = command("run", copy / "config.yaml", "methods=[sft]", "train.max_steps=3", "evaluate.max_new_tokens=6")
    assert not re.search("(evaluating|exporting|refining) again", again) and json.loads(evaluation.read_text()) == new


def test_an_evaluation_that_was_interrupted_is_completed(copy, command):
    path = copy / "run/evaluation.json"
    whole = json.loads(path.read_text())
    kept = {name: marks for name, marks in whole["models"].items() if name in ("base", "raft")}
    path.write_text(json.dumps({**whole, "models": kept}))
    command("evaluate", copy / "config.yaml")
    assert json.loads(path.read_text())["models"] == whole["models"]


def test_a_model_card_without_its_scores_gets_them(copy):
    """As a run leaves it that was killed between the marks and the card."""
    path = copy / "run/sft/hf/README.md"
    whole = path.read_text("utf-8")
    before, score, after = whole.partition("| score |")
    path.write_text(before)
    assert main(["evaluate", str(copy / "config.yaml")]) == 0
    found = path.read_text("utf-8").partition("| score |")
    assert score and found[1:] == (score, after)


def test_base_and_tuned_model_answer_side_by_side(finished, command):
    folder, _ = finished
    question = tiny.ROWS[0]["question"]
    models = ("--model", folder / "model", "--model", folder / "run/raft/hf")
    output = command("generate", question, *models, "--max-new-tokens", 5)
    assert len(output.splitlines()[-1]) <= 80 and "─ " in output and "…" in output
    of_the_run = command("generate", folder / "config.yaml", question, "--max-new-tokens", 5, "methods=[raft]")
    assert re.findall(r"─ (\S+) ─", of_the_run) == ["base", "RAFT"]
    assert re.sub(r"─ .*? ─", "", of_the_run).split("\n")[1:] == re.sub(r"─ .*? ─", "", output).split("\n")[1:]


# --- the parts ---

ROWS = [
    dataclasses.replace(
        RefinedRow.unrefined(example, "Because."),
        rewrite=f"rewritten {example.id}",
        rewrite_status="ok",
        similarity=0.5,
        accepted=accepted,
        answer=answer,
    )
    for example, accepted, answer in (
        (Example("a", "Why?", "gold a"), True, "fused a"),
        (
            Example(
                "b",
                "Who?",
                "gold b",
                "It is Monday.",
                (("system", "Be brief."), ("user", "When?"), ("assistant", "Soon.")),
            ),
            False,
            "gold b",
        ),
    )
]
TARGETS = {
    "raft": ("fused a", "gold b"),
    "raft_unfused": ("rewritten a", "gold b"),
    "sft": ("gold a", "gold b"),
    "sdft": ("rewritten a", "gold b"),
    "fused_sft": ("fused a", "gold b"),
    "on_policy": ("gold a", "gold b"),
    "sft_kl": ("gold a", "gold b"),
    "asft": ("gold a", "gold b"),
    "fapm": ("gold a", "gold b"),
    "repair": (None, None),
}


@pytest.mark.parametrize("name", METHODS)
def test_targets_and_teacher_prompts_of_each_method(name):
    tokenizer, method = tiny.make_tokenizer(), METHODS[name]
    made = token_rows(ROWS, tokenizer, method)
    asked = ["Why?", "It is Monday.\n\nWho?"]
    before = [
        "",
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhen?<|im_end|>\n<|im_start|>assistant\n"
        "Soon.<|im_end|>\n",
    ]
    for row, earlier, question, target in zip(made, before, asked, TARGETS[name], strict=True):

        def text(ids):
            return tokenizer.token_text(ids)

        prompt = f"{earlier}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        assert text(row.prompt) == prompt and text(row.answer) == (f"{target}<|im_end|>" if target else "")
        if name in ("raft", "raft_unfused"):  # reference knowledge, then the question, then the answer begins
            told = text(row.teacher_prompt)
            assert told.startswith(earlier + "<|im_start|>user\nBackground")
            assert told.index(target) < told.index(question)
            assert told.endswith(f"{question}<|im_end|>\n<|im_start|>assistant\n")
        else:
            assert text(row.teacher_prompt) == (prompt if name in ("on_policy", "repair") else "")
    assert [row.number for row in made] == [0, 1]


def test_every_prompt_has_what_the_question_hangs_on():
    context = "It is Monday."
    for asked in (
        question_prompt("Who?", context),
        teacher_prompt("Who?", "He.", context),
        rewrite_prompt("He.", "Who?", context),
        fusion_prompt("He.", "It was he.", "Who?", context),
    ):
        assert asked[-1]["role"] == "user" and f"{context}\n\nWho?" in asked[0]["content"]
        assert len(asked) == (2 if asked[0]["role"] == "system" else 1)


def test_every_prompt_has_the_turns_before_the_question():
    turns = (("system", "Be brief."), ("user", "Hello."), ("assistant", "Hello."))
    for asked in (question_prompt("Who?", "", turns), teacher_prompt("Who?", "He.", "", turns)):
        assert [(turn["role"], turn["content"]) for turn in asked[:3]] == list(turns) and len(asked) == 4
    for asked in (rewrite_prompt("He.", "", "", turns), fusion_prompt("He.", "It was he.", "Who?", "", turns)):
        assert [turn["role"] for turn in asked] == ["system", "user", "assistant", "user"]
        assert asked[0]["content"].startswith("Be brief.\n\n") and asked[3]["content"].startswith("He.")
        assert [turn["content"] for turn in asked[1:3]] == ["Hello.", "Hello."]


TEMPLATES = {
    "takes": "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}",
    "refuses": "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}",
    "drops": "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_task_reaches_the_model_whatever_its_template_does_with_a_system_turn(template):
    tokenizer = tiny.wrapped(tiny.make_tokenizer().backend, chat_template=TEMPLATES[template])
    text = tokenizer.decode(task_prompt(tokenizer, rewrite_prompt("He.")))
    system, user = (message["content"] for message in rewrite_prompt("He."))
    assert text == (f"<system>{system}<user>{user}" if template == "takes" else f"<user>{system}\n\n{user}")


def test_what_does_not_fit_is_left_out_and_never_cut(tmp_path):
    tokenizer = tiny.make_tokenizer()
    config = load_config(
        tiny.write_run(
            tmp_path, data={"max_question_tokens": 8, "max_answer_tokens": 12}, refine={"max_new_tokens": 12}
        )
    )
    examples = [
        Example("fits", "Why?", "So."),
        Example("question", "Why " * 9, "So."),
        Example("answer", "Why?", "So " * 20),
        Example("context", "Why?", "So.", context="On Monday " * 9),
        Example("also", "Who?", "He."),
        Example("late", "Who?", "She."),
        Example("turns", "Why?", "So.", turns=(("system", "On Monday " * 9),)),
    ]
    found = fitting(examples, tokenizer, config, None)
    assert [example.id for example in found.kept] == ["fits", "also", "late"]
    assert {key: why.rsplit(" of ")[0] for key, why in found.too_long.items()} == {
        "question": "question",
        "answer": "answer",
        "context": "question",
        "turns": "question",
    }
    assert all(int(re.search(r"of (\d+) tokens", why)[1]) > 8 for why in found.too_long.values())
    assert found.lengths.keys() == {example.id for example in examples}
    order = [example.id for example in sampling_order(examples) if example.id in ("fits", "also", "late")]
    found = fitting(examples, tokenizer, config, 2)  # a sample of those that fit, in the order of the file
    assert [example.id for example in found.kept] == [id for id in ("fits", "also", "late") if id in order[:2]]


def test_rows_are_held_out_where_the_file_has_no_split(tmp_path):
    path = tiny.write_run(tmp_path)
    config = load_config(path)
    train, test, *_ = read_data(config)
    assert (len(train), len(test)) == (12, 4)
    tiny.write_jsonl(tmp_path / "data.jsonl", [{k: v for k, v in row.items() if k != "split"} for row in tiny.ROWS])
    train, test, *_ = read_data(load_config(path, ["data.held_out=5"]))
    assert (len(train), len(test)) == (11, 5) and not {row.id for row in train} & {row.id for row in test}
    # Runs of two seeds are measured on the same rows; other rows are chosen by a seed of the data's own.
    assert read_data(load_config(path, ["data.held_out=5", "seed=7"]))[:2] == (train, test)
    assert read_data(load_config(path, ["data.held_out=5", "data.seed=7"]))[1] != test


def test_a_folder_is_bound_by_results_not_by_tries(tmp_path):
    path = tiny.write_run(tmp_path)
    with open_run_folder(load_config(path)):
        pass
    tiny.write_jsonl(tmp_path / "data.jsonl", tiny.ROWS[:-1])
    other = load_config(path, ["seed=3"])
    with open_run_folder(other) as folder:  # nothing was computed: config and data may still change
        assert load_config(folder.path / "config.yaml") == other
        with pytest.raises(InputError, match="another process is running"), open_run_folder(other):
            pass
        for name in ("refined", "raft"):
            (folder.path / name).mkdir()
    with open_run_folder(other):
        pass
    with pytest.raises(InputError, match="seed: 3 → 4"), open_run_folder(load_config(path, ["seed=4"])):
        pass
    tiny.write_jsonl(tmp_path / "data.jsonl", tiny.ROWS)
    with pytest.raises(InputError, match=r"data\.path: .*data\.jsonl has changed since"), open_run_folder(other):
        pass
    tiny.write_jsonl(tmp_path / "data.jsonl", tiny.ROWS[:-1])
    with (tmp_path / "general.jsonl").open("a") as file:
        file.write("\n")
    with open_run_folder(other):  # no result depends on the general prompts yet
        pass


@pytest.mark.parametrize("name", ["config.yaml", "results.json", "date"])
def test_what_the_results_are_of_must_be_there(tmp_path, name):
    config = load_config(tiny.write_run(tmp_path))
    with open_run_folder(config) as folder:
        (folder.path / "refined").mkdir()
        (folder.path / name).unlink()
    with open_run_folder(config):  # refined rows alone may be taken along into a new run
        (folder.path / "sft").mkdir()
    with open_run_folder(config):
        (folder.path / name).unlink()
    with pytest.raises(InputError, match=f"run/{name}: is gone.*put it back, or set run_dir"), open_run_folder(config):
        pass


@pytest.mark.parametrize(
    ("name", "consequence"),
    [
        ("timings.jsonl", "the report lacks the time"),
        ("evaluation.json", "every model is evaluated again"),
        ("refined/ledger.jsonl", "written anew"),
        ("refined/refined.jsonl", "the report lacks the refined rows"),
        ("refined/manifest.json", "refine makes it again"),
        ("sft/metrics.jsonl", "the report lacks its curves"),
        ("sft/hf", "the same command makes it again"),
        ("sft/hf/SHA256SUMS", "no longer checked"),
        ("sft/hf/model.safetensors", "remove .*/sft/hf, and the same command makes it again"),
    ],
)
def test_a_file_that_is_gone_is_named(tmp_path, capsys, name, consequence):
    config = load_config(tiny.write_run(tmp_path), ["methods=[sft]"])
    run_dir, measured = tmp_path / "run", {"base": scores(random.Random(0), 0)}
    for file, text in {
        "sft/metrics.jsonl": "",
        "sft/hf/SHA256SUMS": "0  model.safetensors\n",
        "sft/hf/model.safetensors": "",
        "refined/ledger.jsonl": "",
        "refined/refined.jsonl": "",
        "refined/manifest.json": "{}",
        "evaluation.json": json.dumps({"models": measured}),
        "date": "2026-11-27",
        "results.json": "{}",
        "config.yaml": (tmp_path / "config.yaml").read_text(),
    }.items():
        (run_dir / file).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / file).write_text(text)
    for stage, method in (("export", "sft"), ("evaluate", "base")):
        RunFolder(run_dir).record_time(stage, method, 1.0, 1)
    with open_run_folder(config):
        assert capsys.readouterr().out == ""
    path = run_dir / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with open_run_folder(config):
        assert re.fullmatch(f"{path}: is gone; .*{consequence}.*\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("evaluation.json", '{"models": {"base": {}}}', "damaged (models.base.domain: Field required); remove it"),
        ("evaluation.json", '{"base": {}}', "damaged (models: Field required)"),
        ("evaluation.json", "[" * 100_000, "damaged (Invalid JSON: recursion limit"),
        ("evaluation.json", b"\xff", "damaged (Invalid JSON"),
        ("date", "yesterday", "damaged ('yesterday'); write the day there"),
        ("date", b"\xff", "not UTF-8"),
        ("config.yaml", "&a [*a]", "the saved config is damaged"),
        ("results.json", "{", "not valid JSON"),
        ("results.json", "[]", "damaged, expected an object"),
        ("timings.jsonl", '{"stage": "train"}\n', "timings.jsonl:1: damaged; remove this line"),
        ("timings.jsonl", '{"stage": "a", "method": ["a"], "seconds": 1, "tokens": 2}\n', "timings.jsonl:1: damaged"),
        ("timings.jsonl", '{"stage": 1, "method": 1, "seconds": "a", "tokens": 2}\n', "timings.jsonl:1: damaged"),
    ],
)
def test_damage_of_the_folders_files_is_a_line(tmp_path, name, content, words):
    config = load_config(tiny.write_run(tmp_path))
    with open_run_folder(config) as folder:
        (folder.path / "sft").mkdir()
    (folder.path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=re.escape(words)) as caught, open_run_folder(config):
        pass
    assert str(caught.value).startswith(str(folder.path / name)) and "\n" not in str(caught.value)
    (folder.path / name).unlink()
    os.mkfifo(folder.path / name)
    with pytest.raises(InputError, match=f"{name}: expected a file, found a named pipe"), open_run_folder(config):
        pass


def test_a_model_or_encoder_that_changed_is_named(tmp_path):
    path = tiny.write_run(tmp_path)
    shutil.copytree(tiny.ENCODER, tmp_path / "encoder")
    config = load_config(path, [f"encoder.source={tmp_path}/encoder", "methods=[raft,sft]"])
    with open_run_folder(config) as folder:
        (folder.path / "raft").mkdir()
    for source, name in (
        ("model", "model.safetensors"),
        ("model", "chat_template.jinja"),
        ("encoder", "1_Pooling/config.json"),
    ):
        file = tmp_path / source / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + b" ")
        words = f"{source}.source: in {tmp_path}/{source}, {name} changed"
        with pytest.raises(InputError, match=re.escape(words)), open_run_folder(config):
            pass
        file.write_bytes(whole)
    with open_run_folder(config):
        pass
    (folder.path / "raft").rename(folder.path / "sft")  # which knows no encoder
    (tmp_path / "encoder/1_Pooling/config.json").write_text("{}")
    with open_run_folder(load_config(path, [f"encoder.source={tmp_path}/encoder", "methods=[sft]"])):
        pass


def test_a_branch_of_the_hub_that_moved_is_named(tmp_path, monkeypatch):
    """What counts is what is there: the commit that the run began with may be named, and one with the same files."""
    tiny.write_run(tmp_path)
    first, same, other = (tmp_path / "models--someone--small" / "snapshots" / (40 * digit) for digit in "abc")
    for commit in (first, same, other):
        shutil.copytree(tmp_path / "model", commit)
    (other / "generation_config.json").write_text("{}")
    branch = [first]
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, revision, **rest: branch[0].parent / (revision or branch[0].name),
    )
    config = tmp_path / "config.yaml"
    with open_run_folder(load_config(config, ["model.source=hf://someone/small"])) as folder:
        (folder.path / "raft").mkdir()
    recorded = json.loads((folder.path / "results.json").read_text())["train raft"]
    assert recorded["model.source: content"]["commit"] == "a" * 40
    branch[0] = other
    words = (
        f"model.source: in hf://someone/small (commit {'c' * 40}; the run began with "
        f"hf://someone/small@{'a' * 40}), generation_config.json changed"
    )
    with (
        pytest.raises(InputError, match=re.escape(words)),
        open_run_folder(load_config(config, ["model.source=hf://someone/small"])),
    ):
        pass
    for source in (f"hf://someone/small@{'a' * 40}", f"hf://someone/small@{'b' * 40}", f"{tmp_path}/model"):
        with open_run_folder(load_config(config, [f"model.source={source}"])):
            pass


def test_a_run_keeps_the_day_on_which_it_was_begun(tmp_path):
    config = load_config(tiny.write_run(tmp_path), [])
    with open_run_folder(config) as folder:
        today = datetime.date.today()
        assert today <= folder.start_date() <= datetime.date.today()
        (folder.path / "date").write_text("2001-02-03\n")
        assert Run(config, folder).model.tokenizer.date == datetime.date(2001, 2, 3)


def test_a_stage_has_one_line_of_time(tmp_path):
    RunFolder(tmp_path).record_time("train", "sft", 1.23456, 10)
    RunFolder(tmp_path).record_time("train", "raft", 2.0, 20)
    RunFolder(tmp_path).record_time("train", "sft", 3.0, 30)
    found = lines(tmp_path / "timings.jsonl")
    assert all(line.pop("machine")["cores"] == os.cpu_count() for line in found)
    assert found == [
        {"stage": "train", "method": "raft", "seconds": 2.0, "tokens": 20},
        {"stage": "train", "method": "sft", "seconds": 3.0, "tokens": 30},
    ]
