"""Lengths of examples in tokens, and the selection of examples within the limits of length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from raft_jax.config import Config
from raft_jax.data.examples import Example, sampling_order
from raft_jax.data.prompts import Conversation, answered, question_of
from raft_jax.errors import InputError
from raft_jax.models.tokenizer import Tokenizer

QUANTILES = (0.5, 0.9, 0.95, 0.99, 1.0)
KEPT = 0.95  # the fraction of rows that suggested limits keep


class Lengths(NamedTuple):
    """Numbers of tokens of an example.

    `question` counts the texts of the question and of all earlier turns; `answer` includes the end-of-turn token.
    """

    question: int
    answer: int


@dataclass
class Fitting:
    """The examples that are used, and the reasons why others are not.

    Attributes:
      kept: the examples within the limits, in the order of the file.
      too_long: id → why the example is left out.
      bad: id → why the model's chat template rejects the example.
      lengths: id → numbers of tokens, of all measured examples that the chat template accepts.
    """

    kept: list[Example] = field(default_factory=list)
    too_long: dict[str, str] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)
    lengths: dict[str, Lengths] = field(default_factory=dict)

    @property
    def kept_lengths(self) -> list[Lengths]:
        return [self.lengths[example.id] for example in self.kept]


def fitting(examples: Sequence[Example], tokenizer: Tokenizer, config: Config, limit: int | None) -> Fitting:
    """Selects the examples within the limits of length, or a sample of `limit` of them.

    Raises:
      InputError: the chat template rejects an example and data.skip_bad_rows is false.
    """
    data, result, kept = config.data, Fitting(), set()
    sampled = limit is not None and limit < len(examples)
    for example in sampling_order(examples, data.seed) if sampled else examples:
        if len(kept) == limit:
            break
        try:
            lengths = result.lengths[example.id] = measure(example, tokenizer)
        except InputError as error:
            message = f"{data.path}: row {example.id!r}: {error}"
            if not data.skip_bad_rows:
                raise InputError(f"{message}; data.skip_bad_rows=true leaves such rows out") from error
            result.bad[example.id] = message
            continue
        if lengths.question > data.max_question_tokens:
            result.too_long[example.id] = f"question of {lengths.question} tokens"
        elif lengths.answer > data.max_answer_tokens:
            result.too_long[example.id] = f"answer of {lengths.answer} tokens"
        else:
            kept.add(example.id)
    result.kept = [example for example in examples if example.id in kept]
    return result


def measure(example: Example, tokenizer: Tokenizer) -> Lengths:
    """The lengths of an example; raises InputError, with advice, if the chat template rejects it."""
    question = question_of(example)
    conversation = answered(question, example.answer)
    try:
        answer = len(tokenizer.chat_answer(conversation))
    except InputError as error:
        raise InputError(f"{error}{_advice(conversation, tokenizer)}") from error
    return Lengths(sum(len(tokenizer.encode(message["content"])) for message in question), answer)


def _advice(conversation: Conversation, tokenizer: Tokenizer) -> str:
    """Advice on how to make the chat template accept a conversation, found by trying; "" if nothing helps."""
    if conversation[0]["role"] == "system" and _is_taken(conversation[1:], tokenizer):
        return (
            "; it takes no system turn: remove the system turns from the data, put their text into a column "
            "named 'context', or use another model"
        )
    before = tokenizer.thinking
    try:
        for thinking in (False, True, None):
            tokenizer.thinking = thinking
            if thinking is not before and _is_taken(conversation, tokenizer):
                named = {None: "null", True: "true", False: "false"}
                return (
                    f"; model.thinking={named[before]} and the answer disagree: with "
                    f"model.thinking={named[thinking]} it is taken"
                )
    finally:
        tokenizer.thinking = before
    return ""


def _is_taken(conversation: Conversation, tokenizer: Tokenizer) -> bool:
    try:
        tokenizer.chat_answer(conversation)
    except InputError:
        return False
    return True


def quantiles(lengths: Sequence[int]) -> list[int]:
    """The 50, 90, 95, 99 and 100 % quantiles of the lengths.

    Example:
      >>> quantiles(range(1, 101))
      [50, 90, 95, 99, 100]
    """
    return np.quantile(np.asarray(lengths), QUANTILES, method="inverted_cdf").astype(int).tolist()


def limits_that_keep(lengths: Sequence[Lengths], share: float = KEPT) -> Lengths:
    """The lowest limits that keep this share of rows; both are the same quantile, of questions and of answers.

    Example:
      >>> limits_that_keep([Lengths(n, 101 - n) for n in range(1, 101)], 0.9)
      Lengths(question=95, answer=95)
    """
    array = np.asarray(lengths)
    for quantile in np.arange(round(share * 100), 101) / 100:
        limits = np.quantile(array, quantile, axis=0, method="inverted_cdf")
        if (array <= limits).all(axis=1).mean() >= share:
            break
    return Lengths(*limits.astype(int).tolist())


def describe_lengths(lengths: Sequence[Lengths]) -> Iterator[str]:
    """Lines with the quantiles of the lengths and the limits that keep most rows."""
    for name, counts in zip(("questions", "answers"), zip(*lengths, strict=True), strict=True):
        ends = zip(("50 %", "90 %", "95 %", "99 %", "all"), quantiles(counts), strict=True)
        yield f"tokens of {name}, of {len(counts)} rows: " + ", ".join(f"{share} up to {end}" for share, end in ends)
    limits = limits_that_keep(lengths)
    yield (
        f"limits that keep {KEPT:.0%} of these rows: data.max_question_tokens={limits.question} "
        f"data.max_answer_tokens={limits.answer}"
    )
