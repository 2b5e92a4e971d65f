"""System turn, context and earlier turns on their way from the file to student, teacher, writers and refined/."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import tiny

from raft_jax.cli import main
from raft_jax.config_file import load_config
from raft_jax.data.examples import load_examples
from raft_jax.data.refined import RefinedRow, load_refined
from raft_jax.data.tokenize import token_rows
from raft_jax.methods import METHODS
from raft_jax.refine.generate import LocalGenerator
from raft_jax.refine.roles import Roles
from raft_jax.refine.run import item_of
from raft_jax.run_data import RunData

QUESTION, ANSWER = "What is due?", "Rule 1 is due to the ferry, and form C-1 is due with it."
SYSTEM, CONTEXT, EARLIER = "Be brief.", "Rule 1.", [("user", "Who?"), ("assistant", "The tenant.")]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def chat(*turns: tuple[str, str]) -> str:
    """What the ChatML template of the tiny tokenizer makes of some turns, up to the answer."""
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return f"{text}<|im_start|>assistant\n"


# The same conversation in every form in which a file may have it.
FORMS = {
    "columns": {"question": QUESTION, "answer": ANSWER, "system": SYSTEM, "context": CONTEXT},
    "prompt": {
        "prompt": [turn("system", SYSTEM), turn("user", QUESTION)],
        "completion": [turn("assistant", ANSWER)],
        "context": CONTEXT,
    },
    "messages": {
        "messages": [turn("system", SYSTEM), turn("user", QUESTION), turn("assistant", ANSWER)],
        "context": CONTEXT,
    },
    "beside messages": {
        "messages": [turn("user", QUESTION), turn("assistant", ANSWER)],
        "system": SYSTEM,
        "context": CONTEXT,
    },
    "earlier turns": {
        "messages": [*(turn(*one) for one in EARLIER), turn("user", QUESTION), turn("assistant", ANSWER)],
        "system": SYSTEM,
        "context": CONTEXT,
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_prompt_of_a_row_has_its_system_turn_context_and_earlier_turns(tmp_path, form):
    config = load_config(tiny.write_run(tmp_path), ["refine.terse_words=99"])
    (example,) = load_examples(tiny.write_jsonl(tmp_path / "row.jsonl", [FORMS[form]]))
    earlier = EARLIER if form == "earlier turns" else []
    tokenizer = tiny.make_tokenizer()
    asked = f"{CONTEXT}\n\n{QUESTION}"

    (row,) = token_rows([RefinedRow.unrefined(example, "Because.")], tokenizer, METHODS["raft"])
    assert tokenizer.token_text(row.prompt) == chat(("system", SYSTEM), *earlier, ("user", asked))
    teacher = tokenizer.token_text(row.teacher_prompt)
    assert teacher.startswith(chat(("system", SYSTEM), *earlier).removesuffix("<|im_start|>assistant\n"))
    assert ANSWER in teacher and teacher.count(SYSTEM) == 1
    assert teacher.endswith(f"{asked}<|im_end|>\n<|im_start|>assistant\n")

    models = Roles(config, tiny.make_model(), "tiny", None).models(encoder=None)
    for generator in (models.rewriter, models.fuser):
        assert isinstance(generator, LocalGenerator)
        system, *others, user = generator.prompt(item_of(example))
        assert system["role"] == "system" and system["content"].startswith(f"{SYSTEM}\n\n")
        assert asked in system["content"] + user["content"] and ANSWER in user["content"]
        assert [(one["role"], one["content"]) for one in others] == earlier


def rows_of_all_forms() -> list[dict]:
    """The rows of the tiny run, a quarter each with a system column, earlier turns, a context, and none of them."""
    rows = []
    for number, row in enumerate(tiny.ROWS):
        other = dict(row)
        if number % 4 == 0:
            other["system"] = SYSTEM
        elif number % 4 == 1:
            turns = [*(turn(*one) for one in EARLIER), turn("user", row["question"]), turn("assistant", row["answer"])]
            other = {"id": row["id"], "split": row["split"], "messages": turns, "system": f"{SYSTEM} {number}"}
        elif number % 4 == 3:
            other["context"] = f"Form C-{number}."
        rows.append(other)
    return rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a refined and trained run over such rows."""
    folder = tmp_path_factory.mktemp("conversations")
    path = tiny.write_run(folder, methods=["raft", "sdft"], train={"epochs": 1.0})
    tiny.write_jsonl(folder / "data.jsonl", rows_of_all_forms())
    assert main(["train", str(path), f"run_dir={folder}/first"]) == 0
    return folder


def metrics(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "raft/metrics.jsonl").read_text().splitlines()]
    times = ("seconds", "rollout_seconds", "tokens_per_second")
    return [{name: value for name, value in line.items() if name not in times} for line in lines]


def test_a_copied_refined_folder_trains_on_the_same_tokens(run, capsys):
    (run / "second").mkdir()
    shutil.copytree(run / "first/refined", run / "second/refined")
    ledger = (run / "first/refined/ledger.jsonl").read_bytes()
    assert main(["train", str(run / "config.yaml"), f"run_dir={run}/second"]) == 0
    assert "refining again" not in capsys.readouterr().out
    assert (run / "second/refined/ledger.jsonl").read_bytes() == ledger
    assert metrics(run / "second") == metrics(run / "first")
    weights = "raft/hf/model.safetensors"
    assert (run / "second" / weights).read_bytes() == (run / "first" / weights).read_bytes()


@pytest.mark.parametrize("method", ["raft", "sdft"])
def test_the_refined_rows_alone_have_everything_that_is_trained_on(run, method):
    """Against the tokens of rows whose conversations come from the user's file."""
    config, tokenizer = load_config(run / "config.yaml"), tiny.make_tokenizer()
    data = RunData(config, tokenizer, 512)
    alone = load_refined(run / "first/refined")
    assert {len(row.turns) for row in alone} == {0, 1, 3} and any(row.context for row in alone)
    from_file = [
        replace(row, question=example.question, context=example.context, turns=list(map(list, example.turns)))
        for row, example in zip(alone, data.train, strict=True)
    ]
    rows = token_rows(alone, tokenizer, METHODS[method])
    for mine, theirs in zip(rows, data.tokens(from_file, METHODS[method]), strict=True):
        assert (mine.prompt, mine.answer, mine.teacher_prompt) == (theirs.prompt, theirs.answer, theirs.teacher_prompt)


def test_the_refined_file_as_data_of_another_run_has_the_same_prompts(run):
    config = load_config(run / "config.yaml")
    tokenizer = tiny.make_tokenizer()
    before = {example.id: example for example in RunData(config, tokenizer, 512).train}
    for source in (run / "first/refined/refined.jsonl", f"tfds://{run}/first/refined"):
        for example in load_examples(source):
            assert (example.question, example.context, example.turns) == (
                before[example.id].question,
                before[example.id].context,
                before[example.id].turns,
            )
