"""Stage 1: questions and gold answers → the fused data set, every step of it recorded (Eqs. 1-4, App. C-D)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from raft_jax.config import RefineConfig
from raft_jax.data.examples import Example
from raft_jax.data.refined import RefinedRow, Round
from raft_jax.models.encoder import Encoder, similarities
from raft_jax.progress import progress
from raft_jax.refine.judge import Judge
from raft_jax.refine.ledger import Ledger
from raft_jax.refine.write import Item, Writer

JUDGED_AT_ONCE = 256  # rows between two entries in the ledger


class Parts(NamedTuple):
    """Who does the work of the refinement; each is an interface, so a remote model can take any place."""

    rewriter: Writer
    encoder: Encoder
    fuser: Writer
    judges: Sequence[Judge]


def refine(examples: Sequence[Example], parts: Parts, settings: RefineConfig, ledger: Ledger) -> list[RefinedRow]:
    """Rewrites, filters, fuses and judges; whatever the ledger holds already is not done again.

    Returns:
      One row an example, in their order, each with its full history.
    """
    items = [Item(example.id, example.question, example.answer, context=example.context) for example in examples]
    rewrites = _write(parts.rewriter, items, 1, "rewrite", "rewrite", ledger)
    items = [
        Item(item.id, item.question, item.gold, draft["text"], item.context)
        for item, draft in zip(items, rewrites, strict=True)
    ]
    usable = [index for index, draft in enumerate(rewrites) if draft["status"] == "ok"]
    similarity = dict(zip(usable, _similarities(parts.encoder, [items[i] for i in usable], ledger), strict=True))
    accepted = [index for index in usable if similarity[index] >= settings.threshold]

    rounds: dict[int, list[Round]] = {index: [] for index in range(len(items))}
    active = accepted
    for number in range(1, settings.rounds + 1):
        if not active:
            break
        chosen = [items[index] for index in active]
        for index, result in zip(active, _round(parts, chosen, number, ledger), strict=True):
            rounds[index].append(result)
        means = {index: rounds[index][-1].mean for index in active}
        active = [index for index in active if means[index] is None or means[index] < settings.accept]
    return [
        _decide(item, draft, similarity.get(index), rounds[index], settings)
        for index, (item, draft) in enumerate(zip(items, rewrites, strict=True))
    ]


def _write(writer: Writer, items: Sequence[Item], round: int, stage: str, title: str, ledger: Ledger) -> list[dict]:
    """One text an item, from the ledger or from the writer."""
    keys = [f"{item.id}#{round}" for item in items]
    done = {index for index, key in enumerate(keys) if (stage, key) in ledger}
    with progress(title, len(items), "rows", len(done)) as bar:
        for drafts in writer.write(items, round, done):
            fresh = {index: draft for index, draft in drafts.items() if index not in done}
            ledger.append([
                {"stage": stage, "key": keys[index], "text": draft.text, "status": draft.status,
                 "num_tokens": draft.num_tokens}
                for index, draft in fresh.items()
            ])
            bar.advance(len(fresh))
    return [ledger.get(stage, key) for key in keys]


def _similarities(encoder: Encoder, items: Sequence[Item], ledger: Ledger) -> list[float]:
    """Eq. 2 for each item."""
    if any(("similarity", item.id) not in ledger for item in items):
        with progress("similarity", 2 * len(items), "texts") as bar:
            gold, rewrites = [item.gold for item in items], [item.rewrite for item in items]
            values = similarities(encoder, gold, rewrites, bar.advance)
        ledger.append([
            {"stage": "similarity", "key": item.id, "value": round(float(value), 6)}
            for item, value in zip(items, values, strict=True) if ("similarity", item.id) not in ledger
        ])
    return [ledger.get("similarity", item.id)["value"] for item in items]


def _round(parts: Parts, items: Sequence[Item], number: int, ledger: Ledger) -> list[Round]:
    """One round of fusion: a candidate for each item, and what each judge makes of it."""
    drafts = _write(parts.fuser, items, number, "fuse", f"fuse, round {number}", ledger)
    usable = [index for index, draft in enumerate(drafts) if draft["status"] == "ok"]
    scores: list[dict[str, float | None]] = [{} for _ in items]
    for judge in parts.judges:
        keys = {index: f"{items[index].id}#{number}#{judge.name}" for index in usable}
        # Parts are judged as a whole, also when some of one is in the ledger: a score may round by its neighbours.
        parts_of_rows = [usable[start : start + JUDGED_AT_ONCE] for start in range(0, len(usable), JUDGED_AT_ONCE)]
        left = [rows for rows in parts_of_rows if any(("score", keys[index]) not in ledger for index in rows)]
        done = len(usable) - sum(map(len, left))
        with progress(f"judge {judge.name}, round {number}", len(usable), "rows", done) as bar:
            for rows in left:
                found = judge.score([items[i] for i in rows], [drafts[i]["text"] for i in rows])
                ledger.append([
                    {"stage": "score", "key": keys[index], "value": None if value is None else round(value, 6)}
                    for index, value in zip(rows, found, strict=True) if ("score", keys[index]) not in ledger
                ])
                bar.advance(len(rows))
        for index, key in keys.items():
            scores[index][judge.name] = ledger.get("score", key)["value"]
    return [
        Round(number, draft["text"], draft["status"], score, _mean(score.values()))
        for draft, score in zip(drafts, scores, strict=True)
    ]


def _mean(values) -> float | None:
    """Mean over the judges that answered."""
    answered = [value for value in values if value is not None]
    return round(sum(answered) / len(answered), 6) if answered else None


def _decide(
    item: Item, draft: dict, similarity: float | None, rounds: list[Round], settings: RefineConfig
) -> RefinedRow:
    """Eqs. 3 and 4 for one row: the best round where the filter passed, the gold answer elsewhere."""
    accepted = similarity is not None and similarity >= settings.threshold
    scored = [found for found in rounds if found.mean is not None]
    best = max(scored, key=lambda found: (found.mean, -found.round), default=None)
    if similarity is None:
        reason = f"The rewriting is unusable ({draft['status']}), so the gold answer stays."
    elif not accepted:
        reason = f"Similarity {similarity:.3f} is below the threshold {settings.threshold:g}, so the gold answer stays."
    elif best is None:
        statuses = ", ".join(found.status for found in rounds)
        reason = f"No judge could score a fused answer (rounds: {statuses}), so the gold answer stays."
    elif best.mean >= settings.accept:
        reason = f"Round {best.round} scored {best.mean:.3f}, at least {settings.accept:g}, and ended the rounds."
    else:
        reason = f"Round {best.round} scored {best.mean:.3f}, the best of {len(rounds)}."
    return RefinedRow(
        id=item.id, question=item.question, gold=item.gold, rewrite=draft["text"], rewrite_status=draft["status"],
        similarity=similarity, accepted=accepted, rounds=rounds, answer=best.candidate if best else item.gold,
        chosen="fusion" if best else "gold", chosen_round=best.round if best else None, reason=reason,
    )
