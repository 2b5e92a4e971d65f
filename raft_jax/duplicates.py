"""Rows that ask the same question, or nearly the same: found, so that they can be named or left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from raft_jax.data.examples import Example
from raft_jax.models.encoder import MOSTLY_UNKNOWN, Encoder
from raft_jax.refine.words import numbers

DIGITS = 4  # of the cosines that are compared: machines differ in later ones
BLOCK = 1024  # questions that are compared with all earlier ones at once

FindNear = Callable[[Sequence[Example]], dict[str, str]]


def same_questions(examples: Iterable[Example]) -> dict[str, str]:
    """The rows that ask what an earlier row asks, as id → id of the first such row.

    Context and earlier turns belong to the question. Case and white space do not count.

    Example:
      >>> same_questions([Example("a", "How long?", "A day."), Example("b", " how  LONG?", "Two.")])
      {'b': 'a'}
    """
    first: dict[tuple, str] = {}
    repeated = {}
    for example in examples:
        earlier = first.setdefault(asked(example), example.id)
        if earlier != example.id:
            repeated[example.id] = earlier
    return repeated


def asked(example: Example) -> tuple:
    """What a row asks, in the form in which rows are compared."""
    return (*_surroundings(example), _plain(example.question))


def near_questions(examples: Sequence[Example], encoder: Encoder, similarity: float) -> dict[str, str]:
    """The rows that ask nearly what an earlier row asks, as id → id of the first such row that is none of them itself.

    The cosine of two questions has to be at least `similarity`. Their contexts, earlier turns and numbers have to be
    the same: "rule 4" and "rule 5" are two questions that an encoder hardly tells apart. Rows of `same_questions` are
    not among them, nor are questions that are mostly unknown to the encoder.

    Args:
      examples: in the order that decides which of two rows is the earlier one.
      encoder: of the questions.
      similarity: a cosine.
    """
    repeated = same_questions(examples)
    groups: dict[tuple, list[Example]] = {}
    for example in examples:
        if example.id not in repeated:
            kind = (*_surroundings(example), *sorted(numbers(example.question)))
            groups.setdefault(kind, []).append(example)
    groups = {kind: group for kind, group in groups.items() if len(group) > 1}
    compared = [example for group in groups.values() for example in group]
    if not compared:
        return {}
    vectors_ND = np.asarray(encoder.encode([example.question for example in compared]), np.float64)
    vectors_ND /= np.maximum(np.linalg.norm(vectors_ND, axis=1, keepdims=True), 1e-12)
    vectors_ND[np.asarray(encoder.unknown_shares) > MOSTLY_UNKNOWN] = 0
    pairs, start = {}, 0
    for group in groups.values():
        near = _near(vectors_ND[start : start + len(group)], similarity)
        pairs |= {group[later].id: group[earlier].id for later, earlier in near.items()}
        start += len(group)
    return pairs


def _near(unit_ND: np.ndarray, similarity: float) -> dict[int, int]:
    """Rows with an earlier row at this cosine or above, as index → index of the first that is not in the result."""
    repeated: dict[int, int] = {}
    for start in range(0, len(unit_ND), BLOCK):
        block_MD = unit_ND[start : start + BLOCK]
        cosines_MN = np.round(block_MD @ unit_ND[: start + BLOCK].T, DIGITS)
        # In the order of rows, then of earlier ones.
        for row, earlier in np.argwhere(cosines_MN >= similarity).tolist():
            later = start + row
            if earlier < later and later not in repeated and earlier not in repeated:
                repeated[later] = earlier
    return repeated


def _surroundings(example: Example) -> tuple:
    return _plain(example.context), tuple((role, _plain(content)) for role, content in example.turns)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
