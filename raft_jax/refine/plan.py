"""What a ledger has of a refinement that is about to begin, and what is made again because something has changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from raft_jax.config import RefineConfig
from raft_jax.data.examples import Example
from raft_jax.refine.generate import Generator, RefineItem
from raft_jax.refine.ledger import Ledger
from raft_jax.refine.run import (
    RefineModels,
    instructions_of,
    item_of,
    key_of_second_try,
    screened,
    second_try,
    text_key,
)
from raft_jax.refine.scoring import score_key

ANYTHING = "their texts, the prompt, the settings or the model changed"


def plan(examples: Sequence[Example], models: RefineModels, settings: RefineConfig, ledger: Ledger) -> str:
    """A line such as "kept 180 rewrites, redoing 192 fusions (fuser changed)"; "" if the ledger has nothing of them.

    How many rounds a row will take is not known yet: as many as it has taken.
    """
    kept: Counter[str] = Counter()
    earlier = _earlier(ledger)
    redone: dict[str, Counter[str]] = {}
    for item in map(item_of, examples):
        for what, cause in _work_of(item, models, settings, ledger, earlier):
            if cause:
                redone.setdefault(what, Counter())[cause] += 1
            else:
                kept[what] += 1
    parts = [f"kept {', '.join(f'{count} {what}' for what, count in kept.items())}"] if kept else []
    for what, causes in redone.items():
        one = len(causes) == 1
        why = "; ".join(cause if one else f"{count} × {cause}" for cause, count in causes.most_common())
        parts.append(f"redoing {causes.total()} {what} ({why})")
    return ", ".join(parts)


def _earlier(ledger: Ledger) -> dict[tuple[str, str], dict]:
    """The latest record of each stage and of each key without its hash: of row and round, or of row and judge.

    Second tries are not among them: they have the settings of another limit.
    """
    first = (record for record in ledger.records() if "try" not in record)
    return {(record["stage"], record["key"].rpartition("#")[0]): record for record in first}


def _work_of(
    item: RefineItem,
    models: RefineModels,
    settings: RefineConfig,
    ledger: Ledger,
    earlier: dict[tuple[str, str], dict],
) -> Iterator[tuple[str, str]]:
    """(what, why it is made again, "" if it is kept) of each text and score that there was of a row."""
    if (before := earlier.get(("rewrite", f"{item.id}#1"))) is None:
        return
    record = ledger.get("rewrite", text_key(models.rewriter, item, 1))
    yield "rewrites", "" if record else _cause(before, models.rewriter, "rewriter", "rewrite.txt")
    if record:
        again = key_of_second_try(second_try(models.rewriter), item, 1, record)
        record = ledger.get("rewrite", again) or record
        item = replace(item, rewrite=screened(record, item, instructions_of(models.rewriter), settings).text)
    round = 1
    while (before := earlier.get(("fuse", f"{item.id}#{round}"))) is not None:
        fused = ledger.get("fuse", text_key(models.fuser, item, round)) if record else None
        if fused:
            yield "fusions", ""
            yield from _scores_of(item, fused, models, settings, ledger, earlier)
        else:
            yield "fusions", _cause(before, models.fuser, "fuser", "fuse.txt") if record else "the rewrite is redone"
        round += 1


def _scores_of(
    item: RefineItem,
    fused: dict,
    models: RefineModels,
    settings: RefineConfig,
    ledger: Ledger,
    earlier: dict[tuple[str, str], dict],
) -> Iterator[tuple[str, str]]:
    """The same of the scores of a fusion that is kept."""
    candidate = screened(fused, item, instructions_of(models.fuser), settings)
    if candidate.status != "ok":
        return
    for judge in models.judges:
        if ("score", score_key(judge, item, candidate.text)) in ledger:
            yield "scores", ""
        elif before := earlier.get(("score", f"{item.id}#{judge.name}")):
            yield "scores", _cause(before, judge, f"judge {judge.name}", "judge.txt")


def _cause(before: dict, worker: Generator | Any, role: str, file: str) -> str:
    """Why a record cannot be used. Records of older versions do not say enough."""
    now = getattr(worker, "record", None)
    if not now or not before.keys() >= {"settings", "prompt"}:
        return ANYTHING
    if before["prompt"] != now["prompt"]:
        return f"{file} changed"
    return f"{role} changed" if before["settings"] != now["settings"] else "their texts changed"
