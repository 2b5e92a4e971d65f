"""Questions to a chat model and its replies: the interface, and its implementation by a model on this machine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from raft_jax.data.prompts import Conversation

REFUSED = "refused"  # finish of a request that the server refused, such as one of more tokens than it takes
FAILED = "failed"  # status of a request that got no reply; it is not recorded, and tried again by the next refinement


@dataclass(frozen=True)
class Request:
    """What a model is asked.

    Attributes:
      messages: the conversation.
      name: the row and the purpose, from which a local model's random numbers are drawn.
      seed: for a server's random numbers.
      temperature: 0 is greedy.
      schema: a JSON schema for the reply, where the server takes one.
      max_tokens: of the reply in a second try; None: the model's own limit.
    """

    messages: Conversation
    name: str
    seed: int
    temperature: float
    schema: dict[str, Any] | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
      text: without what a model thinks before its answer.
      status: "ok", "empty", "truncated" (cut at the limit of length), "refusal", or "failed": there is no reply.
      note: what is wrong, in words, if the status is not "ok".
      prompt_tokens: length of the prompt, 0 if the server does not say.
      num_tokens: length of the reply, what the model thinks included.
      seconds: from sending the first try to the last byte.
      finish: the server's finish reason, or "refused" if it refused the request itself.
      retries: tries before the one that this reply is of.
    """

    text: str
    status: str = "ok"
    note: str = ""
    prompt_tokens: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    finish: str = ""
    retries: int = 0

    def record(self) -> dict[str, Any]:
        """The fields of a ledger's record that say what the reply took."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "num_tokens": self.num_tokens,
            "seconds": round(self.seconds, 3),
            "finish": self.finish,
            "retries": self.retries,
        }


class Chat(Protocol):
    """A chat model, on a server or on this machine.

    Attributes:
      name: its name in records and report.
      model: the model's name.
      identity: identifies model and settings; replies that are recorded under another identity are not reused.
      temperature: its own temperature; None where each role has its own.
      max_tokens: its limit of a reply; None if it cannot be raised.
      cost: of the replies so far, in the currency of its prices; None without prices.
    """

    name: str
    model: str
    identity: str
    temperature: float | None
    max_tokens: int | None

    @property
    def cost(self) -> float | None: ...

    def ask(self, requests: Sequence[Request]) -> Iterator[dict[int, Reply]]:
        """Yields replies, keyed by the index of their request, as they come."""
        ...

    def note(self) -> str:
        """The state of the work for a progress line; "" if there is nothing to say."""
        ...


def without_thoughts(text: str) -> str | None:
    """A text without what a model thinks before its answer; None if the thoughts do not end.

    Example:
      >>> without_thoughts("<think>Hm.</think>\\n\\nYes."), without_thoughts("<think>Hm."), without_thoughts("Yes.")
      ('Yes.', None, 'Yes.')
    """
    _, closed, rest = text.rpartition("</think>")
    if closed:
        return rest.strip()
    return None if re.match(r"\s*<think>", text) else text.strip()
