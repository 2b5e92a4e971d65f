"""The marks: overlap, checkable answers, divergence and weight distance against hand cases and NumPy."""

from __future__ import annotations

import json
from dataclasses import asdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
import tiny

from raft_jax.config import EvaluateConfig
from raft_jax.data.examples import Example
from raft_jax.data.prompts import load_prompts
from raft_jax.errors import InputError
from raft_jax.evaluate import compare
from raft_jax.evaluate.accuracy import distinct, is_correct, token_f1
from raft_jax.evaluate.compare import Evaluator, GeneralPrompt, load_general_prompts
from raft_jax.evaluate.divergence import make_divergence, weight_distance
from raft_jax.files import parse_record
from raft_jax.sampling import Completion, Scorer
from raft_jax.scores import Estimate, ModelScores, WeightDistance

TOY = SimpleNamespace(
    hidden=tiny.toy_hidden,
    unembedding=tiny.toy_unembedding,
    tokenizer=SimpleNamespace(pad_id=3),
    head_settings={},
    jit=jax.jit,
)


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("the cat sat", "The cat sat.", 1.0),
        ("cat", "cat sat", 2 / 3),  # precision 1, recall 1/2
        ("a cat, a dog", "the dog", 2 / 3),
        ("cat cat cat", "cat", 1 / 2),  # a word counts as often as it stands in both
        ("cat cat", "cat cat dog", 4 / 5),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("cat", "", 0.0),
        ("", "", 1.0),
        ("the", "an", 1.0),
        ("Form 22-1990", "form 221990", 1.0),
    ],
)
def test_token_f1(answer, gold, expected):
    assert token_f1(answer, gold) == pytest.approx(expected, abs=1e-12)
    assert token_f1(gold, answer) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("kind", "value", "right", "wrong"),
    [
        (
            "contains_any",
            ["Paris"],
            ["paris", "It is Paris.", "Paris, of course"],
            ["parish", "Comparison", "London", ""],
        ),
        ("contains_any", ["H2O", "water"], ["h2o!", "Water"], ["watery", "H2O2"]),
        ("contains_any", ["3.5"], ["3.5 km", "(3.5)"], ["3x5"]),
        ("number", 144, ["144", "It is 144.", "144.0", "12 x 12 = 144"], ["1440", "14", "no number", ""]),
        ("number", 1200, ["1,200", "1200 people"], ["1.200", "12,00.5"]),
        ("number", -5, ["-5", "It is -5 degrees", "−5"], ["5", "10-5"]),
        ("number", 0.5, ["0.5", ".5 or 0.50"], ["5"]),
        ("regex", r"^\s*yes\b", ["Yes.", "  YES indeed"], ["no, yes", "yesterday"]),
        ("exact", "Oslo", ["Oslo", " oslo.\n", "OSLO"], ["Oslo!", "Oslo, Norway"]),
        ("exact", 7, ["7", "7."], ["seven"]),
    ],
)
def test_answers_that_a_program_can_check(kind, value, right, wrong):
    check = {"kind": kind, "value": value}
    assert [text for text in right if not is_correct(check, text)] == []
    assert [text for text in wrong if is_correct(check, text)] == []


def test_checks_that_are_none_or_unknown():
    assert is_correct(None, "anything") is None
    with pytest.raises(ValueError, match="'fuzzy' is not known; known: contains_any, number, regex, exact"):
        is_correct({"kind": "fuzzy", "value": 1}, "x")


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [("a b a b a b", 2, 2 / 5), ("a b a b a b", 3, 2 / 4), ("One two three", 3, 1), ("A a", 1, 0.5), ("a b", 3, None)],
)
def test_runs_of_words_that_are_different(text, n, expected):
    assert distinct(text, n) == expected


def as_arrays(params):
    return {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}


PROMPTS, ANSWERS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [2, 2]], [[3], [10, 11, 12, 13, 14], [15, 3], [1, 0, 1]]


def test_divergence_is_the_full_kl_over_the_answers():
    base, tuned = tiny.toy_parameters(0), tiny.toy_parameters(1)
    found = make_divergence(TOY, batch_size=3)(as_arrays(base), as_arrays(tuned), PROMPTS, ANSWERS)
    expected = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        places = slice(len(prompt) - 1, -1)
        p, q = (
            numpy_reference.softmax(numpy_reference.forward(params, np.array(prompt + answer))[0][places])
            for params in (base, tuned)
        )
        expected.append(np.mean(np.sum(p * np.log(p / q), axis=-1)))
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    assert not make_divergence(TOY, batch_size=4)(as_arrays(base), as_arrays(base), PROMPTS, ANSWERS).any()


def test_the_gold_answers_likelihood_is_per_token():
    params = tiny.toy_parameters(0)
    found = Scorer(TOY, batch_size=3).mean_logprob(as_arrays(params), PROMPTS, ANSWERS)
    expected = [
        -numpy_reference.sft_loss(params, {"prompt": prompt, "answer": answer})[0]
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_weight_distance_is_relative_and_layer_by_layer():
    config = tiny.make_config(20)
    base, tuned = tiny.random_parameters(config, 0), tiny.random_parameters(config, 1)
    found = weight_distance(as_arrays(tuned), as_arrays(base))
    stacked = [name for name in base if name.rpartition("_")[2].startswith("L")]
    assert len(stacked) == 9
    for layer in range(config.num_layers):
        was = np.concatenate([base[name][layer].ravel() for name in stacked]).astype(np.float64)
        now = np.concatenate([tuned[name][layer].ravel() for name in stacked]).astype(np.float64)
        assert found.layers[layer] == pytest.approx(np.linalg.norm(now - was) / np.linalg.norm(was), rel=1e-5)
    assert found.mean == pytest.approx(np.mean(found.layers))
    was, now = base["embedding_VD"], tuned["embedding_VD"]
    assert found.embedding == pytest.approx(np.linalg.norm(now - was) / np.linalg.norm(was), rel=1e-5)
    assert weight_distance(as_arrays(base), as_arrays(base)) == WeightDistance(0, [0, 0], 0)


def test_estimates_are_mean_and_standard_error():
    found = Estimate.of([1.0, 2.0, 6.0])
    assert (found.mean, found.stderr, found.count) == (3.0, pytest.approx(np.sqrt(7 / 3)), 3)
    assert Estimate.of([True]) == Estimate(1.0, None, 1)
    assert Estimate.of([]) == Estimate(None, None, 0)


class FakeSampler:
    """Repeats the prompt's last word, in capitals for a tuned model."""

    calls = 0

    def __init__(self, model, batch_size, mesh, shrink):
        self.model = model

    def generate(self, params, prompts, *, key, temperature, max_new_tokens, on_batch):
        type(self).calls += 1
        assert temperature == 0 and max_new_tokens == (9 if "Q" in prompts[0] else 5)
        on_batch(list(range(len(prompts))), [])
        words = [prompt.split()[-1] for prompt in prompts]
        return [Completion([word if params == "base" else word.upper()], word != "hi") for word in words]


class FakeTokenizer:
    pad_id = 0

    def chat_prompt(self, messages):
        return messages[-1]["content"]

    def chat_answer(self, messages):
        assert messages[-1]["role"] == "assistant"
        return messages[-1]["content"]

    def decode(self, ids):
        return " ".join(ids) + "\n"


class FakeEncoder:
    num_truncated = 0

    def encode(self, texts, progress):
        self.unknown_shares = [0.0] * len(texts)
        return np.array([[len(text), 1.0] for text in texts])


def test_each_mark_is_of_the_right_texts(monkeypatch):
    monkeypatch.setattr(compare, "Sampler", FakeSampler)

    def scored(params, prompts, answers, progress):
        given = {"base": 0, "tuned": 0.25}[params]  # exact in float32, as are 64ths of a length
        values = [len(prompt) / 64 - len(answer) - given for prompt, answer in zip(prompts, answers, strict=True)]
        return np.array(values, np.float32)

    monkeypatch.setattr(compare, "Scorer", lambda *_: SimpleNamespace(mean_logprob=scored))
    told = []

    def drift(base, params, prompts, answers, progress):
        told.append((base, params, prompts, answers))
        return np.array([0.25, 0.75], np.float32)

    monkeypatch.setattr(compare, "make_divergence", lambda *_: drift)
    monkeypatch.setattr(compare, "weight_distance", lambda params, base: WeightDistance(float(params != base)))
    questions = [Example("q1", "Q one", "one", context="so"), Example("q2", "Q two", "no two")]
    general = [
        GeneralPrompt("g1", "sums", "four 4", {"kind": "number", "value": 4}),
        GeneralPrompt("g2", "chat", "say hi", None),
    ]
    model = SimpleNamespace(params="base", tokenizer=FakeTokenizer())
    settings = EvaluateConfig(max_new_tokens=9, general_new_tokens=5)
    evaluation = Evaluator(model, FakeEncoder(), questions, general, settings)
    assert evaluation.question_prompts == ["so\n\nQ one", "Q two"] and evaluation.gold_answers == ["one", "no two"]

    base = evaluation.evaluate("base", "base")
    assert told == [] and base.general.divergence == Estimate(0, 0, 2)
    assert [entry.answer for entry in base.answers] == ["one", "two"]
    assert base.domain.token_f1.mean == pytest.approx((1 + 2 / 3) / 2)
    assert base.domain.gold_logprob.mean == (len("so\n\nQ one") / 64 - 3 + len("Q two") / 64 - 6) / 2
    prompts = load_prompts()
    teacher_prompts = [prompts.teacher("Q one", "one", "so", ()), prompts.teacher("Q two", "no two", "", ())]
    more = [
        len(teacher[-1]["content"]) - len(question)
        for teacher, question in zip(teacher_prompts, evaluation.question_prompts, strict=True)
    ]
    assert [entry.teacher_gap for entry in base.answers] == [length / 64 for length in more]
    assert base.general.accuracy == Estimate(1, None, 1)
    assert [entry.correct for entry in base.general_answers] == [True, None] and FakeSampler.calls == 3

    tuned = evaluation.evaluate("raft", "tuned")
    assert told == [  # on the base model's own words
        ("base", "tuned", ["so\n\nQ one", "Q two"], [["one"], ["two"]]),
        ("base", "tuned", ["four 4", "say hi"], [["4"], ["hi"]]),
    ]
    assert tuned.domain.teacher_gap.mean == base.domain.teacher_gap.mean + 0.25  # the teacher is the base model
    assert base.domain.divergence == Estimate(0, 0, 2) and tuned.domain.divergence.mean == 0.5
    assert (tuned.domain.writing.ended.mean, tuned.general.writing.ended.mean) == (1, 0.5)
    assert base.general.writing.length == Estimate(1, 0, 2) and base.general.writing.distinct == Estimate()
    assert tuned.general.divergence.mean == 0.5 and tuned.weight_distance.mean == 1
    assert [entry.answer for entry in tuned.general_answers] == ["4", "HI"] and FakeSampler.calls == 5
    assert (tuned.domain.cut, tuned.general.cut) == (0, 1)
    assert [entry.cut for entry in tuned.answers + tuned.general_answers] == [False, False, False, True]
    assert parse_record(ModelScores, json.dumps(asdict(tuned), allow_nan=False)) == tuned


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no prompts in it"),
        ("{}\n", ":1: not a general prompt"),
        ('\n{"id": 1', ":2: not JSON"),
        ('{"id": "a", "category": "b", "prompt": "c", "chek": null}', "'chek'"),
        ("[1]", ":1: not a general prompt"),
        ('{"id": "a", "category": "b", "prompt": "c", "check": {"kind": "fuzzy", "value": 1}}', ":1: .*'fuzzy'"),
        ('{"id": "a", "category": "b", "prompt": "c", "check": {"kind": "regex", "value": "("}}', ":1: "),
        ('{"id": "a", "category": "b", "prompt": "c", "check": {"value": "("}}', ":1: "),
        ('{"id": "a", "category": "b", "prompt": "c", "check": {"kind": "contains_any", "value": "yes"}}', ":1: "),
        ('{"id": "a", "category": "b", "prompt": "", "check": null}', ":1: "),
        ('{"id": "a", "category": "b", "prompt": "c \\udc80", "check": null}', ":1: .* half a character"),
        ("[" * 100000, ":1: not JSON"),
        ('{"id": "a", "cat\\u001b[2J": 1}', ":1: not a general prompt"),
        (2 * '{"id": "a", "category": "b", "prompt": "c", "check": null}\n', ":2: id 'a' is that of line 1"),
    ],
)
def test_general_prompts_that_cannot_be_used_are_named(tmp_path, text, message):
    path = tmp_path / "general.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_general_prompts(str(path))
    assert str(caught.value).startswith(str(path)) and str(caught.value).isprintable()


def test_general_prompts_must_be_utf8(tmp_path):
    path = tmp_path / "general.jsonl"
    path.write_bytes(b'{"id": "a", "category": "b", "prompt": "\xff", "check": null}\n')
    with pytest.raises(InputError, match="not UTF-8"):
        load_general_prompts(str(path))


def test_the_packaged_general_prompts_are_enough_and_checkable():
    prompts = load_general_prompts(EvaluateConfig().general_path)
    assert len(prompts) >= 40 and len({prompt.id for prompt in prompts}) == len(prompts)
    assert sum(prompt.check is not None for prompt in prompts) >= 20
    jax.tree.map(lambda prompt: is_correct(prompt.check, ""), prompts)


def test_questions_of_mt_bench_are_general_prompts(tmp_path):
    rows = [{"question_id": 81, "category": "writing", "turns": ["Write a post.", "Now shorter."], "reference": []}]
    tiny.write_jsonl(tmp_path / "questions.jsonl", rows)
    (prompt,) = load_general_prompts(str(tmp_path / "questions.jsonl"))
    assert prompt == GeneralPrompt("81", "writing", "Write a post.")
    tiny.write_jsonl(tmp_path / "questions.jsonl", [{"question_id": 82, "category": "writing", "turns": []}])
    with pytest.raises(InputError, match="prompt must be text"):
        load_general_prompts(str(tmp_path / "questions.jsonl"))
