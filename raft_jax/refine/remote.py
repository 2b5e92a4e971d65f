"""Writes rewritings and fusions by asking a chat model, and asks models on this machine as one asks a server."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator, Sequence

import jax

from raft_jax.data.prompts import Conversation
from raft_jax.errors import InputError
from raft_jax.refine.chat import Chat, Reply, Request, without_thoughts
from raft_jax.refine.generate import SECOND_TRY, Generation, RefineItem, short_hash, task_prompt
from raft_jax.refine.screen import REFUSAL
from raft_jax.sampling import Sampler


def seed_of(*parts: object) -> int:
    """A seed of 31 bits from some values: the same in every run.

    Example:
      >>> seed_of(0, "q1", 2) == seed_of(0, "q1", 2) != seed_of(0, "q1", 3)
      True
    """
    return int(short_hash(*parts), 16) >> 1


class ChatGenerator:
    """A `Generator` that asks a chat model; each row and round has a seed of its own.

    Args:
      chat: the model.
      prompt: makes the conversation of an item.
      purpose: "rewrite" or "fuse".
      seed: the run's.
      temperature: where the chat model has none of its own.
      prompt_hash: of the prompt's template.
      max_tokens: of a reply in a second try; None: the chat model's own limit.
    """

    def __init__(
        self,
        chat: Chat,
        prompt: Callable[[RefineItem], Conversation],
        *,
        purpose: str,
        seed: int,
        temperature: float,
        prompt_hash: str = "",
        max_tokens: int | None = None,
    ):
        self.chat, self.prompt, self.purpose, self.seed = chat, prompt, purpose, seed
        self.max_tokens = max_tokens
        self.temperature = temperature if chat.temperature is None else chat.temperature
        self.identity = f"{chat.identity} temperature {self.temperature} seed {seed} {purpose}"
        if max_tokens is not None:
            self.identity += f" up to {max_tokens} tokens"
        self.record = {"model": chat.model, "settings": short_hash(self.identity), "prompt": prompt_hash}

    def longer(self) -> ChatGenerator | None:
        """The same with the limit of a second try; None where the limit is not the chat model's own."""
        if self.chat.max_tokens is None:
            return None
        return ChatGenerator(
            self.chat,
            self.prompt,
            purpose=self.purpose,
            seed=self.seed,
            temperature=self.temperature,
            prompt_hash=self.record["prompt"],
            max_tokens=SECOND_TRY * self.chat.max_tokens,
        )

    def generate(
        self, items: Sequence[RefineItem], round: int, done: Container[int]
    ) -> Iterator[dict[int, Generation]]:
        left = [index for index in range(len(items)) if index not in done]
        requests = [
            Request(
                self.prompt(items[index]),
                f"{items[index].id} {self.purpose} {round}",
                seed_of(self.seed, self.purpose, items[index].id, round),
                self.temperature,
                max_tokens=self.max_tokens,
            )
            for index in left
        ]
        for replies in self.chat.ask(requests):
            yield {left[number]: self._generation(reply) for number, reply in replies.items()}

    def _generation(self, reply: Reply) -> Generation:
        status = "refusal" if reply.status == "ok" and REFUSAL.search(reply.text) else reply.status
        return Generation(reply.text, status, reply.num_tokens, reply.note, {**self.record, **reply.record()})


class LocalChat:
    """A model on this machine, asked as one asks a server; a `Chat`.

    Args:
      name: its name in records and report.
      sampler: of the model.
      params: its parameters.
      key: of its random numbers.
      model: its name.
      identity: identifies the model and its settings.
      max_new_tokens: longest reply.
    """

    temperature: float | None = None
    max_tokens: int | None = None
    cost: float | None = None

    def __init__(
        self, name: str, sampler: Sampler, params, *, key: jax.Array, model: str, identity: str, max_new_tokens: int
    ):
        self.name, self.sampler, self.params, self.key, self.model = name, sampler, params, key, model
        self.max_new_tokens = max_new_tokens
        self.identity = f"{identity} up to {max_new_tokens} tokens key {jax.random.key_data(key).tolist()}"

    def ask(self, requests: Sequence[Request]) -> Iterator[dict[int, Reply]]:
        model = self.sampler.model
        prompts = [task_prompt(model.tokenizer, request.messages) for request in requests]
        longest = max(map(len, prompts), default=0)
        if longest + self.max_new_tokens > model.config.max_positions:
            raise InputError(
                f"{self.name}: a prompt of {longest} tokens and {self.max_new_tokens} new ones do not fit the model's "
                f"{model.config.max_positions} positions; take another model in refine.judges"
            )
        began = time.perf_counter()
        for batch in self.sampler.stream(
            self.params,
            prompts,
            key=self.key,
            names=[request.name for request in requests],
            temperature=requests[0].temperature if requests else 0.0,
            max_new_tokens=self.max_new_tokens,
        ):
            seconds = (time.perf_counter() - began) / len(batch)
            yield {
                index: _reply(completion, model.tokenizer.decode(completion.tokens), len(prompts[index]), seconds)
                for index, completion in batch.items()
            }
            began = time.perf_counter()

    def note(self) -> str:
        return ""


def _reply(completion, decoded: str, prompt_tokens: int, seconds: float) -> Reply:
    text = without_thoughts(decoded)
    status = "truncated" if text is None or not completion.finished else "ok" if text else "empty"
    note = {"truncated": "cut at the limit of length", "empty": "no text in the reply"}.get(status, "")
    finish = "stop" if completion.finished else "length"
    return Reply(text or "", status, note, prompt_tokens, len(completion.tokens), seconds, finish)
