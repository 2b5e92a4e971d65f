"""Rows with several answers to one question: the first is used, or each becomes a row of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from raft_jax.data.examples import Example
from raft_jax.data.wording import quoted
from raft_jax.errors import InputError


def first_answers(examples: Iterable[Example]) -> list[Example]:
    """The examples with the first of their answers only."""
    return [replace(example, more_answers=()) for example in examples]


def each_answer(examples: Iterable[Example]) -> list[Example]:
    """A row of its own for each answer: those of a row with several have the ids ID#1, ID#2, …

    Example:
      >>> rows = each_answer([Example("a", "Who?", "He.", more_answers=("She.",)), Example("b", "Why?", "So.")])
      >>> [(row.id, row.answer) for row in rows]
      [('a#1', 'He.'), ('a#2', 'She.'), ('b', 'So.')]
    """
    rows = []
    for example in examples:
        answers = (example.answer, *example.more_answers)
        ids = (
            [f"{example.id}#{number}" for number in range(1, len(answers) + 1)]
            if example.more_answers
            else [example.id]
        )
        rows += [replace(example, id=id, answer=text, more_answers=()) for id, text in zip(ids, answers, strict=True)]
    return rows


def require_distinct_ids(examples: Iterable[Example], source: str) -> None:
    """Raises InputError if the id that `each_answer` gave an answer is that of another row."""
    seen = set()
    for example in examples:
        if example.id in seen:
            raise InputError(
                f"{source}: the id {quoted(example.id)} is that of a row, and of an answer of the row "
                f"{quoted(example.id.rpartition('#')[0])}; rename one, or set data.several_answers=first"
            )
        seen.add(example.id)
