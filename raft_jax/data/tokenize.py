"""Conversations as token ids, and the rows that a method trains on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from raft_jax.data.batches import TokenRow
from raft_jax.data.prompts import Conversation, Prompts, answered, load_prompts, question_of
from raft_jax.data.refined import RefinedRow
from raft_jax.methods import Method


class ChatTokenizer(Protocol):
    """The part of a tokenizer that renders conversations, such as `raft_jax.models.Tokenizer`."""

    def chat_prompt(self, messages: Conversation) -> list[int]:
        """Ids up to the start of the assistant's answer."""
        ...

    def chat_answer(self, messages: Conversation) -> list[int]:
        """Ids of the last message, the assistant's, including the end of its turn."""
        ...


def prompt_and_answer(tokenizer: ChatTokenizer, conversation: Conversation, answer: str) -> tuple[list[int], list[int]]:
    """Ids of the prompt, which are not in the loss, and of the answer, which are."""
    return tokenizer.chat_prompt(conversation), tokenizer.chat_answer(answered(conversation, answer))


def target_of(row: RefinedRow, method: Method) -> str:
    """The answer that a method trains on: y, the rewriting if accepted and else y (Eq. 3), or the fused one (Eq. 4)."""
    if method.target == "rewrite":
        return row.rewrite if row.accepted else row.gold
    return row.answer if method.target == "fused" else row.gold


def token_rows(
    rows: Sequence[RefinedRow], tokenizer: ChatTokenizer, method: Method, prompts: Prompts | None = None
) -> list[TokenRow]:
    """The rows that a method trains on as token ids, numbered in their order; `prompts` has the teacher's."""
    prompts = prompts or load_prompts()
    tokenized = []
    for number, row in enumerate(rows):
        question = question_of(row)
        if method.target == "none":
            prompt = tokenizer.chat_prompt(question)
            tokenized.append(TokenRow(prompt, [], prompt, number))
            continue
        target = target_of(row, method)
        prompt, answer = prompt_and_answer(tokenizer, question, target)
        teacher = []
        if method.distils:
            sees_answer = method.teacher_sees_answer
            teacher = tokenizer.chat_prompt(
                prompts.teacher(row.question, target, row.context, row.turns) if sees_answer else question
            )
        tokenized.append(TokenRow(prompt, answer, teacher, number))
    return tokenized
