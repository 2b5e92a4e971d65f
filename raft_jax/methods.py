"""The methods: what each trains on, which terms its loss has, what its teacher sees, and how a report draws it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Style:
    """How reports show a model.

    Attributes:
      label: its name in tables and charts.
      colors: of its lines and points, on a light and on a dark page.
      marker: of its points, as matplotlib names them.
      dashes: lengths of the strokes and gaps of its lines; empty for solid lines.
    """

    label: str
    colors: tuple[str, str]
    marker: str
    dashes: tuple[float, ...] = ()


@dataclass(frozen=True)
class Method:
    """A training method of the paper or one of its baselines.

    Attributes:
      name: in configs and file names.
      title: in full, for a model card.
      target: the answer that is trained on: "gold" (y), "rewrite" (Eq. 3) or "fused" (Eq. 4).
      terms: of the loss, see raft_jax.train.step.TERMS.
      style: in reports.
      teacher_sees_answer: whether the teacher reads the target before the question (Eq. 7).
      fixed_weight: λ of its KL; None balances by Eq. 12.
    """

    name: str
    title: str
    target: str
    terms: tuple[str, ...]
    style: Style
    teacher_sees_answer: bool = False
    fixed_weight: float | None = None

    @property
    def distils(self) -> bool:
        """Whether a teacher scores the student's own answers (Eqs. 6-10)."""
        return "kl" in self.terms

    @property
    def refines(self) -> bool:
        """Whether the refinement makes the targets (Eqs. 1-4)."""
        return self.target != "gold"

    def constant_weight(self, fixed_weight: float | None) -> float | None:
        """λ with `train.fixed_weight` as given; None where Eq. 12 balances the terms."""
        return self.fixed_weight if fixed_weight is None else fixed_weight


METHODS = {
    method.name: method
    for method in (
        Method(
            "raft", "RAFT", "fused", ("sft", "kl"), Style("RAFT", ("#0b7285", "#52c3d3"), "D"), teacher_sees_answer=True
        ),
        Method("sft", "SFT on the gold answers", "gold", ("sft",), Style("SFT", ("#b45309", "#f0994f"), "o", (5, 2))),
        Method(
            "sdft",
            "SFT on the rewritten answers (SDFT, arXiv:2402.13669)",
            "rewrite",
            ("sft",),
            Style("SDFT", ("#7048b6", "#b89df2"), "^", (3, 1.5)),
        ),
        Method(
            "fused_sft",
            "SFT on the fused answers",
            "fused",
            ("sft",),
            Style("fused SFT", ("#3b7a2f", "#8aca7c"), "v", (1, 1.2)),
        ),
        Method(
            "on_policy",
            "SFT on the gold answers with on-policy distillation (GKD, arXiv:2306.13649)",
            "gold",
            ("sft", "kl"),
            Style("on-policy", ("#b02a6b", "#f086b5"), "P", (6, 2, 1, 2)),
            # Its KL starts near 0, and Eq. 12 would give it a λ of hundreds.
            fixed_weight=1.0,
        ),
    )
}
# Models of a report that no method of the table has trained.
BASE = Style("base", ("#667080", "#98a3b2"), "s")
OTHER = Style("other", ("#7d6412", "#d3b85a"), "X")


def any_refines(names: Iterable[str]) -> bool:
    """Whether a method of these names needs the refinement."""
    return any(METHODS[name].refines for name in names)


def any_distils(names: Iterable[str]) -> bool:
    """Whether a method of these names samples rollouts and has a teacher."""
    return any(METHODS[name].distils for name in names)
