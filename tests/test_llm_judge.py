"""A model as a judge: what is taken for a score, what is asked again, and what it is shown."""

from __future__ import annotations

import json

import pytest
from fake_chat import Answer, FakeChat, says
from test_endpoint import QUICK
from test_refine import GOLD, FakeGenerator, examples, lines_of, parts, settings

from raft_jax.config import EndpointConfig
from raft_jax.data.prompts import load_prompts
from raft_jax.refine.endpoint import Endpoint
from raft_jax.refine.generate import RefineItem
from raft_jax.refine.judge import AskedJudge, CoverageJudge
from raft_jax.refine.ledger import Ledger
from raft_jax.refine.llm_judge import CORRECTION, MOST_ASKS, LLMJudge, read_judgement
from raft_jax.refine.run import refine


def judge_of(server: FakeChat, name="strong", seed=0, **settings) -> LLMJudge:
    endpoint = Endpoint(name, EndpointConfig(**{"base_url": server.base_url, "model": "big"} | settings), QUICK)
    return LLMJudge(endpoint, load_prompts().judge, seed=seed, prompt_hash=load_prompts().digest("judge"))


def score(value, reason="So it is.") -> Answer:
    return says(json.dumps({"score": value, "reason": reason}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"score": 0.75, "reason": "Good."}', (0.75, "Good.")),
        ('{"score": 1, "reason": "Good."}', (1.0, "Good.")),
        ('{"score": "0.5"}', (0.5, "")),
        ('```json\n{"reason": "A\\nB", "score": 0}\n```', (0.0, "A B")),
        ('Well. {"note": {"a": 1}} {"score": 0.5, "reason": "x"} Thanks {', (0.5, "x")),
        ('{"score": 0.5, "reason": "x"} again: {"score": 0.5, "reason": "y"}', (0.5, "y")),
        ("Score: 0.8", (0.8, "")),
        ("**Score:** 1\nIt is fine.", (1.0, "")),
        ("The score is .25.", (0.25, "")),
    ],
)
def test_scores_are_read(text, expected):
    assert read_judgement(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "Good.",
        "0.8",
        '{"score": 1.5}',
        '{"score": -0.1}',
        '{"score": NaN}',
        '{"score": Infinity}',
        '{"score": true}',
        '{"score": null}',
        '{"score": "high"}',
        '{"score": [0.5]}',
        '{"score": 0.0, "reason": "as in the example"} {"score": 0.9, "reason": "mine"}',
        "Score: 8/10",
        "Score: 0.8/10",
        "Score: 1%",
        "Score: 10",
        "score: 0.5 or score: 0.7",
        '{"score": 0.5',
        "{" * 5000,
        '{"a":' * 5000,
    ],
)
def test_nothing_else_is_taken_for_a_score(text):
    with pytest.raises(ValueError, match="score"):
        read_judgement(text)


def test_what_a_judge_is_told_is_no_score_when_it_repeats_it():
    prompts = load_prompts()
    told = [*prompts.judge("Q?", "", "A.", "B."), *prompts.judge_open("Q?", "", "A.", "B.")]
    for text in (CORRECTION, *(turn["content"] for turn in told)):
        with pytest.raises(ValueError, match="no score"):
            read_judgement(text)


def test_an_unreadable_reply_is_corrected_twice_and_then_is_no_score():
    """Row 0 answers at once, 1 after one correction, 2 after an empty and a cut reply, 3 never."""
    replies = {
        "candidate 0": [score(0.9, "First.")],
        "candidate 1": [says("I like it."), score(0.8)],
        "candidate 2": [says(""), says('{"score": 0.', "length"), score(0.7)],
        "candidate 3": [says("No.")] * 9,
    }
    seen = {name: [] for name in replies}

    def reply(body, count):
        name = next(name for name in replies if name in str(body["messages"]))
        seen[name].append(body)
        return replies[name][len(seen[name]) - 1]

    with FakeChat(reply) as server:
        judge = judge_of(server)
        assert isinstance(judge, AskedJudge) and not isinstance(CoverageJudge(), AskedJudge)
        items = [RefineItem(str(n), "Why?", GOLD) for n in range(4)]
        found, unreadable = {}, []
        for judgements in judge.judge(items, [f"candidate {n}" for n in range(4)], [[] for _ in items]):
            for index, judgement in judgements.items():
                if judgement.status == "unreadable":
                    unreadable.append((index, judgement.text))
                else:
                    assert index not in found
                    found[index] = judgement
        judge.chat.close()
    assert [found[n].value for n in range(4)] == [0.9, 0.8, 0.7, None]
    assert found[0].reason == "First." and "no score after 3 asks: no score in 'No.'" in found[3].reason
    assert [len(seen[f"candidate {n}"]) for n in range(4)] == [1, 2, 3, MOST_ASKS]
    assert sorted(unreadable) == [(1, "I like it."), (2, ""), (2, '{"score": 0.'), (3, "No."), (3, "No.")]
    roles = [[message["role"] for message in body["messages"]] for body in seen["candidate 1"]]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"]]
    corrected = seen["candidate 1"][1]["messages"]
    assert corrected[2]["content"] == "I like it." and "one JSON object and nothing else" in corrected[3]["content"]
    assert [message["role"] for message in seen["candidate 2"][1]["messages"]] == ["system", "user"]


def test_the_order_of_the_texts_is_drawn_and_neither_round_nor_model_is_told():
    with FakeChat(lambda body, count: score(0.5)) as server:
        orders = []
        for seed in (0, 0, 1):
            judge = judge_of(server, seed=seed)
            items = [
                RefineItem(f"row-{n}", "Why?", GOLD, rewrite="a rewriting", context="On Monday.") for n in range(40)
            ]
            judge.score(items, ["a candidate"] * 40)
            judge.chat.close()
            texts = {body["seed"]: body["messages"][-1]["content"] for body in server.asked[-40:]}
            by_row = [text for _, text in sorted(texts.items())]
            orders.append([text.index("Candidate answer:\na cand") < text.index("Reference") for text in by_row])
            for text in texts.values():
                assert text.count(GOLD) == text.count("a candidate") == 1 and "On Monday.\n\nWhy?" in text
                assert not any(told in text for told in ("row-", "rewriting", "big", "round", "strong"))
        assert orders[0] == orders[1] != orders[2] and 8 < sum(orders[0]) < 32
        assert {body["temperature"] for body in server.asked} == {0.0}


def test_judges_that_do_not_answer_leave_the_gold_answer_and_say_why(tmp_path):
    """One judge fails on `none` and `one`, the other on `none`. This is not recorded, and they are asked again."""
    broken = [True]

    def reply(body, count):
        text = body["messages"][-1]["content"]
        if broken[0] and ("of none" in text or ("of one" in text and body["model"] == "big")):
            return Answer(b"", 400)
        return score(0.9 if body["model"] == "big" else 0.7)

    path = tmp_path / "ledger.jsonl"
    with FakeChat(reply) as server:
        judges = [judge_of(server), judge_of(server, "other", model="small")]
        ledger = Ledger.open(path)
        data = examples("both", "one", "none")
        both, one, none = refine(data, parts(judges=judges), settings(rounds=1), ledger)
        assert (both.rounds[0].scores, both.rounds[0].mean) == ({"strong": 0.9, "other": 0.7}, 0.8)
        assert both.rounds[0].reasons == {"strong": "So it is.", "other": "So it is."} and both.gold_scores == {}
        assert (one.rounds[0].scores, one.rounds[0].mean) == ({"strong": None, "other": 0.7}, 0.7)
        assert one.chosen == "fusion" and "HTTP 400" in one.rounds[0].reasons["strong"]
        assert (none.chosen, none.answer, none.rounds[0].mean) == ("gold", GOLD, None)
        assert "No judge could score" in none.reason and "strong: HTTP 400, 1 try" in none.reason
        assert ledger.num_failures == 3
        recorded, asked = path.read_text(), len(server.asked)
        broken[0] = False
        rows = refine(data, parts(FakeGenerator(), FakeGenerator(), judges), settings(rounds=1), Ledger.open(path))
        assert [row.rounds[0].scores for row in rows] == [{"strong": 0.9, "other": 0.7}] * 3
        assert len(server.asked) == asked + 3 and path.read_text().startswith(recorded)
        for judge in judges:
            judge.chat.close()


def test_replies_without_a_score_are_recorded_and_not_asked_for_again(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with FakeChat(lambda body, count: says("No.") if len(body["messages"]) < 6 else score(0.9)) as server:
        judge = judge_of(server)
        refine(examples("q"), parts(judges=[judge]), settings(rounds=1), Ledger.open(path))
        whole = path.read_text()
        assert [record["stage"] for record in lines_of(path)][-3:] == ["ask", "ask", "score"]
        lines = whole.splitlines(keepends=True)
        for kept in range(len(lines) - 3, len(lines)):  # killed after none, one or two of the replies
            path.write_text("".join(lines[:kept]))
            asked = len(server.asked)
            (row,) = refine(examples("q"), parts(judges=[judge]), settings(rounds=1), Ledger.open(path))
            assert row.rounds[0].mean == 0.9 and len(server.asked) - asked == len(lines) - kept
        judge.chat.close()
    (record,) = [record for record in lines_of(path) if record["stage"] == "score"]
    assert record["value"] == 0.9 and record["reason"] == "So it is." and record["model"] == "big"
    assert (record["prompt_tokens"], record["num_tokens"], record["finish"], record["retries"]) == (10, 5, "stop", 0)
    assert len(record["settings"]) == len(record["prompt"]) == 8 and record["seconds"] >= 0
