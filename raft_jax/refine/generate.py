"""Generators of rewritings and fusions: the interface, and its implementation by a local model (Eqs. 1 and 4)."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import jax

from raft_jax.data.prompts import Conversation, without_system_turn
from raft_jax.errors import InputError
from raft_jax.models import Tokenizer
from raft_jax.refine.screen import REFUSAL
from raft_jax.sampling import Completion, Sampler


@dataclass(frozen=True)
class RefineItem:
    """One row during the refinement; `turns` are the turns before the question as (role, content)."""

    id: str
    question: str
    gold: str
    rewrite: str = ""
    context: str = ""
    turns: tuple[tuple[str, str], ...] = ()

    def asked(self, terse_words: int) -> tuple[str, str, tuple[tuple[str, str], ...]]:
        """Question, context and turns for a prompt; question and context are empty unless the gold answer is terse."""
        terse = len(self.gold.split()) < terse_words
        return self.question if terse else "", self.context if terse else "", self.turns

    @property
    def source(self) -> str:
        """All text before the answer: earlier turns, context and question."""
        return "\n".join([*(content for _, content in self.turns), self.context, self.question])


@dataclass(frozen=True)
class Generation:
    """A generated text and whether it can be used: "ok", "empty", "truncated" (cut at the limit) or "refusal"."""

    text: str
    status: str
    num_tokens: int


class Generator(Protocol):
    """Generates one text for each item: a rewriting, or the fusion of gold answer and rewriting.

    Attributes:
      identity: identifies the model and its settings; texts recorded under another identity are not reused.
    """

    identity: str

    def prompt(self, item: RefineItem) -> Conversation:
        """The prompt for an item; an empty item gives the instructions alone."""
        ...

    def generate(
        self, items: Sequence[RefineItem], round: int, done: Container[int]
    ) -> Iterator[dict[int, Generation]]:
        """Yields finished texts, keyed by the index of their item, as they become available.

        Args:
          items: all items of the round, including those that are done.
          round: counted from 1; each round gives other texts.
          done: indices that need not be generated again.
        """
        ...


class LocalGenerator:
    """Generates with a model on this machine.

    Batches are formed from all items, whether done or not, and each row has its own random numbers, so a run that was
    killed and continued gives the same texts as an undisturbed one.
    """

    def __init__(
        self,
        sampler: Sampler,
        params,
        prompt: Callable[[RefineItem], Conversation],
        *,
        key: jax.Array,
        model: str = "",
        temperature: float,
        top_p: float,
        max_new_tokens: int,
    ):
        self.sampler, self.params, self.prompt, self.key = sampler, params, prompt, key
        self.settings = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
        drawn = jax.random.key_data(key).tolist()
        self.identity = f"{model} {self.settings} key {drawn}"

    def generate(
        self, items: Sequence[RefineItem], round: int, done: Container[int]
    ) -> Iterator[dict[int, Generation]]:
        tokenizer = self.sampler.model.tokenizer
        prompts = [task_prompt(tokenizer, self.prompt(item)) for item in items]
        key = jax.random.fold_in(self.key, round)
        for batch in self.sampler.batches(prompts):
            if all(index in done for index in batch):
                continue
            completions = self.sampler.generate(
                self.params,
                [prompts[index] for index in batch],
                key=key,
                names=[items[index].id for index in batch],
                **self.settings,
            )
            yield {
                index: generation_of(completion, tokenizer.decode)
                for index, completion in zip(batch, completions, strict=True)
            }


def task_prompt(tokenizer: Tokenizer, conversation: Conversation) -> list[int]:
    """Ids of a conversation; if the chat template has no system turn, its text is put into the user turn."""
    try:
        rendered = tokenizer.render(conversation)
    except InputError:
        rendered = ""
    if conversation[0]["content"].strip() not in rendered:  # the template refuses or silently drops it
        conversation = without_system_turn(conversation)
    return tokenizer.chat_prompt(conversation)


def generation_of(completion: Completion, decode: Callable[[Sequence[int]], str]) -> Generation:
    """Decodes a completion and determines its status."""
    text = decode(completion.tokens).strip()
    if not completion.finished:
        status = "truncated"
    elif not text:
        status = "empty"
    elif REFUSAL.search(text):
        status = "refusal"
    else:
        status = "ok"
    return Generation(text, status, len(completion.tokens))
