"""Judges of fused answers: the interface, and three judges that run locally (App. C-D)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from raft_jax.data.prompts import question_of
from raft_jax.data.tokenize import prompt_and_answer
from raft_jax.models.encoder import Encoder, similarities
from raft_jax.refine.generate import RefineItem
from raft_jax.sampling import Scorer

NUMBER = re.compile(r"\d+(?:[.,:/]\d+)*")
# A name is a capitalised word that does not begin a sentence, or an acronym anywhere.
NAME = re.compile(r"(?<=[a-z,;:'’\"(\-] )[A-Z][\w'’-]+|\b[A-Z]{2,}\b")


class Judge(Protocol):
    """Scores candidates independently of each other.

    Attributes:
      name: its name in records and report.
      identity: identifies its model and settings; scores recorded under another identity are not reused.
    """

    name: str
    identity: str

    def score(self, items: Sequence[RefineItem], candidates: Sequence[str]) -> list[float | None]:
        """A number in [0, 1] for each candidate, higher is better; None if the judge cannot score it."""
        ...


@dataclass(frozen=True)
class Judgement:
    """What a judge that is asked says of a candidate.

    Attributes:
      value: the score, in [0, 1]; None if there is none.
      reason: the judge's reason, or why there is no score.
      status: "final"; "unreadable", where the judge is asked again; or "failed", where nothing came back.
      text: the reply, where it is unreadable.
      record: more fields of its record in the ledger.
    """

    value: float | None
    reason: str
    status: str = "final"
    text: str = ""
    record: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class AskedJudge(Judge, Protocol):
    """A judge that is asked, gives reasons, and may have to be asked again.

    Attributes:
      scores_gold: whether it also scores the gold answer.
    """

    scores_gold: bool

    def judge(
        self, items: Sequence[RefineItem], candidates: Sequence[str], heard: Sequence[list[str]]
    ) -> Iterator[dict[int, Judgement]]:
        """Yields judgements, keyed by the index of their item, as they come.

        Args:
          items: one for each candidate.
          candidates: the texts.
          heard: each item's replies without a score so far, which are not asked for again.
        """
        ...


class SimilarityJudge:
    """Similarity in meaning of candidate and gold answer: the cosine of Eq. 2, with negative values set to 0."""

    name = "similarity"

    def __init__(self, encoder: Encoder):
        self.encoder, self.identity = encoder, encoder.identity

    def score(self, items: Sequence[RefineItem], candidates: Sequence[str]) -> list[float | None]:
        values = similarities(self.encoder, [item.gold for item in items], list(candidates))
        return [None if math.isnan(value) else max(0.0, float(value)) for value in values]


class CoverageJudge:
    """The share of the gold answer's numbers and names that the candidate has; None if the gold answer has none."""

    name = identity = "coverage"

    def score(self, items: Sequence[RefineItem], candidates: Sequence[str]) -> list[float | None]:
        return [coverage(item.gold, candidate) for item, candidate in zip(items, candidates, strict=True)]


class LikelihoodJudge:
    """Likelihood of the candidate under the base model, relative to its own rewriting, given the question.

        min(1, exp(l(candidate) - l(rewriting))),    l = mean log-likelihood per token

    A candidate that is at least as likely as the model's own text scores 1. Refinement is to close the gap in
    likelihood between gold answers and such text.
    """

    name = "likelihood"

    def __init__(self, scorer: Scorer, params, model: str = ""):
        self.scorer, self.params, self.identity = scorer, params, model

    def score(self, items: Sequence[RefineItem], candidates: Sequence[str]) -> list[float | None]:
        texts = [*candidates, *(item.rewrite for item in items)]
        candidate, rewrite = np.split(mean_logprobs(self.scorer, self.params, [*items, *items], texts), 2)
        return [min(1.0, float(value)) for value in np.exp(np.minimum(candidate - rewrite, 0))]


class LogLikelihood:
    """The base model's mean log-likelihood per token of a text given the question, nats; a `Judge` but for [0, 1]."""

    name = "log-likelihood"

    def __init__(self, scorer: Scorer, params, model: str = ""):
        self.scorer, self.params, self.identity = scorer, params, f"mean log-likelihood {model}"

    def score(self, items: Sequence[RefineItem], candidates: Sequence[str]) -> list[float | None]:
        return [float(value) for value in mean_logprobs(self.scorer, self.params, items, candidates)]


def mean_logprobs(scorer: Scorer, params, items: Sequence[RefineItem], texts: Sequence[str]) -> np.ndarray:
    """Mean log-likelihood per token of each text as the answer to its item's question, `[num_texts]` float32, nats."""
    tokenizer = scorer.model.tokenizer
    pairs = [prompt_and_answer(tokenizer, question_of(item), text) for item, text in zip(items, texts, strict=True)]
    prompts, answers = zip(*pairs, strict=True)
    return scorer.mean_logprob(params, prompts, answers)


def coverage(gold: str, candidate: str) -> float | None:
    """Share of the numbers and names of `gold` that `candidate` has; None if `gold` has none.

    Example:
      >>> coverage("Rule 13 binds every vessel, says the IMO.", "See rule 13.")
      0.5
    """
    numbers, names = set(NUMBER.findall(gold)), {_stem(name) for name in NAME.findall(gold)}
    if not numbers and not names:
        return None
    words = {_stem(word) for word in re.findall(r"[\w'’-]+", candidate)}
    hits = len(numbers & set(NUMBER.findall(candidate))) + len(names & words)
    return hits / (len(numbers) + len(names))


def _stem(word: str) -> str:
    """A name in lower case, without possessive ending."""
    return re.sub(r"['’]s?$", "", word.lower())
