"""The methods, as presets of one loop: which text is the target, and whether and how the teacher takes part."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A training method of the paper or one of its baselines."""

    name: str
    title: str
    target: str  # "gold" (y), "rewrite" (Eq. 3) or "fused" (Eq. 4)
    distill: bool  # with the on-policy distillation term of Eqs. 6-10
    teacher_sees_answer: bool = False  # Eq. 7, or a teacher that sees the question alone


METHODS = {
    method.name: method
    for method in (
        Method("raft", "RAFT", "fused", distill=True, teacher_sees_answer=True),
        Method("sft", "SFT on the gold answers", "gold", distill=False),
        Method("sdft", "SFT on the rewritten answers (SDFT, arXiv:2402.13669)", "rewrite", distill=False),
        Method("fused_sft", "SFT on the fused answers", "fused", distill=False),
        Method("on_policy", "SFT on the gold answers with on-policy distillation (GKD, arXiv:2306.13649)", "gold",
               distill=True),
    )
}
