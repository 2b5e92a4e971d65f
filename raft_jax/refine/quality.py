"""How natural the texts of a refinement are to the student, beside their gold answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from raft_jax.data.refined import RefinedRow, TextQuality
from raft_jax.refine.generate import RefineItem
from raft_jax.refine.judge import Judge, coverage
from raft_jax.refine.ledger import Ledger
from raft_jax.refine.scoring import compute_scores, score_key

SCORED = ("ok", "unknown")  # statuses of rewritings that the chat template takes and that are whole


def with_quality(rows: Sequence[RefinedRow], likelihood: Judge, ledger: Ledger) -> list[RefinedRow]:
    """The rows with the `quality` of their gold answers, usable rewritings and chosen fusions.

    Log-likelihoods are recorded in the ledger as they come, and not computed again.

    Args:
      rows: refined rows.
      likelihood: gives the student's mean log-likelihood per token of texts, given the question.
      ledger: of the refinement.
    """
    texts = {
        "gold": {index: row.gold for index, row in enumerate(rows)},
        "rewrite": {index: row.rewrite for index, row in enumerate(rows) if row.rewrite_status in SCORED},
        "fused": {index: row.answer for index, row in enumerate(rows) if row.chosen == "fusion"},
    }
    logprobs = _logprobs(
        rows, [(index, text) for of in texts.values() for index, text in of.items()], likelihood, ledger
    )
    qualities: list[dict[str, TextQuality]] = [{} for _ in rows]
    for name, text_of in texts.items():
        for index, text in text_of.items():
            gold = rows[index].gold
            length = round(len(text) / len(gold), 6)
            qualities[index][name] = TextQuality(
                logprob=logprobs[index, text], length=length, coverage=_share(gold, text)
            )
    return [replace(row, quality=quality) for row, quality in zip(rows, qualities, strict=True)]


def _logprobs(
    rows: Sequence[RefinedRow], pairs: Sequence[tuple[int, str]], likelihood: Judge, ledger: Ledger
) -> dict[tuple[int, str], float | None]:
    """The log-likelihood of each pair of a row's index and a text, from the ledger or computed."""
    distinct = list(dict.fromkeys(pairs))
    items, texts = [_item_of(rows[index]) for index, _ in distinct], [text for _, text in distinct]
    keys = [score_key(likelihood, item, text) for item, text in zip(items, texts, strict=True)]
    compute_scores(likelihood, items, texts, keys, "log-likelihood", ledger)
    return {pair: ledger["score", key]["value"] for pair, key in zip(distinct, keys, strict=True)}


def _item_of(row: RefinedRow) -> RefineItem:
    """What a text of a row is judged with, without the rewriting: that of a gold answer does not depend on it."""
    turns = tuple((role, content) for role, content in row.turns)
    return RefineItem(row.id, row.question, row.gold, context=row.context, turns=turns)


def _share(gold: str, text: str) -> float | None:
    share = coverage(gold, text)
    return None if share is None else round(share, 6)
