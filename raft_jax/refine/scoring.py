"""Scores of texts by judges, from the ledger or from the judge, which are recorded as they come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from raft_jax.progress import progress
from raft_jax.refine.chat import FAILED
from raft_jax.refine.generate import RefineItem, digest
from raft_jax.refine.judge import AskedJudge, Judge
from raft_jax.refine.ledger import Ledger
from raft_jax.refine.pace import Pace

JUDGED_AT_ONCE = 256  # rows that are scored between two writes to the ledger


class Scored(NamedTuple):
    """The judges' scores of a text, and what they say to them, by the judges' names."""

    scores: dict[str, float | None]
    reasons: dict[str, str]


def score_key(judge: Judge, item: RefineItem, text: str) -> str:
    """The key of a score's record: id, judge, and a hash of everything that the score depends on."""
    return f"{item.id}#{judge.name}#{digest(judge.identity, item.source, item.gold, item.rewrite, text)}"


def scores_of(
    judges: Sequence[Judge], every_item: Sequence[RefineItem], text_of: Mapping[int, str], title: str, ledger: Ledger
) -> dict[int, Scored]:
    """Each judge's score of one text for some of the items, by the item's index; from the ledger or from the judge."""
    items, texts = [every_item[index] for index in text_of], list(text_of.values())
    scored = [Scored({}, {}) for _ in items]
    for judge in judges:
        keys = [score_key(judge, item, text) for item, text in zip(items, texts, strict=True)]
        title_of_judge = f"judge {judge.name}, {title}"
        if isinstance(judge, AskedJudge):
            _ask(judge, items, texts, keys, title_of_judge, ledger)
            for key in keys:
                _heard(key, ledger)  # so that these replies count as used
        else:
            compute_scores(judge, items, texts, keys, title_of_judge, ledger)
        for judgements, key in zip(scored, keys, strict=True):
            if ("score", key) not in ledger:
                judgements.scores[judge.name], reason = None, ledger.failure("score", key)
            else:
                judgements.scores[judge.name], reason = (
                    ledger["score", key]["value"],
                    ledger["score", key].get("reason"),
                )
            if reason:
                judgements.reasons[judge.name] = reason
    return dict(zip(text_of, scored, strict=True))


def compute_scores(
    judge: Judge, items: Sequence[RefineItem], texts: Sequence[str], keys: Sequence[str], title: str, ledger: Ledger
) -> None:
    """Records the scores of a judge that is a program.

    A group is always judged as a whole, even if some of its scores are in the ledger: the rounding of a score may
    depend on the other rows of the group.
    """
    every = range(len(items))
    groups = [every[start : start + JUDGED_AT_ONCE] for start in range(0, len(items), JUDGED_AT_ONCE)]
    left = [group for group in groups if any(("score", keys[index]) not in ledger for index in group)]
    done = len(items) - sum(map(len, left))
    with progress(title, len(items), "rows", done) as bar:
        for group in left:
            values = judge.score([items[i] for i in group], [texts[i] for i in group])
            ledger.append(
                [
                    {"stage": "score", "key": keys[index], "value": None if value is None else round(value, 6)}
                    for index, value in zip(group, values, strict=True)
                    if ("score", keys[index]) not in ledger
                ]
            )
            bar.advance(len(group))


def _ask(
    judge: AskedJudge,
    items: Sequence[RefineItem],
    texts: Sequence[str],
    keys: Sequence[str],
    title: str,
    ledger: Ledger,
) -> None:
    """Records the scores of a judge that is asked, and its replies without a score, after which it is asked again."""
    left = [index for index, key in enumerate(keys) if ("score", key) not in ledger]
    heard = [_heard(keys[index], ledger) for index in left]
    asks = [len(replies) for replies in heard]
    pace = Pace(getattr(judge, "chat", None), len(left))
    with progress(title, len(items), "rows", len(items) - len(left)) as bar:
        for judgements in judge.judge([items[i] for i in left], [texts[i] for i in left], heard):
            records, final = [], 0
            for number, judgement in judgements.items():
                key = keys[left[number]]
                if judgement.status == FAILED:
                    ledger.fail("score", key, judgement.reason)
                elif judgement.status == "unreadable":
                    asks[number] += 1
                    name = f"{key}#{asks[number]}"
                    records.append({"stage": "ask", "key": name, "text": judgement.text, **judgement.record})
                else:
                    value = None if judgement.value is None else round(judgement.value, 6)
                    entry = {"stage": "score", "key": key, "value": value, "reason": judgement.reason}
                    records.append(entry | judgement.record)
                final += judgement.status != "unreadable"
            ledger.append(records)
            bar.advance(final, pace.note(final, sum(record["num_tokens"] for record in records)))


def _heard(key: str, ledger: Ledger) -> list[str]:
    """The replies without a score that the ledger has for a score's key."""
    replies: list[str] = []
    while ("ask", name := f"{key}#{len(replies) + 1}") in ledger:
        replies.append(ledger["ask", name]["text"])
    return replies
