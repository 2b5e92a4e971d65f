"""Refined rows in the order in which they should be inspected, and the number of rows of each kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from raft_jax.data.refined import STATUSES, RefinedRow
from raft_jax.outcome import agreement, less_natural, quantiles
from raft_jax.report.flags import row_flags

# Reasons why a row with a usable rewriting keeps its gold answer.
BELOW, NOT_BETTER = "below the threshold", "without a better fusion"
_PLURALS = {"copy": ("copy", "copies"), "refusal": ("refusal", "refusals")}


def kind_of(row: RefinedRow) -> str:
    """Why a row has its target: "fused", the rewriting's status if that is not "ok", or why nothing was fused."""
    if row.chosen == "fusion":
        return "fused"
    if row.rewrite_status != "ok":
        return row.rewrite_status
    return NOT_BETTER if row.accepted else BELOW


def count_sentence(rows: Sequence[RefinedRow]) -> str:
    """The number of rows of each kind, in a line such as "2 rows: 1 fused, 1 gold (1 copy)"."""
    kinds = Counter(map(kind_of, rows))
    fused = kinds.pop("fused", 0)
    parts = [
        f"{count:,} {_PLURALS[kind][count > 1] if kind in _PLURALS else kind}" for kind, count in kinds.most_common()
    ]
    gold = f"{sum(kinds.values()):,} gold" + (f" ({', '.join(parts)})" if parts else "")
    return f"{len(rows):,} row{'' if len(rows) == 1 else 's'}: {fused:,} fused, {gold}"


@dataclass(frozen=True)
class ShownRow:
    """A refined row with its position in the data, its kind, its flags, and the mean score of its chosen fusion."""

    row: RefinedRow
    order: int
    kind: str
    flags: list[str]
    chosen_mean: float | None

    @property
    def rank(self) -> tuple:
        fused = self.kind == "fused"
        return (
            not self.flags,
            not fused,
            (self.chosen_mean or 0.0) if fused else 0.0,
            "" if fused else self.kind,
            self.row.similarity or 0.0,
        )


def worst_first(rows: Iterable[RefinedRow]) -> list[ShownRow]:
    """Rows with kind and flags, ordered: flagged targets, then fusions by increasing mean score, then gold answers.

    Gold answers come last, by kind and similarity, because refinement has not changed them.
    """
    shown = [ShownRow(row, order, kind_of(row), row_flags(row), _chosen_mean(row)) for order, row in enumerate(rows)]
    return sorted(shown, key=lambda row: row.rank)


def counts(rows: Sequence[RefinedRow], accept: float) -> list[tuple[str, str]]:
    """The counts of a refinement as (name, value); judges agree if all or none of them give `accept` or more."""
    rounds = [row.rounds for row in rows if row.rounds]
    candidates = Counter(candidate.status for of_row in rounds for candidate in of_row)
    flagged = sum(bool(row_flags(row)) for row in rows)
    named = [
        ("rows", len(rows)),
        *(
            (f"rewritings: {STATUSES[status]}", count)
            for status, count in Counter(row.rewrite_status for row in rows).most_common()
        ),
        ("kept by the filter", sum(row.accepted for row in rows)),
        *((f"candidates: {STATUSES[status]}", count) for status, count in candidates.most_common()),
        ("target is a fusion", sum(row.chosen == "fusion" for row in rows)),
        ("target is the gold answer", sum(row.chosen == "gold" for row in rows)),
        *([("flagged targets", flagged)] if flagged else []),
        *([("fused answers less natural than gold", less)] if (less := sum(map(less_natural, rows))) else []),
    ]
    shown = [(name, f"{count:,}") for name, count in named]
    if rounds:
        shown.append(("rounds of fusion, mean", f"{sum(map(len, rounds)) / len(rounds):.2f}"))
    if similarity := [row.similarity for row in rows if row.similarity is not None]:
        low, median, high = quantiles(similarity, (0.05, 0.5, 0.95))
        shown.append(("similarity, 5 % / median / 95 %", f"{low:.3f} / {median:.3f} / {high:.3f}"))
    same, several = agreement(rows, accept)
    if several:
        shown.append(("candidates on which the judges agree", f"{same:,} of {several:,}"))
    return shown


def _chosen_mean(row: RefinedRow) -> float | None:
    """The mean score of the chosen fusion."""
    means = [candidate.mean for candidate in row.rounds if candidate.round == row.chosen_round]
    return means[0] if means else None
