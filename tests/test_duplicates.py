"""Rows that ask the same or nearly the same: found, named, left out on request, and the same when a run goes on."""

from __future__ import annotations

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from raft_jax import duplicates
from raft_jax.cli import main
from raft_jax.config_file import load_config
from raft_jax.data.examples import Example
from raft_jax.data.refined import load_refined
from raft_jax.duplicates import near_questions, same_questions
from raft_jax.errors import InputError
from raft_jax.run_data import RunData
from raft_jax.stages import changes, settings_of


def encoder_of(vectors: dict[str, np.ndarray], unknown: tuple[str, ...] = ()):
    """An encoder that looks the vectors of questions up."""
    encoder = SimpleNamespace(unknown_shares=[], asked=[])

    def encode(texts, progress=None):
        encoder.asked += texts
        encoder.unknown_shares = [float(text in unknown) for text in texts]
        return np.stack([vectors[text] for text in texts])

    encoder.encode = encode
    return encoder


def test_the_same_question_in_other_cases_and_spaces_is_a_duplicate_in_its_surroundings_only():
    turns = (("user", "Who?"), ("assistant", "He."))
    rows = [
        Example("a", "How long?", "A day."),
        Example("b", "how\n long?  ", "Two days."),
        Example("c", "How long?", "A day.", context="Form 10."),
        Example("d", "HOW LONG?", "A day.", context=" form 10."),
        Example("e", "How long?", "A day.", turns=turns),
        Example("f", "How long?", "A day.", turns=(("user", "who?"), turns[1])),
        Example("g", "How long", "A day."),
        Example("h", "How long?", "A day."),
    ]
    assert same_questions(rows) == {"b": "a", "d": "c", "f": "e", "h": "a"}
    assert same_questions(rows[::-1]) == {"b": "h", "a": "h", "c": "d", "e": "f"}


@pytest.mark.parametrize("block", [1, 3, 1024])
def test_near_duplicates_against_every_pair_in_turn(monkeypatch, block):
    monkeypatch.setattr(duplicates, "BLOCK", block)
    random = np.random.default_rng(0)
    rows = [Example(f"r{number}", f"question {chr(97 + number)}", "A.") for number in range(26)]
    vectors = {row.question: random.normal(size=3) * random.uniform(0.1, 9) for row in rows}
    expected = {}
    for later, row in enumerate(rows):
        for earlier in rows[:later]:
            a, b = vectors[row.question], vectors[earlier.question]
            cosine = sum(a * b) / (sum(a * a) * sum(b * b)) ** 0.5
            if earlier.id not in expected and cosine >= 0.8:
                expected[row.id] = earlier.id
                break
    found = near_questions(rows, encoder_of(vectors), 0.8)
    assert found == expected and 5 < len(found) < 25


def test_other_numbers_contexts_and_unknown_scripts_are_no_near_duplicates():
    texts = (
        "What does rule 4 say?",
        "What says rule 4?",
        "What does rule 5 say?",
        "What does rule five say?",
        "ทำไม",
        "อะไร",
    )
    rows = [Example(text, text, "A.") for text in texts]
    rows += [Example("other page", texts[1], "A.", context="Page 2."), Example("the same", texts[0].upper(), "B.")]
    encoder = encoder_of(dict.fromkeys(texts, np.ones(2)), unknown=texts[4:])
    assert near_questions(rows, encoder, 0.95) == {texts[1]: texts[0], texts[3]: texts[2]}
    assert texts[0].upper() not in encoder.asked
    assert near_questions(rows[:1], encoder, 0.95) == {}


# The tiny data, and rows that ask again: q02 (training) and q03 (held out) word for word or nearly so.
AGAIN = [
    {**tiny.ROWS[1], "id": "again", "question": "what does  rule 2 say of the bridge?", "answer": "Ask."},
    {**tiny.ROWS[2], "id": "leak", "split": "train"},
    {**tiny.ROWS[2], "id": "held", "question": tiny.ROWS[2]["question"].upper()},
    # The tokenizer of the encoder drops the space, so that the cosine is 1.
    {**tiny.ROWS[1], "id": "near", "question": "What does rule 2 say of the bridge ?"},
    {**tiny.ROWS[2], "id": "near leak", "question": "What does rule 3 say of the lantern ?", "split": "train"},
]


@pytest.fixture
def path(tmp_path):
    path = tiny.write_run(tmp_path)
    tiny.write_jsonl(tmp_path / "data.jsonl", [*tiny.ROWS, *AGAIN])
    return path


def data_of(path, *settings, **more) -> RunData:
    return RunData(load_config(path, settings), tiny.make_tokenizer(), 512, **more)


def test_duplicates_and_leaks_are_named(path):
    said = list(data_of(path).describe())
    assert (
        "rows with the question of an earlier row: 2 (held as q03, again as q02); data.drop_duplicates=exact" in said[2]
    )
    assert said[3].startswith("held-out questions that are training questions, too: 2 (q03, held); ")
    assert len(said) == 4 and data_of(path).incomplete


def test_exact_duplicates_are_left_out_and_held_out_rows_come_first(path):
    data = data_of(path, "data.drop_duplicates=exact")
    assert {row.id for row in data.train} == {row["id"] for row in tiny.ROWS if row["split"] == "train"} | {
        "near",
        "near leak",
    }
    assert [row.id for row in data.test] == ["q03", "q07", "q11", "q15"] and data.remembered == []
    (line,) = list(data.describe())[2:]
    assert "left out by data.drop_duplicates=exact: 3 (held as q03, again as q02, leak as q03)" in line
    assert data.incomplete


def test_a_held_out_question_without_a_split_column_is_not_trained_on(path, tmp_path):
    rows = [{"id": f"{n}{copy}", "question": f"Question {n}?", "answer": copy} for copy in "ab" for n in range(10)]
    tiny.write_jsonl(tmp_path / "data.jsonl", rows)
    both = data_of(path, "data.held_out=6")
    data = data_of(path, "data.held_out=6", "data.drop_duplicates=exact")
    asked = [row.question for row in (*data.train, *data.test)]
    assert len(asked) == len(set(asked)) == 10 and {row.id for row in data.test} <= {row.id for row in both.test}


def test_several_answers_to_a_question_are_no_duplicates(path, tmp_path):
    tiny.write_jsonl(tmp_path / "data.jsonl", [{**tiny.ROWS[0], "answer": ["A.", "B."]}, *tiny.ROWS[1:]])
    data = data_of(path, "data.several_answers=each", "data.drop_duplicates=exact")
    assert [row.id for row in data.train[:2]] == ["q01#1", "q01#2"] and not data.given.repeated


def test_a_file_whose_training_rows_are_all_held_out_is_refused(path, tmp_path):
    copies = [{**row, "id": f"copy of {row['id']}", "split": "train"} for row in tiny.ROWS[3::4]]
    tiny.write_jsonl(tmp_path / "data.jsonl", [{**row, "split": "test"} for row in tiny.ROWS] + copies)
    with pytest.raises(InputError, match=r"every training question is a held-out one, too, so that data\.drop_dup"):
        data_of(path, "data.drop_duplicates=exact")
    # The same rows as both splits are what was asked for.
    assert len(data_of(path, "data.drop_duplicates=exact", "data.train_split=test").train) == 16


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.drop_duplicates=all", "data.drop_duplicates is 'all'; allowed: none, exact, near"),
        ("data.duplicate_similarity=1.5", "data.duplicate_similarity is 1.5; allowed: a cosine, above 0, up to 1"),
        ("data.several_answers=all", "data.several_answers is 'all'; allowed: first, each"),
    ],
)
def test_settings_are_checked(path, setting, message):
    with pytest.raises(InputError, match=re.escape(message)):
        load_config(path, [setting])


def test_check_and_run_name_near_duplicates_and_a_run_goes_on_with_the_rows_it_began_with(path, tmp_path, capsys):
    near = ["data.drop_duplicates=near", "data.duplicate_similarity=0.9999"]
    assert main(["check", str(path)]) == 0
    said = capsys.readouterr().out
    assert "rows with the question of an earlier row: 2" in said and "nearly" not in said
    assert main(["check", str(path), *near]) == 0
    left_out = "left out by data.drop_duplicates=near: 5 (held as q03, again as q02, leak as q03, and 2 more)"
    assert left_out in capsys.readouterr().out

    assert main(["refine", str(path), near[1]]) == 0
    said = capsys.readouterr().out
    assert (
        "nearly the question of an earlier row (cosine of data.duplicate_similarity=0.9999 or more): 1 (near as" in said
    )
    assert (
        "nearly the question of a held-out row (cosine of data.duplicate_similarity=0.9999 or more): 2 (leak"
        not in said
    )
    assert "1 (near leak as q03)" in said and "held-out questions that are training questions, too: 2" in said
    assert not (tmp_path / "run/duplicates.json").exists()

    assert main(["refine", str(path), *near]) == 0
    assert left_out in capsys.readouterr().out
    ids = [row.id for row in load_refined(tmp_path / "run/refined")]
    assert ids == [row["id"] for row in tiny.ROWS if row["split"] == "train"]
    # What was decided stays, even where this machine would decide otherwise.
    record = json.loads((tmp_path / "run/duplicates.json").read_text())
    assert record["rows"] == {"near": "q02", "near leak": "q03"}
    shutil.rmtree(tmp_path / "run/refined")
    (tmp_path / "run/duplicates.json").write_text(json.dumps({**record, "rows": {"near": "q02"}}))
    assert main(["refine", str(path), *near]) == 0
    assert [row.id for row in load_refined(tmp_path / "run/refined")] == [*ids, "near leak"]
    (tmp_path / "run/duplicates.json").write_text("{")
    capsys.readouterr()
    assert main(["refine", str(path), *near]) == 2
    assert re.search(r"duplicates.json: damaged .*; remove it, and they are found again\n$", capsys.readouterr().err)


def test_what_a_result_depends_on():
    settings = {
        "data.drop_duplicates": "none",
        "data.duplicate_similarity": 0.95,
        "data.test_split": "test",
        "encoder.source": "here",
        "seed": 0,
    }
    assert settings_of("train sft", settings, False).keys() == {"data.drop_duplicates", "seed"}
    exact = settings_of("train sft", settings | {"data.drop_duplicates": "exact"}, False)
    assert exact.keys() == {"data.drop_duplicates", "data.test_split", "seed"}
    assert settings_of("train sft", settings | {"data.drop_duplicates": "near"}, False).keys() == settings.keys()
    # A folder of an older version had all rows, and the first answers.
    now = {"data.path": "d", "data.drop_duplicates": "none", "data.several_answers": "first"}
    assert changes({"data.path": "d"}, now) == {}
    assert changes({"data.path": "d"}, now | {"data.drop_duplicates": "exact"}) == {
        "data.drop_duplicates": "data.drop_duplicates: none → exact"
    }
