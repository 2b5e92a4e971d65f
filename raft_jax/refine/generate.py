"""Generators of rewritings and fusions: the interface, and its implementation by a local model (Eqs. 1 and 4)."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import jax

from raft_jax.data.prompts import Conversation, without_system_turn
from raft_jax.errors import InputError
from raft_jax.models import Tokenizer
from raft_jax.refine.screen import REFUSAL
from raft_jax.sampling import Completion, Sampler

SECOND_TRY = 2  # the limit of a second try, as a multiple of the first one's


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
    """A generated text and whether it can be used.

    Attributes:
      text: what was written.
      status: "ok", "empty", "truncated" (cut at the limit), "refusal", or "failed": nothing was written.
      num_tokens: its length.
      note: why nothing was written.
      record: more fields of its record in the ledger, such as the model's name and the seconds.
    """

    text: str
    status: str
    num_tokens: int
    note: str = ""
    record: dict[str, Any] = field(default_factory=dict)


class Generator(Protocol):
    """Generates one text for each item: a rewriting, or the fusion of gold answer and rewriting.

    Attributes:
      identity: identifies the model and its settings; texts recorded under another identity are not reused.
    """

    identity: str

    def prompt(self, item: RefineItem, /) -> Conversation:
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


@runtime_checkable
class LongerGenerator(Generator, Protocol):
    """A generator that can be given a second try at texts that its limit of length has cut."""

    def longer(self) -> Generator | None:
        """The same with the limit of a second try; None if its limit cannot be raised."""
        ...


class LocalGenerator:
    """Generates with a model on this machine.

    Each row has its own random numbers, and its place among the others does not matter, so a run that was killed and
    continued gives the same texts as an undisturbed one. The random numbers do not depend on the limit of length: a
    text that is cut begins like the one with a higher limit.

    `model` identifies the model. `record`, if given, has the model's name and the hash of the prompt's template;
    records in the ledger then say these, the hash of the settings, and what each text took.
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
        record: dict[str, str] | None = None,
    ):
        self.sampler, self.params, self.prompt, self.key = sampler, params, prompt, key
        self.settings = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
        self._model, self._record = model, record
        drawn = jax.random.key_data(key).tolist()
        self.identity = f"{model} {self.settings} key {drawn}"
        self.record = record and {**record, "settings": short_hash(self.identity)}

    def longer(self) -> LocalGenerator:
        """The same with the limit of a second try."""
        settings = self.settings | {"max_new_tokens": SECOND_TRY * self.settings["max_new_tokens"]}
        return LocalGenerator(
            self.sampler, self.params, self.prompt, key=self.key, model=self._model, record=self._record, **settings
        )

    def generate(
        self, items: Sequence[RefineItem], round: int, done: Container[int]
    ) -> Iterator[dict[int, Generation]]:
        tokenizer = self.sampler.model.tokenizer
        prompts = [task_prompt(tokenizer, self.prompt(item)) for item in items]
        names, key = [item.id for item in items], jax.random.fold_in(self.key, round)
        began = time.perf_counter()
        for batch in self.sampler.stream(self.params, prompts, key=key, names=names, done=done, **self.settings):
            seconds = (time.perf_counter() - began) / len(batch)
            yield {
                index: self._recorded(generation_of(completion, tokenizer.decode), len(prompts[index]), seconds)
                for index, completion in batch.items()
            }
            began = time.perf_counter()

    def _recorded(self, generation: Generation, prompt_tokens: int, seconds: float) -> Generation:
        """A generation with the fields of its record in the ledger, if this generator has any."""
        if self.record is None:
            return generation
        finish = "length" if generation.status == "truncated" else "stop"
        took = {"prompt_tokens": prompt_tokens, "seconds": round(seconds, 3), "finish": finish, "retries": 0}
        return replace(generation, record={**self.record, **took})


def digest(*parts: Any) -> str:
    """Sixteen hexadecimal digits that identify some values."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()[:16]


def short_hash(*parts: Any) -> str:
    """The first eight digits of `digest`.

    Example:
      >>> short_hash("a", 1) == short_hash("a", 1) != short_hash("a", 2)
      True
    """
    return digest(*parts)[:8]


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
