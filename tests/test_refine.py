"""The refinement with writers and judges that say what they are told to (Eqs. 1-4)."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from raft_jax.config import RefineConfig
from raft_jax.data.examples import Example
from raft_jax.errors import InputError
from raft_jax.refine import judge as judging
from raft_jax.refine.judge import CoverageJudge, LikelihoodJudge, SimilarityJudge, coverage
from raft_jax.refine.ledger import Ledger
from raft_jax.refine.run import Parts, refine
from raft_jax.refine.write import Draft, Item, LocalWriter, draft_of
from raft_jax.sampling import Completion

GOLD = "gold answer"


class FakeWriter:
    """Writes `texts[(id, round)]`, or what `default` makes of id and round; a status may stand before a bar."""

    def __init__(self, texts: dict | None = None, default=lambda id, round: f"text of {id}, round {round}", batch=2):
        self.texts, self.default, self.batch = texts or {}, default, batch
        self.written: list[tuple[str, int]] = []
        self.rounds: list[tuple[int, list[str]]] = []

    def write(self, items, round, done):
        self.rounds.append((round, [item.id for item in items]))
        for start in range(0, len(items), self.batch):
            indices = range(start, min(start + self.batch, len(items)))
            if all(index in done for index in indices):
                continue
            drafts = {}
            for index in indices:
                text = self.texts.get((items[index].id, round), self.default(items[index].id, round))
                status, bar, rest = text.partition("|")
                drafts[index] = Draft(rest if bar else text, status if bar else "ok", 3)
                self.written.append((items[index].id, round))
            yield drafts


class FakeEncoder:
    """Two texts are as similar as the number that the second one ends in."""

    config = SimpleNamespace(max_tokens=20)

    def __init__(self):
        self.calls = self.num_truncated = 0

    def encode(self, texts, progress=None):
        self.calls += 1
        self.num_truncated = sum(len(text) > 20 for text in texts)
        angles = [np.arccos(float(text.rpartition("~")[2])) if "~" in text else 0.0 for text in texts]
        return np.array([[np.cos(angle), np.sin(angle)] for angle in angles])


class FakeJudge:
    def __init__(self, name: str, scores: dict | None = None, default: float | None = 0.5):
        self.name, self.scores, self.default = name, scores or {}, default
        self.asked: list[tuple[str, str]] = []

    def score(self, items, candidates):
        pairs = [(item.id, text) for item, text in zip(items, candidates, strict=True)]
        self.asked += pairs
        return [self.scores.get(text, self.default) for _, text in pairs]


def examples(*ids: str) -> list[Example]:
    return [Example(id, f"question {id}", GOLD, context=f"context {id}") for id in ids]


def parts(rewriter=None, fuser=None, judges=None) -> Parts:
    rewriter = rewriter or FakeWriter(default=lambda id, round: f"rewrite of {id} ~0.9")
    return Parts(rewriter, FakeEncoder(), fuser or FakeWriter(), judges or [FakeJudge("one")])


@pytest.fixture
def ledger(tmp_path):
    return Ledger.open(tmp_path / "ledger.jsonl")


def test_the_filter_keeps_what_is_near_and_usable(ledger):
    rewriter = FakeWriter({
        ("near", 1): "near ~0.91", ("edge", 1): "edge ~0.8", ("far", 1): "far ~0.79", ("none", 1): "empty|",
        ("long", 1): "truncated|and so on and ~1.0", ("no", 1): "refusal|I'm sorry ~1.0",
    })
    fuser = FakeWriter()
    rows = refine(examples("near", "edge", "far", "none", "long", "no"), parts(rewriter, fuser), RefineConfig(), ledger)
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
        "text of slow, round 1": 0.4, "text of slow, round 2": 0.7, "text of slow, round 3": 0.6,
        "text of quick, round 1": 0.8,
        "text of tie, round 1": 0.3, "text of tie, round 2": 0.5, "text of tie, round 3": 0.5,
        "text of late, round 1": 0.1, "text of late, round 2": 0.95,
    }
    fuser = FakeWriter()
    rows = refine(examples("slow", "quick", "tie", "late"), parts(fuser=fuser, judges=[FakeJudge("one", scores)]),
                  RefineConfig(rounds=3), ledger)
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
        FakeJudge("a", {both: 0.2, one: None, nobody: None}), FakeJudge("b", {both: 0.6, one: 0.9, nobody: None}),
        FakeJudge("c", {both: 1.0, one: None, nobody: None}),
    ]
    rows = refine(examples("both", "one", "nobody"), parts(judges=judges), RefineConfig(rounds=1), ledger)
    both, one, nobody = rows
    assert both.rounds[0].scores == {"a": 0.2, "b": 0.6, "c": 1.0} and both.rounds[0].mean == 0.6
    assert one.rounds[0].scores == {"a": None, "b": 0.9, "c": None} and one.rounds[0].mean == 0.9
    assert nobody.rounds[0].mean is None and nobody.accepted
    assert (nobody.chosen, nobody.answer) == ("gold", GOLD)
    assert nobody.reason == "No judge could score a fused answer (rounds: ok), so the gold answer stays."


def test_an_unusable_candidate_is_not_judged_and_another_round_follows(ledger):
    fuser = FakeWriter({("q", 1): "truncated|half an answ", ("q", 2): "empty|"})
    judge = FakeJudge("one")
    (row,) = refine(examples("q"), parts(fuser=fuser, judges=[judge]), RefineConfig(rounds=3), ledger)
    assert [found.status for found in row.rounds] == ["truncated", "empty", "ok"]
    assert [found.mean for found in row.rounds] == [None, None, 0.5] and row.rounds[0].scores == {}
    assert row.chosen_round == 3 and judge.asked == [("q", "text of q, round 3")]


def test_a_round_without_a_score_never_ends_the_rounds(ledger):
    fuser = FakeWriter({("q", 1): "empty|"})
    (row,) = refine(examples("q"), parts(fuser=fuser), RefineConfig(rounds=2, accept=0.0), ledger)
    assert len(row.rounds) == 2 and row.chosen_round == 2


def test_writers_and_judges_see_gold_rewriting_and_context(ledger):
    seen = []

    class Looking(FakeWriter):
        def write(self, items, round, done):
            seen.extend(items)
            yield from super().write(items, round, done)

    refine(examples("q"), parts(fuser=Looking()), RefineConfig(rounds=1), ledger)
    assert seen == [Item("q", "question q", GOLD, "rewrite of q ~0.9", "context q")]


@pytest.mark.parametrize("judged_at_once", [1, 256])
def test_nothing_is_done_twice(tmp_path, monkeypatch, judged_at_once):
    monkeypatch.setattr("raft_jax.refine.run.JUDGED_AT_ONCE", judged_at_once)
    data, settings = examples("a", "b", "c"), RefineConfig(rounds=2)
    whole = tmp_path / "whole.jsonl"
    expected = refine(data, parts(), settings, Ledger.open(whole))
    again = parts(FakeWriter(), FakeWriter(), [FakeJudge("one")])
    assert refine(data, again, settings, Ledger.open(whole)) == expected
    assert again.rewriter.written == again.fuser.written == again.judges[0].asked == [] and again.encoder.calls == 0
    lines = whole.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 3 + 3 + 2 * (3 + 3)

    # Killed after any number of lines, the same rows and the same ledger come out.
    for kept in range(len(lines)):
        path = tmp_path / f"{kept}.jsonl"
        path.write_text("".join(line + "\n" for line in lines[:kept]))
        assert refine(data, parts(), settings, Ledger.open(path)) == expected
        assert path.read_text().splitlines() == lines


def test_what_the_ledger_holds_of_a_batch_is_kept_as_it_is(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger.open(path).append([
        {"stage": "rewrite", "key": "a#1", "text": "kept ~0.95", "status": "ok", "num_tokens": 1},
        {"stage": "similarity", "key": "a", "value": 0.95},
        {"stage": "fuse", "key": "a#1", "text": "kept fusion", "status": "ok", "num_tokens": 1},
        {"stage": "score", "key": "a#1#one", "value": 0.123},
    ])
    a, b = refine(examples("a", "b"), parts(), RefineConfig(rounds=1), Ledger.open(path))
    assert (a.rewrite, a.similarity, a.answer, a.rounds[0].mean) == ("kept ~0.95", 0.95, "kept fusion", 0.123)
    assert b.rewrite == "rewrite of b ~0.9" and b.rounds[0].mean == 0.5


def test_what_the_encoder_cut_is_told(ledger, capsys):
    refine([Example("a", "Why?", "a gold answer of many words")], parts(), RefineConfig(rounds=1), ledger)
    assert "1 of 2 texts are longer than the encoder's 20 tokens" in capsys.readouterr().out
    SimilarityJudge(FakeEncoder()).score([Item("q", "?", "a gold answer of many words")] * 2, ["a", "b ~0.5"])
    assert "2 of 4 texts are longer" in capsys.readouterr().out


def test_ids_that_look_like_keys_do_not_meet(ledger):
    rows = refine(examples("a", "a#1", "a#1#one"), parts(), RefineConfig(rounds=2), ledger)
    assert [row.rewrite for row in rows] == [f"rewrite of {id} ~0.9" for id in ("a", "a#1", "a#1#one")]


@pytest.mark.parametrize(("text", "finished", "status"), [
    ("An answer.", True, "ok"), ("An answ", False, "truncated"), ("", False, "truncated"), ("", True, "empty"),
    ("  \n ", True, "empty"), ("I'm sorry, but no.", True, "refusal"), ("I’m sorry, but no.", True, "refusal"),
    ("I cannot help with that.", True, "refusal"), ("I can't assist.", True, "refusal"),
    ("I can’t provide this.", True, "refusal"), ("As an AI, I have no view.", True, "refusal"),
    ("\"I apologize for that.", True, "refusal"), ("I am unable to say.", True, "refusal"),
    ("Sorry, no.", True, "refusal"), ("The tenant is sorry, but pays.", True, "ok"),
    ("I cannot be moved, says the bridge.", True, "ok"), ("As an aid to navigation, use buoys.", True, "ok"),
])
def test_what_is_wrong_with_a_text(text, finished, status):
    draft = draft_of(Completion([1, 2, 3], finished), lambda ids: text)
    assert draft == Draft(text.strip(), status, 3)


# --- the local writer and judges ---


class FakeTokenizer:
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

    def batches(self, prompts):
        return [list(range(start, min(start + self.batch_size, len(prompts))))
                for start in range(0, len(prompts), self.batch_size)]

    def generate(self, params, prompts, *, key, names, **settings):
        import jax

        self.calls.append((names, settings))
        draw = int(jax.random.randint(key, (), 0, 1000))
        return [Completion([ord(c) for c in f"{name} {draw}"], True) for name in names]


def test_the_local_writer_skips_whole_batches_and_draws_anew_each_round():
    import jax

    items = [Item(id, f"q{id}", GOLD) for id in "abcde"]

    def writer(sampler):
        return LocalWriter(sampler, None, lambda item: [{"role": "user", "content": item.question}],
                           key=jax.random.key(3), temperature=0.7, top_p=1.0, max_new_tokens=5)

    sampler = FakeSampler(2)
    whole = [drafts for drafts in writer(sampler).write(items, 1, set())]
    assert [list(drafts) for drafts in whole] == [[0, 1], [2, 3], [4]]
    assert sampler.calls[0] == (["a", "b"], {"temperature": 0.7, "top_p": 1.0, "max_new_tokens": 5})
    # One row of the second batch is missing: the batch is written as it was, not another one.
    sampler = FakeSampler(2)
    assert list(writer(sampler).write(items, 1, {0, 1, 2, 4})) == [whole[1]]
    assert [names for names, _ in sampler.calls] == [["c", "d"]]
    other = next(iter(writer(FakeSampler(2)).write(items, 2, set())))
    assert other[0].text != whole[0][0].text


@pytest.mark.parametrize(("gold", "candidate", "expected"), [
    ("Fill in form 22-1990 by 31 March.", "By March 31, fill in 22-1990.", 1.0),
    ("Pay 1,200.50 within 30 days.", "Pay 1,200.50 within thirty days.", 0.5),
    ("The VA says so, and the Navy agrees.", "the va and nobody else", 0.5),
    ("Nothing to hold on to here.", "Anything.", None),
    ("Rule 5 applies.", "Rule 15 applies.", 0.0),
    ("See 3.14, not 3.", "3.14", 0.5),
    ("It is the Navy’s, said the VA's clerk.", "the Navy and the VA", 1.0),
    ("Ask the VA.", "", 0.0),
])
def test_coverage_of_numbers_and_names(gold, candidate, expected):
    assert coverage(gold, candidate) == expected
    assert CoverageJudge().score([Item("q", "?", gold)], [candidate]) == [expected]


def test_the_similarity_judge_is_the_cosine_and_never_negative():
    judge = SimilarityJudge(FakeEncoder())
    items = [Item("q", "?", "gold")] * 3
    assert judge.score(items, ["a ~1.0", "b ~0.5", "c ~-0.5"]) == pytest.approx([1.0, 0.5, 0.0], abs=1e-6)


def test_the_likelihood_judge_compares_with_the_rewriting():
    class FakeScorer:
        model = type("Model", (), {"tokenizer": FakeTokenizer()})

        def mean_logprob(self, params, prompts, answers):
            assert FakeTokenizer().decode(prompts[0]) == judging.question_prompt("?", "context")[0]["content"]
            return np.array([-float(FakeTokenizer().decode(answer)) for answer in answers])

    items = [Item("q", "?", GOLD, rewrite="2.0", context="context")] * 3
    scores = LikelihoodJudge(FakeScorer(), None).score(items, ["2.0", "1.0", "3.0"])
    assert scores == pytest.approx([1.0, 1.0, np.exp(-1.0)])


def test_a_ledger_that_contradicts_is_refused(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text("".join(f'{{"stage": "rewrite", "key": "a#1", "text": "{text}"}}\n' for text in "xy"))
    with pytest.raises(InputError, match="contradicts"):
        Ledger.open(path)
