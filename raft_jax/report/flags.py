"""What a reader should look at twice in a text that a model wrote."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from raft_jax.data.prompts import fusion_prompt, rewrite_prompt, teacher_prompt

LEAK_WORDS = 5  # so many words of our instructions in a row are no coincidence
LOOP_WORDS, LOOP_SHARE, LOOP_LENGTH = 4, 0.5, 24
STATUSES = {
    "ok": "", "empty": "empty", "truncated": "cut at the limit", "refusal": "refusal",
    "leak": "repeats our instructions", "copy": "the gold answer verbatim", "repetition": "repeats itself",
    "facts": "facts differ", "unrenderable": "not for the chat template", "unknown": "unknown to the encoder",
}


def flags_of(text: str, *known: str) -> list[str]:
    """Names what is wrong with a text: empty, in a loop, or repeating the instructions of refinement and teacher.

    Args:
      text: what a model wrote.
      known: question, context and gold answer, whose words a text may repeat.

    Example:
      >>> flags_of("Keep clear. " * 20)
      ['repeats itself']
    """
    words = _words(text)
    if not words:
        return ["empty"]
    flags = []
    repeated = _runs(words, LEAK_WORDS) & _instructions()
    if repeated - {run for source in known for run in _runs(_words(source), LEAK_WORDS)}:
        flags.append("repeats our instructions")
    num_runs = len(words) - LOOP_WORDS + 1
    if len(words) >= LOOP_LENGTH and len(_runs(words, LOOP_WORDS)) < LOOP_SHARE * num_runs:
        flags.append("repeats itself")
    return flags


def row_flags(row: Mapping[str, Any]) -> list[str]:
    """What is wrong with a refined row's target; gold answers are taken as they are."""
    if row.get("chosen") != "fusion":
        return []
    known = (row.get("question"), row.get("context"), row.get("gold"), *(turn[1] for turn in row.get("turns") or ()))
    return [f"target {flag}" if flag != "empty" else "empty target"
            for flag in flags_of(str(row.get("answer") or ""), *(str(text or "") for text in known))]


@cache
def _instructions() -> frozenset[tuple[str, ...]]:
    """Runs of words of our own prompts, without what stands in their places."""
    prompts = (rewrite_prompt(""), rewrite_prompt("", "?"), fusion_prompt("", ""), teacher_prompt("", ""))
    return frozenset(
        run for prompt in prompts for message in prompt for line in message["content"].splitlines()
        for run in _runs(_words(line), LEAK_WORDS)
    )


def _words(text: str) -> list[str]:
    return re.findall(r"[\w'’]+", text.lower())


def _runs(words: list[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}
