"""Rows with several answers to one question: the first is used, or each becomes a row of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from raft_jax.data.examples import Example
from raft_jax.data.wording import quoted
from raft_jax.errors import InputError


def first_answers(examples: Iterable[Example]) -> list[Example]:
    """The examples with the first of their answers only."""
    return [replace(example, more_answers=()) for example in examples]


def each_answer(examples: Sequence[Example]) -> list[Example]:
    """A row of its own for each answer: those of a row with several have the ids ID#1, ID#2, …

    Example:
      >>> rows = each_answer([Example("a", "Who?", "He.", more_answers=("She.",)), Example("b", "Why?", "So.")])
      >>> [(row.id, row.answer) for row in rows]
      [('a#1', 'He.'), ('a#2', 'She.'), ('b', 'So.')]
    """
    rows = []
    for example in examples:
        answers = (example.answer, *example.more_answers)
        rows += [
            replace(example, id=id, answer=text, more_answers=())
            for id, text in zip(_ids(example), answers, strict=True)
        ]
    return rows


def require_free_ids(examples: Sequence[Example], source: str) -> None:
    """Raises InputError if an id that `each_answer` gives to an answer is that of another row."""
    taken = {example.id for example in examples if not example.more_answers}
    for example in examples:
        if example.more_answers and (shared := [id for id in _ids(example) if id in taken]):
            raise InputError(
                f"{source}: the id {quoted(shared[0])} is that of a row, and of an answer of the row "
                f"{quoted(example.id)}; rename one, or set data.several_answers=first"
            )


def _ids(example: Example) -> list[str]:
    """The ids of the rows that a row becomes."""
    if not example.more_answers:
        return [example.id]
    return [f"{example.id}#{number}" for number in range(1, len(example.more_answers) + 2)]
