"""Flags on generated texts that a reader should check."""

from __future__ import annotations

from functools import cache

from raft_jax.data.prompts import fusion_prompt, rewrite_prompt, teacher_prompt
from raft_jax.data.refined import STATUSES, RefinedRow
from raft_jax.refine.screen import repetition, shared_run


def flags_of(text: str, *known: str) -> list[str]:
    """Lists the problems of a text: it is empty, repeats itself, or repeats the instructions of refinement and teacher.

    Args:
      text: a generated text.
      known: question, context and gold answer; the text may repeat their words.

    Example:
      >>> flags_of("Keep clear. " * 20)
      ['repeats itself']
    """
    if not any(character.isalnum() for character in text):
        return [STATUSES["empty"]]
    sources = "\n".join(known)
    passages = {"leak": shared_run(text, _instructions(), sources), "repetition": repetition(text, sources)}
    return [STATUSES[status] for status, words in passages.items() if words]


def row_flags(row: RefinedRow) -> list[str]:
    """The problems of a refined row's target; gold answers are not checked."""
    if row.chosen != "fusion":
        return []
    known = (row.question, row.context, row.gold, *(content for _, content in row.turns))
    return [f"target {flag}" if flag != "empty" else "empty target" for flag in flags_of(row.answer, *known)]


@cache
def _instructions() -> str:
    """The text of the method's prompts without question and answers."""
    prompts = (rewrite_prompt(""), rewrite_prompt("", "?"), fusion_prompt("", ""), teacher_prompt("", ""))
    return "\n".join(message["content"] for prompt in prompts for message in prompt)
