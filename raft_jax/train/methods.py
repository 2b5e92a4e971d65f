"""The methods: which text is the target, which terms the loss has, and what the teacher sees."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A training method of the paper or one of its baselines."""

    name: str
    title: str
    target: str  # "gold" (y), "rewrite" (Eq. 3) or "fused" (Eq. 4)
    terms: tuple[str, ...]  # of the loss, see raft_jax.train.step.TERMS
    teacher_sees_answer: bool = False  # Eq. 7, or a teacher that sees the question alone

    @property
    def distill(self) -> bool:
        """Whether the student answers by itself and a teacher is beside it (Eqs. 6-10)."""
        return "kl" in self.terms


METHODS = {
    method.name: method
    for method in (
        Method("raft", "RAFT", "fused", terms=("sft", "kl"), teacher_sees_answer=True),
        Method("sft", "SFT on the gold answers", "gold", terms=("sft",)),
        Method("sdft", "SFT on the rewritten answers (SDFT, arXiv:2402.13669)", "rewrite", terms=("sft",)),
        Method("fused_sft", "SFT on the fused answers", "fused", terms=("sft",)),
        Method("on_policy", "SFT on the gold answers with on-policy distillation (GKD, arXiv:2306.13649)", "gold",
               terms=("sft", "kl")),
    )
}
