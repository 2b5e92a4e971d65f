"""Several judges' verdicts as one: the majority, and how far the judges agree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


def majority(scores: Iterable[float | None], accept: float) -> bool | None:
    """Whether more than half of the judges that gave a score accept: score ≥ `accept`. None if none gave one.

    Example:
      >>> majority([0.9, 0.2, 0.8], 0.7), majority([0.9, None, 0.2], 0.7), majority([None], 0.7)
      (True, False, None)
    """
    verdicts = [score >= accept for score in scores if score is not None]
    return 2 * sum(verdicts) > len(verdicts) if verdicts else None


def krippendorff_alpha(ratings: Sequence[Sequence[float | None]], metric: str = "nominal") -> float | None:
    """Krippendorff's alpha: 1 − observed / expected disagreement, over all pairs of ratings of the same unit.

        α = 1 − (n − 1) Σ_u Σ_{i≠j} δ(r_ui, r_uj) / (m_u − 1) / Σ_{k≠l} δ(r_k, r_l)

    where m_u is the number of ratings of unit u, n the number of all ratings of units with at least two, and the last
    sum is over all pairs of these. 1: the judges always agree; 0: as often as by chance.

    Args:
      ratings: one row for each judge, one column for each unit; None where a judge did not rate a unit.
      metric: "nominal", δ = 1 where two ratings differ, or "interval", δ = their squared difference.

    Returns:
      α; None where no unit has two ratings, or all ratings are equal, which leaves it undefined.

    Source: K. Krippendorff, Computing Krippendorff's Alpha-Reliability, 2011.

    Example:
      >>> round(krippendorff_alpha([[0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]]), 3)
      0.095
    """
    if metric not in ("nominal", "interval"):
        raise ValueError(f"metric {metric!r} is not known; known: nominal, interval")
    units = [[float(r) for r in unit if r is not None] for unit in zip(*ratings, strict=True)]
    units = [np.array(unit) for unit in units if len(unit) > 1]
    if not units:
        return None

    def disagreement(values: np.ndarray) -> float:
        difference = values[:, None] - values
        return float(np.sum(difference != 0) if metric == "nominal" else np.sum(difference**2))

    values = np.concatenate(units)
    expected = disagreement(values) / (len(values) - 1)
    if not expected:
        return None
    return 1 - sum(disagreement(unit) / (len(unit) - 1) for unit in units) / expected
