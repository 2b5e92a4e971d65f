"""Refined rows in the order in which they deserve a look, and how many there are of each kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from raft_jax.data.refined import STATUSES
from raft_jax.report.flags import row_flags

# Why a row keeps its gold answer, where its rewriting could be used.
BELOW, NOT_BETTER = "below the threshold", "without a better fusion"
_PLURALS = {"copy": ("copy", "copies"), "refusal": ("refusal", "refusals")}


def kind_of(row: Mapping[str, Any]) -> str:
    """Why a row has its target: "fused", the rewriting's status where that is not "ok", or why nothing was fused."""
    if row.get("chosen") == "fusion":
        return "fused"
    status = str(row.get("rewrite_status") or "")
    if status != "ok":
        return status
    return NOT_BETTER if row.get("accepted") else BELOW


def count_sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """How many rows of each kind, in a line.

    Example:
      >>> count_sentence([{"chosen": "fusion"}, {"chosen": "gold", "rewrite_status": "copy"}])
      '2 rows: 1 fused, 1 gold (1 copy)'
    """
    kinds = Counter(map(kind_of, rows))
    fused = kinds.pop("fused", 0)
    parts = [f"{count:,} {_PLURALS[kind][count > 1] if kind in _PLURALS else kind}" for kind, count in
             kinds.most_common()]
    gold = f"{sum(kinds.values()):,} gold" + (f" ({', '.join(parts)})" if parts else "")
    return f"{len(rows):,} row{'' if len(rows) == 1 else 's'}: {fused:,} fused, {gold}"


def worst_first(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with their kind and flags: flagged targets, then fusions from the lowest mean score on, then gold ones.

    A gold target is never wrong by our doing, so these come last, by kind and similarity.
    """
    given = [{**row, "kind": kind_of(row), "flags": row_flags(row), "chosen_mean": _chosen_mean(row), "order": number,
              "similarity": row.get("similarity")} for number, row in enumerate(rows)]
    given.sort(key=lambda row: (
        not row["flags"], row["kind"] != "fused", *((row["chosen_mean"] or 0.0, "") if row["kind"] == "fused" else
                                                    (0.0, row["kind"])), row.get("similarity") or 0.0,
    ))
    return given


def counts(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Figures of a refinement, named."""
    rounds = [row["rounds"] for row in rows if row.get("rounds")]
    candidates = Counter(str(candidate.get("status")) for given in rounds for candidate in given)
    flagged = sum(bool(row_flags(row)) for row in rows)
    named = [
        ("rows", len(rows)),
        *((f"rewritings: {STATUSES.get(status, status)}", count) for status, count in
          Counter(str(row.get("rewrite_status")) for row in rows).most_common()),
        ("kept by the filter", sum(bool(row.get("accepted")) for row in rows)),
        *((f"candidates: {STATUSES.get(status, status)}", count) for status, count in candidates.most_common()),
        ("target is a fusion", sum(row.get("chosen") == "fusion" for row in rows)),
        ("target is the gold answer", sum(row.get("chosen") == "gold" for row in rows)),
        *([("flagged targets", flagged)] if flagged else []),
    ]
    shown = [(name, f"{count:,}") for name, count in named]
    if rounds:
        shown.append(("rounds of fusion, mean", f"{sum(map(len, rounds)) / len(rounds):.2f}"))
    return shown


def _chosen_mean(row: Mapping[str, Any]) -> float | None:
    """The mean score of the fusion that was chosen."""
    means = [one.get("mean") for one in row.get("rounds") or () if one.get("round") == row.get("chosen_round")]
    return means[0] if means else None
