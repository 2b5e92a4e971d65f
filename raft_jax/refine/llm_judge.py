"""A chat model as a judge: asked for a score and a reason as JSON, and asked again where it gives none (App. C-D)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from raft_jax.data.prompts import Conversation
from raft_jax.refine.chat import FAILED, Chat, Reply, Request
from raft_jax.refine.generate import RefineItem, short_hash
from raft_jax.refine.judge import Judgement
from raft_jax.refine.remote import seed_of
from raft_jax.terminal import one_line

MOST_ASKS = 3  # the question, and two corrections
SCHEMA = {
    "type": "object",
    "properties": {"score": {"type": "number", "minimum": 0, "maximum": 1}, "reason": {"type": "string"}},
    "required": ["score", "reason"],
    "additionalProperties": False,
}
# No example of an object: weak models copy it, score included.
CORRECTION = (
    'Reply with one JSON object and nothing else. It has "score", a number from 0 to 1, and "reason", one sentence of '
    "at most 20 words."
)
_LONGEST_QUOTE = 2000  # characters of an unreadable reply that are repeated to the judge
_SCORE_IN_TEXT = re.compile(
    r"\bscore\b[\"'*\s]*(?::|=|is|of)[\"'*\s]*([01](?:\.\d+)?|\.\d+)(?![\d./%]*[\d/%])", re.IGNORECASE
)


class LLMJudge:
    """A `Judge` that asks a chat model how well a candidate stands in for the gold answer.

    The model sees the question and the two texts, in an order that depends on the seed, and is not told which round or
    model wrote the candidate. It does not score the gold answer itself: compared with itself that would always be best.

    Args:
      chat: the model.
      prompt: makes the conversation from question, context, gold answer, candidate and whether the candidate is first.
      seed: the run's.
      prompt_hash: of the prompt's template.
    """

    scores_gold = False

    def __init__(self, chat: Chat, prompt: Callable[..., Conversation], *, seed: int, prompt_hash: str):
        self.chat, self.prompt, self.seed = chat, prompt, seed
        self.name = chat.name
        self.temperature = chat.temperature or 0.0
        self.identity = f"{chat.identity} temperature {self.temperature} seed {seed} prompt {prompt_hash}"
        self.record = {"model": chat.model, "settings": short_hash(self.identity), "prompt": prompt_hash}

    def score(self, items: Sequence[RefineItem], candidates: Sequence[str]) -> list[float | None]:
        scores: list[float | None] = [None] * len(items)
        for judgements in self.judge(items, candidates, [[] for _ in items]):
            for index, judgement in judgements.items():
                scores[index] = judgement.value
        return scores

    def judge(
        self, items: Sequence[RefineItem], candidates: Sequence[str], heard: Sequence[list[str]]
    ) -> Iterator[dict[int, Judgement]]:
        """See `AskedJudge.judge`."""
        heard = [list(texts) for texts in heard]
        waiting = list(range(len(items)))
        while waiting:
            requests = [self._request(items[index], candidates[index], heard[index]) for index in waiting]
            again = []
            for replies in self.chat.ask(requests):
                judgements = {}
                for number, reply in replies.items():
                    index = waiting[number]
                    judgements[index] = self._judgement(reply, len(heard[index]) + 1)
                    if judgements[index].status == "unreadable":
                        heard[index].append(reply.text)
                        again.append(index)
                yield judgements
            waiting = sorted(again)

    def _judgement(self, reply: Reply, asks: int) -> Judgement:
        record = {**self.record, **reply.record()}
        if reply.status == FAILED:
            return Judgement(None, reply.note, FAILED)
        try:
            if reply.status != "ok":
                raise ValueError(reply.note)
            score, reason = read_judgement(reply.text)
        except ValueError as error:
            status = "unreadable" if asks < MOST_ASKS else "final"
            return Judgement(None, f"no score after {asks} asks: {error}", status, reply.text, record)
        return Judgement(score, reason, record=record)

    def _request(self, item: RefineItem, candidate: str, heard: Sequence[str]) -> Request:
        seed = seed_of(self.seed, "judge", self.name, item.id, candidate)
        messages = self.prompt(item.question, item.context, item.gold, candidate, candidate_first=bool(seed & 1))
        for text in heard:
            if text.strip():
                messages = [*messages, {"role": "assistant", "content": text[:_LONGEST_QUOTE]}]
                messages.append({"role": "user", "content": CORRECTION})
            else:  # two turns of the user in a row are refused by some chat templates
                *before, last = messages
                messages = [*before, {**last, "content": f"{last['content']}\n\n{CORRECTION}"}]
        name = f"{item.id} judge {self.name} {short_hash(candidate)} {len(heard)}"
        return Request(messages, name, seed + len(heard), self.temperature, SCHEMA)


def read_judgement(text: str) -> tuple[float, str]:
    """Score and reason in a judge's reply: a JSON object, alone or within text, or words such as "Score: 0.8".

    Raises:
      ValueError: there is no score in [0, 1], or there are several; says which.

    Example:
      >>> read_judgement('Here it is:\\n```json\\n{"score": "0.8", "reason": "All there."}\\n```')
      (0.8, 'All there.')
      >>> read_judgement("I like it.")
      Traceback (most recent call last):
        ...
      ValueError: no score in 'I like it.'
    """
    shown = one_line(text, 80)
    objects = [entry for entry in _objects(text) if "score" in entry]
    if not objects:
        # A number at the end of JSON that is cut may lack digits.
        scores = {float(match) for match in _SCORE_IN_TEXT.findall(text)} if "{" not in text else set()
        if len(scores) != 1:
            raise ValueError(f"{'several scores' if scores else 'no score'} in {shown!r}")
        return scores.pop(), ""
    scores = {_score(entry["score"]) for entry in objects}
    if len(scores) > 1:
        raise ValueError(f"several scores in {shown!r}")
    (score,) = scores
    if score is None:
        raise ValueError(f"a score that is no number from 0 to 1 in {shown!r}")
    reason = objects[-1].get("reason")
    return score, one_line(reason, 500) if isinstance(reason, str) else ""


def _score(value: object) -> float | None:
    """A score, as a number or as text; None if it is none in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and 0 <= number <= 1 else None


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text, from left to right."""
    decoder, start = json.JSONDecoder(), text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            start = text.find("{", start + 1)
            continue
        if isinstance(value, dict):
            yield value
        start = text.find("{", end)
