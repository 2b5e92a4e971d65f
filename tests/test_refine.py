"""The refinement with writers and judges that say what they are told to (Eqs. 1-4)."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from raft_jax.config import RefineConfig
from raft_jax.data.examples import Example
from raft_jax.data.prompts import question_prompt
from raft_jax.errors import InputError
from raft_jax.refine.generate import Generation, LocalGenerator, RefineItem, generation_of
from raft_jax.refine.judge import CoverageJudge, LikelihoodJudge, SimilarityJudge, coverage
from raft_jax.refine.ledger import Ledger
from raft_jax.refine.run import RefineModels, refine, summary
from raft_jax.sampling import Completion

GOLD = "gold answer"


class FakeGenerator:
    """Writes `texts[(id, round)]`, or what `default` makes of id and round; a status may stand before a bar."""

    identity = "fake generator"

    def __init__(self, texts: dict | None = None, default=lambda id, round: f"text of {id}, round {round}", batch=2):
        self.texts, self.default, self.batch = texts or {}, default, batch
        self.written: list[tuple[str, int]] = []
        self.rounds: list[tuple[int, list[str]]] = []

    def prompt(self, item):
        texts = [item.question, item.gold, item.rewrite, item.context, *(content for _, content in item.turns)]
        return [{"role": "user", "content": "\n".join(["Say it anew with all facts in it:", *texts])}]

    def generate(self, items, round, done):
        self.rounds.append((round, [item.id for item in items]))
        for start in range(0, len(items), self.batch):
            indices = range(start, min(start + self.batch, len(items)))
            if all(index in done for index in indices):
                continue
            generations = {}
            for index in indices:
                text = self.texts.get((items[index].id, round), self.default(items[index].id, round))
                status, bar, rest = text.partition("|")
                generations[index] = Generation(rest if bar else text, status if bar else "ok", 3)
                self.written.append((items[index].id, round))
            yield generations


class FakeEncoder:
    """Two texts are as similar as the number that the second one ends in."""

    config = SimpleNamespace(max_tokens=20)
    identity = "fake encoder"

    def __init__(self):
        self.calls = self.num_truncated = 0

    def encode(self, texts, progress=None):
        self.calls += 1
        self.unknown_shares = [sum("\u0e00" <= letter <= "\u0e7f" for letter in text) / len(text) for text in texts]
        self.num_truncated = sum(len(text) > 20 for text in texts)
        angles = [np.arccos(float(text.rpartition("~")[2])) if "~" in text else 0.0 for text in texts]
        return np.array([[np.cos(angle), np.sin(angle)] for angle in angles])


class FakeJudge:
    """Scores texts by a table; the gold answer gets 0 where the table says nothing else."""

    def __init__(self, name: str, scores: dict | None = None, default: float | None = 0.5):
        self.name, self.identity, self.scores, self.default = name, name, {GOLD: 0.0} | (scores or {}), default
        self.asked: list[tuple[str, str]] = []

    def score(self, items, candidates):
        pairs = [(item.id, text) for item, text in zip(items, candidates, strict=True)]
        self.asked += pairs
        return [self.scores.get(text, self.default) for _, text in pairs]


def examples(*ids: str) -> list[Example]:
    return [Example(id, f"question {id}", GOLD, context=f"context {id}") for id in ids]


def parts(rewriter=None, fuser=None, judges=None) -> RefineModels:
    rewriter = rewriter or FakeGenerator(default=lambda id, round: f"wording of {id} ~0.9")
    return RefineModels(rewriter, FakeEncoder(), fuser or FakeGenerator(), judges or [FakeJudge("one")])


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def settings(**changes) -> RefineConfig:
    """The fake generators keep no facts, and their texts are long enough to be compared by themselves."""
    return RefineConfig(**{"check_facts": False, "terse_words": 0, "accept_floor": 0.0, **changes})


@pytest.fixture
def ledger(tmp_path):
    return Ledger.open(tmp_path / "ledger.jsonl")


def test_the_filter_keeps_what_is_near_and_usable(ledger):
    rewriter = FakeGenerator(
        {
            ("near", 1): "near ~0.91",
            ("edge", 1): "edge ~0.8",
            ("far", 1): "far ~0.79",
            ("none", 1): "empty|",
            ("long", 1): "truncated|and so on and ~1.0",
            ("no", 1): "refusal|I'm sorry ~1.0",
        }
    )
    fuser = FakeGenerator()
    rows = refine(examples("near", "edge", "far", "none", "long", "no"), parts(rewriter, fuser), settings(), ledger)
    near, edge, far, none, long, no = rows
    assert [row.accepted for row in rows] == [True, True, False, False, False, False]
    assert (near.similarity, edge.similarity, far.similarity) == pytest.approx((0.91, 0.8, 0.79), abs=1e-6)
    assert (none.similarity, long.similarity, no.similarity) == (None, None, None)
    assert [row.rewrite_status for row in rows] == ["ok", "ok", "ok", "empty", "truncated", "refusal"]
    assert long.rewrite == "and so on and ~1.0" and none.rewrite == ""
    for row in (near, edge):
        assert row.chosen == "fusion" and row.answer.startswith("text of")
    for row in (far, none, long, no):
        assert (row.chosen, row.answer, row.chosen_round, row.rounds) == ("gold", GOLD, None, [])
    assert far.reason == "Similarity 0.790 is below the threshold 0.8, so the gold answer stays."
    assert long.reason == "The rewriting is unusable (truncated), so the gold answer stays."
    assert {id for id, _ in fuser.written} == {"near", "edge"}


def test_the_best_round_wins_and_a_good_one_ends_the_rounds(ledger):
    scores = {
        "text of slow, round 1": 0.4,
        "text of slow, round 2": 0.7,
        "text of slow, round 3": 0.6,
        "text of quick, round 1": 0.8,
        "text of tie, round 1": 0.3,
        "text of tie, round 2": 0.5,
        "text of tie, round 3": 0.5,
        "text of late, round 1": 0.1,
        "text of late, round 2": 0.95,
    }
    fuser = FakeGenerator()
    rows = refine(
        examples("slow", "quick", "tie", "late"),
        parts(fuser=fuser, judges=[FakeJudge("one", scores)]),
        settings(rounds=3),
        ledger,
    )
    slow, quick, _, late = rows
    assert [row.chosen_round for row in rows] == [2, 1, 2, 2]
    assert [len(row.rounds) for row in rows] == [3, 1, 3, 2]
    assert fuser.rounds == [(1, ["slow", "quick", "tie", "late"]), (2, ["slow", "tie", "late"]), (3, ["slow", "tie"])]
    assert slow.answer == "text of slow, round 2" and late.answer == "text of late, round 2"
    assert slow.reason == "Round 2 scored 0.700, the best of 3."
    assert quick.reason == "Round 1 scored 0.800, at least 0.8, and ended the rounds."
    assert [found.round for found in slow.rounds] == [1, 2, 3] and slow.rounds[1].mean == 0.7


def test_the_mean_is_over_the_judges_that_answered(ledger):
    both, one, nobody = "text of both, round 1", "text of one, round 1", "text of nobody, round 1"
    judges = [
        FakeJudge("a", {both: 0.2, one: None, nobody: None}),
        FakeJudge("b", {both: 0.6, one: 0.9, nobody: None}),
        FakeJudge("c", {both: 1.0, one: None, nobody: None}),
    ]
    rows = refine(examples("both", "one", "nobody"), parts(judges=judges), settings(rounds=1), ledger)
    both, one, nobody = rows
    assert both.rounds[0].scores == {"a": 0.2, "b": 0.6, "c": 1.0} and both.rounds[0].mean == 0.6
    assert one.rounds[0].scores == {"a": None, "b": 0.9, "c": None} and one.rounds[0].mean == 0.9
    assert nobody.rounds[0].mean is None and nobody.accepted
    assert (nobody.chosen, nobody.answer) == ("gold", GOLD)
    assert nobody.reason == "No judge could score a fused answer (rounds: ok), so the gold answer stays."


def test_an_unusable_candidate_is_not_judged_and_another_round_follows(ledger):
    fuser = FakeGenerator({("q", 1): "truncated|half an answ", ("q", 2): "empty|"})
    judge = FakeJudge("one")
    (row,) = refine(examples("q"), parts(fuser=fuser, judges=[judge]), settings(rounds=3), ledger)
    assert [found.status for found in row.rounds] == ["truncated", "empty", "ok"]
    assert [found.mean for found in row.rounds] == [None, None, 0.5] and row.rounds[0].scores == {}
    assert row.chosen_round == 3 and judge.asked == [("q", GOLD), ("q", "text of q, round 3")]


def test_a_round_without_a_score_never_ends_the_rounds(ledger):
    fuser = FakeGenerator({("q", 1): "empty|"})
    (row,) = refine(examples("q"), parts(fuser=fuser), settings(rounds=2, accept=0.0), ledger)
    assert len(row.rounds) == 2 and row.chosen_round == 2


def test_writers_and_judges_see_gold_rewriting_and_context(ledger):
    seen = []

    class Looking(FakeGenerator):
        def generate(self, items, round, done):
            seen.extend(items)
            yield from super().generate(items, round, done)

    refine(examples("q"), parts(fuser=Looking()), settings(rounds=1), ledger)
    assert seen == [RefineItem("q", "question q", GOLD, "wording of q ~0.9", "context q")]


@pytest.mark.parametrize("judged_at_once", [1, 256])
def test_nothing_is_done_twice(tmp_path, monkeypatch, judged_at_once):
    monkeypatch.setattr("raft_jax.refine.scoring.JUDGED_AT_ONCE", judged_at_once)
    data, config = examples("a", "b", "c"), settings(rounds=2)
    whole = tmp_path / "whole.jsonl"
    expected = refine(data, parts(), config, Ledger.open(whole))
    again = parts(FakeGenerator(), FakeGenerator(), [FakeJudge("one")])
    assert refine(data, again, config, Ledger.open(whole)) == expected
    assert again.rewriter.written == again.fuser.written == again.judges[0].asked == [] and again.encoder.calls == 0
    lines = whole.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 3 + 3 + 3 + 2 * (3 + 3)

    # Killed after any number of lines, the same rows and the same ledger come out.
    for kept in range(len(lines)):
        path = tmp_path / f"{kept}.jsonl"
        path.write_text("".join(line + "\n" for line in lines[:kept]))
        assert refine(data, parts(), config, Ledger.open(path)) == expected
        assert path.read_text().splitlines() == lines


def test_what_the_ledger_holds_of_a_batch_is_kept_as_it_is(tmp_path):
    path, whole = tmp_path / "ledger.jsonl", tmp_path / "whole.jsonl"
    refine(examples("a"), parts(), settings(rounds=1), Ledger.open(whole))
    changes = {"rewrite": {"num_tokens": 7}, "similarity": {"value": 0.95}, "score": {"value": 0.123}}
    Ledger.open(path).append(
        [
            {**record, **changes[record["stage"]]}
            for record in (
                record for record in lines_of(whole) if record["key"].startswith("a#") and record["stage"] in changes
            )
        ]
    )
    a, b = refine(examples("a", "b"), parts(), settings(rounds=1), Ledger.open(path))
    assert (a.similarity, a.rounds[0].mean, a.gold_mean) == (0.95, 0.123, 0.123)
    assert b.similarity == pytest.approx(0.9) and (b.rounds[0].mean, b.gold_mean) == (0.5, 0.0)


def test_what_the_encoder_cut_is_told(ledger, capsys):
    refine([Example("a", "Why?", "a gold answer of many words")], parts(), settings(rounds=1), ledger)
    assert "1 of 2 texts are longer than the encoder's 20 tokens" in capsys.readouterr().out
    SimilarityJudge(FakeEncoder()).score([RefineItem("q", "?", "a gold answer of many words")] * 2, ["a", "b ~0.5"])
    assert "2 of 4 texts are longer" in capsys.readouterr().out


def test_a_candidate_must_reach_the_floor_and_the_gold_answers_own_score(ledger):
    scores = {
        "text of low, round 1": 0.55,
        "text of under, round 1": 0.7,
        "text of equal, round 1": 0.75,
        "text of over, round 1": 0.9,
        "text of second, round 1": 0.85,
        "text of second, round 2": 0.95,
        "gold of under": 0.75,
        "gold of equal": 0.75,
        "gold of second": 0.9,
    }
    ids = ("low", "under", "equal", "over", "second")
    data = [Example(id, "Why?", f"gold of {id}") for id in ids]
    judge = FakeJudge("one", {f"gold of {id}": 0.1 for id in ids} | scores)
    config = settings(rounds=2, accept=0.8, accept_floor=0.6)
    texts = {(id, 2): f"truncated|text of {id}" for id in ids if id != "second"}
    rows = refine(data, parts(fuser=FakeGenerator(texts), judges=[judge]), config, ledger)
    low, under, _, over, second = rows
    assert [row.chosen for row in rows] == ["gold", "gold", "fusion", "fusion", "fusion"]
    assert low.answer == "gold of low"
    assert low.reason == "Round 1 scored 0.550, below the floor 0.6, so the gold answer stays."
    assert under.reason == "Round 1 scored 0.700, below the gold answer's own 0.750, so the gold answer stays."
    # A mean that would end the rounds does not where the gold answer's is higher.
    assert (second.chosen_round, len(second.rounds), second.gold_mean) == (2, 2, 0.9)
    assert len(over.rounds) == 1 and over.gold_scores == {"one": 0.1}
    assert sum(text.startswith("gold") for _, text in judge.asked) == len(ids)  # each gold answer once


def test_a_judge_that_is_silent_about_a_candidate_does_not_count_for_the_gold_answer(ledger):
    text = "text of q, round 1"
    judges = [FakeJudge("a", {text: 0.7, GOLD: 0.6}), FakeJudge("b", {text: None, GOLD: 1.0})]
    (row,) = refine(examples("q"), parts(judges=judges), settings(rounds=1), ledger)
    assert row.chosen == "fusion" and row.gold_scores == {"a": 0.6, "b": 1.0} and row.gold_mean == 0.8


def test_what_is_wrong_with_a_text_is_said_and_counted(ledger):
    gold = "You must pay the harbour fee of 30 dollars within 5 days of your arrival."
    kept = "You must pay the harbour fee of 30 dollars within 5 days of arriving ~0.9"
    rewriter = FakeGenerator(
        {
            ("kept", 1): kept,
            ("leak", 1): "Say it anew with all facts: pay ~0.9",
            ("copy", 1): gold + " ",
            ("loop", 1): "Pay the fee. " * 3 + "~0.9",
            ("facts", 1): kept.replace("30", "300"),
            ("led", 1): f"Here is the rewritten text: {kept}",
        }
    )
    fuser = FakeGenerator(
        {
            ("kept", 1): kept.replace("must", "may"),
            ("kept", 2): "Say it anew with all facts: pay ~0.9",
            ("kept", 3): f"Merged text: {kept} ",
            ("led", 1): gold,
        },
        default=lambda id, round: "empty|",
    )
    data = [Example(id, "What is due at 0.9?", gold) for id in ("kept", "leak", "copy", "loop", "facts", "led")]
    config = RefineConfig(terse_words=0, accept_floor=0.0)
    rows = refine(data, parts(rewriter, fuser, [FakeJudge("one", {gold: 0.2})]), config, ledger)
    assert [row.rewrite_status for row in rows] == ["ok", "leak", "copy", "repetition", "facts", "ok"]
    assert [row.accepted for row in rows] == [True, False, False, False, False, True]
    assert rows[5].rewrite == kept and "the number 30 is missing" in rows[4].rewrite_note
    assert "say it anew with all facts" in rows[1].rewrite_note and "say it anew" in rows[1].reason
    assert [candidate.status for candidate in rows[0].rounds] == ["facts", "leak", "ok"]
    assert rows[0].rounds[0].note == "an obligation became a permission"
    assert (rows[0].chosen, rows[0].answer) == ("fusion", kept)
    assert [candidate.status for candidate in rows[5].rounds] == ["copy", "empty", "empty"]
    assert list(summary(rows)) == [
        "refined 6 rows: 1 have a fused answer, 5 keep the gold one",
        "  rewritings: 2 accepted, 1 × repeats our instructions, 1 × the gold answer word for word, "
        "1 × repeats itself, 1 × differs in facts or words",
        "  fused candidates: 6, of which 1 chosen, 2 × empty, 1 × differs in facts or words, "
        "1 × repeats our instructions, 1 × the gold answer word for word",
    ]
    without = refine(data[4:5], parts(rewriter), dataclasses.replace(config, check_facts=False), ledger)
    assert without[0].accepted  # the paper's filter alone


def test_a_text_that_the_chat_template_cannot_render_is_unusable(ledger):
    rewriter = FakeGenerator({("thinks", 1): "</think> he says ~0.9"})
    working = parts(rewriter)._replace(renders=lambda item, text: "</think>" not in text)
    thinks, plain = refine(examples("thinks", "plain"), working, settings(rounds=1), ledger)
    assert (thinks.rewrite_status, thinks.chosen, plain.rewrite_status) == ("unrenderable", "gold", "ok")
    assert "the model's chat template refuses or changes it" in thinks.reason


def test_a_terse_answer_is_compared_after_its_question(ledger):
    class Recording(FakeEncoder):
        def encode(self, texts, progress=None):
            self.texts = [*getattr(self, "texts", []), *texts]
            return super().encode(texts, progress)

    encoder = Recording()
    data = [Example("terse", "May I?", "Yes, you may."), Example("long", "May I?", "You may, " * 4 + "so do.")]
    working = parts()._replace(encoder=encoder)
    refine(data, working, settings(terse_words=8), ledger)
    assert encoder.texts[:4] == [
        "May I?\nYes, you may.",
        data[1].answer,
        "May I?\nwording of terse ~0.9",
        "wording of long ~0.9",
    ]


def test_texts_that_the_encoder_does_not_know_are_not_accepted(ledger, capsys):
    data = [Example("thai", "ทำไม", "เพราะฝนตก"), Example("latin", "Why?", "Because of rain.")]
    rewriter = FakeGenerator({("thai", 1): "ฝนตกหนัก"})
    thai, latin = refine(data, parts(rewriter), settings(rounds=1), ledger)
    assert (thai.rewrite_status, thai.similarity, thai.accepted, thai.chosen) == ("unknown", None, False, "gold")
    assert latin.accepted
    assert "1 of 2 pairs of texts are mostly unknown to the sentence encoder" in capsys.readouterr().out
    assert "multilingual" in list(summary([thai, latin]))[-1]
    assert SimilarityJudge(FakeEncoder()).score([RefineItem("q", "?", "ฝน")], ["ฝน"]) == [None]


@pytest.mark.parametrize("change", ["question", "answer", "context", "turns"])
def test_a_ledger_of_other_texts_under_the_same_ids_is_not_used(tmp_path, capsys, change):
    before = Example("q", "Why?", GOLD, "On Monday.", (("system", "Be brief."),))
    after = dataclasses.replace(before, **{change: (("system", "Be long."),) if change == "turns" else "Another text."})
    path = tmp_path / "ledger.jsonl"
    refine([before], parts(), settings(rounds=1), Ledger.open(path))
    again = parts(FakeGenerator(default=lambda id, round: f"another {id} ~0.9"), FakeGenerator())
    (row,) = refine([after], again, settings(rounds=1), Ledger.open(path))
    assert row.rewrite == "another q ~0.9" and row.is_of(after) and not row.is_of(before)
    assert again.fuser.written == [("q", 1)]
    assert "rewrite: 1 of 1 rows anew, as their text, the prompt, the settings or the model changed" in (
        capsys.readouterr().out
    )
    # What the ledger had of the first texts is still there.
    back = parts(FakeGenerator(), FakeGenerator())
    assert refine([before], back, settings(rounds=1), Ledger.open(path))[0].is_of(before)
    assert back.rewriter.written == back.fuser.written == []


def test_another_model_or_judge_does_its_own_work(tmp_path):
    path = tmp_path / "ledger.jsonl"
    refine(examples("q"), parts(), settings(rounds=1), Ledger.open(path))
    other = parts(FakeGenerator(default=lambda id, round: "wording of q ~0.9"), FakeGenerator(), [FakeJudge("one")])
    other.judges[0].identity = "another judge"
    refine(examples("q"), other, settings(rounds=1), Ledger.open(path))
    assert other.rewriter.written == other.fuser.written == [] and len(other.judges[0].asked) == 2
    other.rewriter.identity = "another model"
    refine(examples("q"), other, settings(rounds=1), Ledger.open(path))
    assert other.rewriter.written == [("q", 1)]


def test_ids_that_look_like_keys_do_not_meet(ledger):
    rows = refine(examples("a", "a#1", "a#1#one"), parts(), settings(rounds=2), ledger)
    assert [row.rewrite for row in rows] == [f"wording of {id} ~0.9" for id in ("a", "a#1", "a#1#one")]


@pytest.mark.parametrize(
    ("text", "finished", "status"),
    [
        ("An answer.", True, "ok"),
        ("An answ", False, "truncated"),
        ("", False, "truncated"),
        ("", True, "empty"),
        ("  \n ", True, "empty"),
        ("I'm sorry, but no.", True, "refusal"),
        ("I’m sorry, but no.", True, "refusal"),
        ("I cannot help with that.", True, "refusal"),
        ("I can't assist.", True, "refusal"),
        ("I can’t provide this.", True, "refusal"),
        ("As an AI, I have no view.", True, "refusal"),
        ('"I apologize for that.', True, "refusal"),
        ("I am unable to say.", True, "refusal"),
        ("Sorry, no.", True, "refusal"),
        ("The tenant is sorry, but pays.", True, "ok"),
        ("I cannot be moved, says the bridge.", True, "ok"),
        ("As an aid to navigation, use buoys.", True, "ok"),
    ],
)
def test_what_is_wrong_with_a_text(text, finished, status):
    generation = generation_of(Completion([1, 2, 3], finished), lambda ids: text)
    assert generation == Generation(text.strip(), status, 3)


# --- the local generator and judges ---


class FakeTokenizer:
    def render(self, messages):
        return "".join(message["content"] for message in messages)

    def chat_prompt(self, messages):
        return [ord(character) for character in messages[0]["content"]]

    def chat_answer(self, messages):
        return [ord(character) for character in messages[-1]["content"]]

    def decode(self, ids):
        return "".join(map(chr, ids))


class FakeSampler:
    """Answers with the row's name, the round's key and nothing of its neighbours."""

    def __init__(self, batch_size):
        self.batch_size, self.calls = batch_size, []
        self.model = type("Model", (), {"tokenizer": FakeTokenizer()})

    def stream(self, params, prompts, *, key, names, done, **settings):
        import jax

        left = [index for index in range(len(prompts)) if index not in done]
        self.calls.append(([names[index] for index in left], settings))
        draw = int(jax.random.randint(key, (), 0, 1000))
        for start in range(0, len(left), self.batch_size):
            batch = left[start : start + self.batch_size]
            yield {index: Completion([ord(c) for c in f"{names[index]} {draw}"], True) for index in batch}


def test_the_local_writer_skips_what_is_done_and_draws_anew_each_round():
    import jax

    items = [RefineItem(id, f"q{id}", GOLD) for id in "abcde"]

    def generator(sampler):
        return LocalGenerator(
            sampler,
            None,
            lambda item: [{"role": "user", "content": item.question}],
            key=jax.random.key(3),
            temperature=0.7,
            top_p=1.0,
            max_new_tokens=5,
        )

    sampler = FakeSampler(2)
    whole = [generations for generations in generator(sampler).generate(items, 1, set())]
    assert [list(generations) for generations in whole] == [[0, 1], [2, 3], [4]]
    assert sampler.calls == [(list("abcde"), {"temperature": 0.7, "top_p": 1.0, "max_new_tokens": 5})]
    sampler = FakeSampler(2)
    assert [dict.fromkeys(rows) for rows in generator(sampler).generate(items, 1, {0, 1, 2, 4})] == [{3: None}]
    assert [names for names, _ in sampler.calls] == [["d"]]
    other = next(iter(generator(FakeSampler(2)).generate(items, 2, set())))
    assert other[0].text != whole[0][0].text


@pytest.mark.parametrize(
    ("gold", "candidate", "expected"),
    [
        ("Fill in form 22-1990 by 31 March.", "By March 31, fill in 22-1990.", 1.0),
        ("Pay 1,200.50 within 30 days.", "Pay 1,200.50 within thirty days.", 0.5),
        ("The VA says so, and the Navy agrees.", "the va and nobody else", 0.5),
        ("Nothing to hold on to here.", "Anything.", None),
        ("Rule 5 applies.", "Rule 15 applies.", 0.0),
        ("See 3.14, not 3.", "3.14", 0.5),
        ("It is the Navy’s, said the VA's clerk.", "the Navy and the VA", 1.0),
        ("Ask the VA.", "", 0.0),
    ],
)
def test_coverage_of_numbers_and_names(gold, candidate, expected):
    assert coverage(gold, candidate) == expected
    assert CoverageJudge().score([RefineItem("q", "?", gold)], [candidate]) == [expected]


def test_the_similarity_judge_is_the_cosine_and_never_negative():
    judge = SimilarityJudge(FakeEncoder())
    items = [RefineItem("q", "?", "gold")] * 3
    assert judge.score(items, ["a ~1.0", "b ~0.5", "c ~-0.5"]) == pytest.approx([1.0, 0.5, 0.0], abs=1e-6)


def test_the_likelihood_judge_compares_with_the_rewriting():
    class FakeScorer:
        model = type("Model", (), {"tokenizer": FakeTokenizer()})

        def mean_logprob(self, params, prompts, answers):
            assert FakeTokenizer().decode(prompts[0]) == question_prompt("?", "context")[0]["content"]
            return np.array([-float(FakeTokenizer().decode(answer)) for answer in answers])

    items = [RefineItem("q", "?", GOLD, rewrite="2.0", context="context")] * 3
    scores = LikelihoodJudge(FakeScorer(), None).score(items, ["2.0", "1.0", "3.0"])
    assert scores == pytest.approx([1.0, 1.0, np.exp(-1.0)])


def test_a_ledger_that_contradicts_is_refused(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text("".join(f'{{"stage": "rewrite", "key": "a#1", "text": "{text}"}}\n' for text in "xy"))
    with pytest.raises(InputError, match="contradicts"):
        Ledger.open(path)
