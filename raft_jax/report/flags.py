"""What a reader should look at twice in a text that a model wrote."""

from __future__ import annotations

from functools import cache

from raft_jax.data.prompts import fusion_prompt, rewrite_prompt, teacher_prompt
from raft_jax.data.refined import STATUSES, RefinedRow
from raft_jax.refine.screen import repetition, shared_run


def flags_of(text: str, *known: str) -> list[str]:
    """Names what is wrong with a text: empty, in a loop, or repeating the instructions of refinement and teacher.

    Args:
      text: what a model wrote.
      known: question, context and gold answer, whose words a text may repeat.

    Example:
      >>> flags_of("Keep clear. " * 20)
      ['repeats itself']
    """
    if not any(character.isalnum() for character in text):
        return [STATUSES["empty"]]
    sources = "\n".join(known)
    found = {"leak": shared_run(text, _instructions(), sources), "repetition": repetition(text, sources)}
    return [STATUSES[status] for status, words in found.items() if words]


def row_flags(row: RefinedRow) -> list[str]:
    """What is wrong with a refined row's target; gold answers are taken as they are."""
    if row.chosen != "fusion":
        return []
    known = (row.question, row.context, row.gold, *(content for _, content in row.turns))
    return [f"target {flag}" if flag != "empty" else "empty target" for flag in flags_of(row.answer, *known)]


@cache
def _instructions() -> str:
    """Our own prompts, without what stands in their places."""
    prompts = (rewrite_prompt(""), rewrite_prompt("", "?"), fusion_prompt("", ""), teacher_prompt("", ""))
    return "\n".join(message["content"] for prompt in prompts for message in prompt)
