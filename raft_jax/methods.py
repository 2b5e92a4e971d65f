"""The table of methods: training target, terms of the loss, the teacher's prompt, and style in reports."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Style:
    """How reports show a model.

    Attributes:
      label: the model's name in tables and charts.
      colors: colours of its lines and points, on a light and on a dark page.
      marker: matplotlib's name for the marker of its points.
      dashes: lengths of the dashes and gaps of its lines; empty for solid lines.
    """

    label: str
    colors: tuple[str, str]
    marker: str
    dashes: tuple[float, ...] = ()


@dataclass(frozen=True)
class Method:
    """A training method of the paper or one of its baselines.

    Attributes:
      name: the name in configs and file names.
      title: the full name, for a model card.
      target: the answer that the method trains on: "gold" (y), "rewrite" (Eq. 3) or "fused" (Eq. 4); "none" if it needs
        no answers.
      terms: the terms of the loss, see raft_jax.train.step.TERMS; none if the method is not trained.
      style: how reports show its model.
      teacher_sees_answer: whether the teacher's prompt has the target before the question (Eq. 7).
      pruned_from: the method whose exported model this one prunes, in place of training (raft_jax.train.fapm).
    """

    name: str
    title: str
    target: str
    terms: tuple[str, ...]
    style: Style
    teacher_sees_answer: bool = False
    pruned_from: str | None = None

    @property
    def distils(self) -> bool:
        """Whether the loss has a KL term on the student's rollouts (Eqs. 6-10)."""
        return "kl" in self.terms

    @property
    def anchors(self) -> bool:
        """Whether the loss has a KL term to the base model on the target's own tokens."""
        return "anchor" in self.terms

    @property
    def refines(self) -> bool:
        """Whether the targets come from refinement (Eqs. 1-4)."""
        return self.target in ("rewrite", "fused")

    def with_teacher(self, sees_answer: bool | None) -> Method:
        """The method with the setting `train.teacher_sees_answer`, if it is not None and the teacher could see one."""
        could = self.distils and self.target != "none"
        return self if sees_answer is None or not could else replace(self, teacher_sees_answer=sees_answer)

    def constant_weight(self, fixed_weight: float | None) -> float | None:
        """λ, given the setting `train.fixed_weight`, which takes precedence; None if Eq. 12 balances the terms.

        The KL of a teacher that sees the question only starts near 0, and Eq. 12 would give a λ of several hundred.
        """
        if fixed_weight is not None:
            return fixed_weight
        return None if self.teacher_sees_answer else 1.0


METHODS = {
    method.name: method
    for method in (
        Method(
            "raft", "RAFT", "fused", ("sft", "kl"), Style("RAFT", ("#0b7285", "#52c3d3"), "D"), teacher_sees_answer=True
        ),
        Method(
            "raft_unfused",
            "RAFT without fusion, on the rewritten answers",
            "rewrite",
            ("sft", "kl"),
            Style("RAFT unfused", ("#2b6a5e", "#7cc4b2"), "d", (7, 1.5)),
            teacher_sees_answer=True,
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
        ),
        Method(
            "sft_kl",
            "SFT on the gold answers with a KL to the base model on the same tokens",
            "gold",
            ("sft", "anchor"),
            Style("SFT + KL", ("#8a5a00", "#e0b35c"), "h", (8, 2)),
        ),
        Method(
            "asft",
            "Anchored SFT on the gold answers (ASFT, arXiv:2509.23753)",
            "gold",
            ("dft", "anchor"),
            Style("ASFT", ("#1f5fbf", "#86b3f5"), "p", (4, 1, 1, 1)),
        ),
        Method(
            "fapm",
            "SFT on the gold answers, its task vector pruned (FAPM, arXiv:2509.08255)",
            "gold",
            (),
            Style("FAPM", ("#a1342b", "#f0928a"), "*", (2, 2)),
            pruned_from="sft",
        ),
        Method(
            "repair",
            "On-policy distillation from the base model, on prompts alone",
            "none",
            ("kl",),
            Style("repair", ("#3a4f66", "#9fb6cf"), "X", (1, 1)),
        ),
    )
}
# Styles of models in a report that were not trained by a method of the table.
BASE = Style("base", ("#667080", "#98a3b2"), "s")
OTHER = Style("other", ("#7d6412", "#d3b85a"), "X")


def any_refines(names: Iterable[str]) -> bool:
    """Whether any of the named methods needs refinement."""
    return any(METHODS[name].refines for name in names)


def any_distils(names: Iterable[str]) -> bool:
    """Whether any of the named methods samples rollouts and has a teacher."""
    return any(METHODS[name].distils for name in names)
