"""Domain accuracy: verdicts by majority, their agreement against published examples, checks, labels, and the record."""

from __future__ import annotations

import json
import re

import pytest
import tiny
from fake_chat import FakeChat, says
from numpy_reference import softmax
from test_run import lines

from raft_jax.cli import main
from raft_jax.config_file import load_config
from raft_jax.data.examples import load_examples
from raft_jax.errors import InputError
from raft_jax.evaluate.agreement import krippendorff_alpha, majority
from raft_jax.evaluate.expected import label_in, load_expected
from raft_jax.models import load_pretrained


def ratings(*rows: str) -> list[list[float | None]]:
    """One judge's ratings per text, one character per unit, a point where there is none."""
    return [[None if mark == "." else float(ord(mark) - ord("a")) for mark in row] for row in rows]


FOUR_OBSERVERS = ratings("abccbadab...", "abccbbdabe.c", ".cccbcdbbea.", "abccbddabea.")


@pytest.mark.parametrize(
    ("given", "metric", "expected"),
    # The examples A, B and C of Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011.
    [
        (ratings("abaaaaaaba", "bbbaabaaaa"), "nominal", 0.095),
        (ratings("aabbdcccedda", "babbbccceddd"), "nominal", 0.692),
        (FOUR_OBSERVERS, "nominal", 0.743),
        (FOUR_OBSERVERS, "interval", 0.849),
    ],
)
def test_agreement_is_that_of_published_examples(given, metric, expected):
    assert krippendorff_alpha(given, metric) == pytest.approx(expected, abs=5e-4)


def test_agreement_without_variation_or_pairs_is_undefined():
    assert krippendorff_alpha(ratings("aaa", "aaa")) is None
    assert krippendorff_alpha(ratings("ab.", "..a")) is None
    assert krippendorff_alpha(ratings("ab", "ab")) == 1
    # Two units on which two judges swap: observed 1, expected 4 of the 6 pairs of ratings.
    assert krippendorff_alpha(ratings("ab", "ba")) == pytest.approx(1 - 1 / (4 / 6))


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([0.7], True), ([0.69], False), ([1, 0], False), ([1, 0, 1], True), ([1, None], True), ([None], None), ([], None)],
)
def test_the_majority_of_those_that_answer_decides(scores, expected):
    assert majority(scores, 0.7) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"),
        ("yesterday, no", "no"),
        ("It is not sure at all: no", "not sure"),
        ("NO", "no"),
        ("", None),
        ("none", None),
    ],
)
def test_the_first_label_in_a_text(text, expected):
    assert label_in(text, ("no", "not sure", "yes")) == expected


ROWS = [
    {
        **row,
        "check": {"kind": "contains_any", "value": [topic]} if number % 2 else None,
        "decision": ("yes", "no")[number % 2] if number != 7 else None,
    }
    for number, (row, topic) in enumerate(zip(tiny.ROWS, tiny.TOPICS, strict=True), start=1)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder with an evaluated base model, and the folder of its inputs."""
    folder = tmp_path_factory.mktemp("judged")
    config = tiny.write_run(folder, methods=["sft"])
    tiny.write_jsonl(folder / "data.jsonl", ROWS)
    assert main(["evaluate", str(config), "evaluate.label=decision"]) == 0
    return folder


def base(folder) -> dict:
    return json.loads((folder / "run/evaluation.json").read_text())["models"]["base"]


def test_checks_and_labels_of_the_held_out_rows(folder):
    answers = {answer["id"]: answer for answer in base(folder)["answers"]}
    assert list(answers) == ["q03", "q07", "q11", "q15"]
    assert [answers[id]["correct"] is None for id in answers] == [row["check"] is None for row in ROWS[2::4]]
    for id, row in zip(answers, ROWS[2::4], strict=True):
        if row["check"]:
            assert answers[id]["correct"] == (row["check"]["value"][0] in answers[id]["answer"].lower())
    assert [answers[id]["label"] for id in answers] == ["no", "", "no", "no"]
    domain = base(folder)["domain"]
    assert domain["checked"]["count"] == 4 and domain["label_likelihood"]["count"] == domain["label_text"]["count"] == 3
    assert domain["accepted"]["count"] == 0 and domain["agreement"] is None


def test_the_likely_label_is_that_of_the_summed_likelihood(folder):
    """Against one pass over prompt and label without padding or batches, in float64 from the logits on."""
    import numpy as np

    model = load_pretrained(str(folder / "model"))
    tokenizer = model.tokenizer
    for answer in base(folder)["answers"]:
        if not answer["label"]:
            continue
        asked = answer["question"] + "\n\nAnswer with one of these and nothing else: no, yes."
        prompt = tokenizer.chat_prompt([{"role": "user", "content": asked}])
        logprobs = {}
        for label in ("no", "yes"):
            ids = [*tokenizer.encode(label), tokenizer.id_of("<|im_end|>")]
            logits = np.asarray(model.apply(model.params, np.array([prompt + ids])), np.float64)[0]
            places = np.log(softmax(logits[len(prompt) - 1 : -1]))
            logprobs[label] = sum(places[place, token] for place, token in enumerate(ids))
        assert abs(logprobs["no"] - logprobs["yes"]) > 1e-3
        assert answer["likely_label"] == max(logprobs, key=logprobs.__getitem__)


@pytest.mark.parametrize(
    ("changes", "override", "words"),
    [
        ({"check": "yes"}, "evaluate.check=check", "'check' is no check .*or set evaluate.check to another"),
        ({"check": {"kind": "fuzzy", "value": 1}}, "evaluate.check=check", "'fuzzy' is not known"),
        ({"decision": 1}, "evaluate.label=decision", "'decision' is 1, not a label"),
        ({}, "evaluate.label=nothing", "'nothing' has 0 different labels; allowed: 2 to 20"),
        ({}, "evaluate.label=question", "'question' has 16 .*|'question' has"),
    ],
)
def test_columns_that_cannot_be_used_are_named(tmp_path, changes, override, words):
    path = tiny.write_run(tmp_path)
    many = [{"id": f"x{n}", "split": "train", "question": f"Q{n}", "answer": "A"} for n in range(9)]
    tiny.write_jsonl(tmp_path / "data.jsonl", [*ROWS[:2], {**ROWS[2], **changes}, *ROWS[3:], *many])
    config = load_config(path, [override])
    with pytest.raises(InputError, match=words) as caught:
        load_expected(config, load_examples(config.data.path, split="test"))
    assert "\n" not in str(caught.value)


def test_checks_in_a_csv_file_are_json(tmp_path):
    path = tiny.write_run(tmp_path)
    (tmp_path / "data.csv").write_text(
        'question,answer,check,kind\nWhy?,So.,"{""kind"": ""number"", ""value"": 4}",a\nWho?,He.,,b\n'
    )
    config = load_config(path, [f"data.path={tmp_path}/data.csv", "evaluate.label=kind"])
    found = load_expected(config, load_examples(config.data.path))
    assert found.checks == {"000001": {"kind": "number", "value": 4}}
    assert found.labels == {"000001": "a", "000002": "b"} and found.choices == ("a", "b")


def verdict(score: float):
    return says(json.dumps({"score": score, "reason": f"It is {score}."}))


def judge_by_words(body, count):
    """Accepts candidates of an even length; the reference may come first or second, or there is none."""
    text = body["messages"][-1]["content"]
    candidate = re.search(r"(?:Candidate answer|\n\nAnswer):\n(.*?)(\n\nReference answer:|\Z)", text, re.DOTALL)[1]
    return verdict(0.9 if len(candidate) % 2 == 0 else 0.1)


def test_judges_vote_and_are_asked_once(folder, capsys):
    config, evaluation = str(folder / "config.yaml"), folder / "run/evaluation.json"
    before = base(folder)
    with FakeChat(judge_by_words) as first, FakeChat(lambda body, count: verdict(0.9)) as second:
        settings = [
            "evaluate.label=decision",
            "evaluate.judges=[one,two,similarity]",
            f"endpoints.one={{base_url: '{first.base_url}', model: small}}",
            f"endpoints.two={{base_url: '{second.base_url}', model: big}}",
        ]
        assert main(["evaluate", config, *settings]) == 0
        judged = base(folder)
        answered = [answer for answer in judged["answers"] if answer["answer"]]
        # Equal answers to equal questions are one request; these are all different questions.
        assert len(answered) == 4
        # And the one general prompt without a check, whose answer is judged by itself.
        assert len(first.asked) == len(second.asked) == 5
        (asked,) = [body for body in second.asked if "Tell me of the sea." in str(body["messages"])]
        assert "eference" not in str(asked["messages"])
        general = {answer["id"]: answer for answer in judged["general_answers"]}
        kind = 0.9 if len(general["g2"]["answer"]) % 2 == 0 else 0.1
        assert general["g2"]["judges"] == {"one": kind, "two": 0.9}
        assert general["g2"]["accepted"] == (kind == 0.9)
        assert not general["g1"]["judges"] and general["g1"]["accepted"] is None
        assert judged["general"]["accepted"] == {"mean": float(kind == 0.9), "stderr": None, "count": 1}
        for answer in answered:
            expected = {"one": 0.9 if len(answer["answer"]) % 2 == 0 else 0.1, "two": 0.9}
            assert {name: answer["judges"][name] for name in expected} == expected
            votes = [score >= 0.7 for score in answer["judges"].values()]
            assert len(votes) == 3 and answer["accepted"] == (sum(votes) >= 2)
            assert answer["reasons"]["two"] == "It is 0.9."
        shares = [answer["accepted"] for answer in judged["answers"]]
        assert judged["domain"]["accepted"]["mean"] == pytest.approx(sum(shares) / len(shares))
        matrix = [[answer["judges"][n] >= 0.7 for answer in answered] for n in ("one", "two", "similarity")]
        assert judged["domain"]["agreement"] == pytest.approx(krippendorff_alpha(matrix))
        # Nothing else has changed, and nothing was generated again.
        strip = {"judges", "reasons", "accepted"}
        same = [{k: v for k, v in answer.items() if k not in strip} for answer in judged["answers"]]
        assert same == [{k: v for k, v in answer.items() if k not in strip} for answer in before["answers"]]
        assert "domain accuracy" in capsys.readouterr().out
        # Another threshold, and the same judges in another order: no one is asked.
        written = evaluation.stat().st_mtime_ns
        assert main(["evaluate", config, *settings]) == 0
        assert evaluation.stat().st_mtime_ns == written
        assert main(["evaluate", config, *settings, "evaluate.judges=[two,one]", "evaluate.accept=0.05"]) == 0
        assert all(answer["accepted"] for answer in base(folder)["answers"]) and len(first.asked) == 5
        # Without its record, as where the process was killed, an answer is judged again, and only that.
        ledger = folder / "run/evaluation/verdicts.jsonl"
        records = lines(ledger)
        lost = next(record for record in records if record["key"].split("#")[1] == "one")
        tiny.write_jsonl(ledger, [record for record in records if record is not lost])
        assert main(["evaluate", config, *settings]) == 0
        assert (len(first.asked), len(second.asked)) == (6, 5) and first.asked[-1] in first.asked[:-1]
        assert base(folder) == judged
    (line,) = [line for line in lines(folder / "run/timings.jsonl") if line["stage"] == "judge"]
    assert line["tokens"] == 10 * 5


def test_a_judge_that_does_not_answer_is_asked_by_the_next_evaluation(folder, capsys):
    config = str(folder / "config.yaml")
    silent = {"on": True}

    def reply(body, count):
        refused = silent["on"] and any(words in str(body["messages"]) for words in ("rule 3 ", "rule 7 "))
        return says("", status=400) if refused else verdict(1.0)

    with FakeChat(reply) as server:
        settings = [
            "evaluate.label=decision",
            "evaluate.judges=[third]",
            f"endpoints.third={{base_url: '{server.base_url}', model: m}}",
        ]
        assert main(["evaluate", config, *settings]) == 0
        output = capsys.readouterr().out
        missing = sum(answer["accepted"] is None for answer in base(folder)["answers"])
        assert 0 < missing < 4 and f"{missing} answer(s) without a verdict; `raft-jax evaluate` asks again" in output
        assert base(folder)["domain"]["accepted"] == {"mean": 1.0, "stderr": 0.0, "count": 4 - missing}
        assert "No judge scored" in " ".join(output.split())
        asked, silent["on"] = len(server.asked), False
        assert main(["evaluate", config, *settings]) == 0
        assert len(server.asked) == asked + missing and base(folder)["domain"]["accepted"]["count"] == 4


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("evaluate.judges=[likelihood]", "evaluate.judges is ['likelihood']; allowed: any, each once, of similarity"),
        ("evaluate.judges=[coverage,coverage]", "each once"),
        ("evaluate.accept=2", "evaluate.accept is 2.0; allowed: 0 to 1"),
        ("evaluate.check=''", "evaluate.check is ''; allowed: the name of a column, or null"),
    ],
)
def test_settings_that_are_not_allowed(tmp_path, override, words):
    with pytest.raises(InputError, match=re.escape(words)):
        load_config(tiny.write_run(tmp_path), [override])
