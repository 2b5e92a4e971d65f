"""The scores of an evaluated model, in the structure of evaluation.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error (None for fewer than two values), and the number of values."""

    mean: float | None = None
    stderr: float | None = None
    count: int = 0

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """The estimate from individual values.

        Example:
          >>> Estimate.of([1.0, 2.0, 4.0, 5.0])
          Estimate(mean=3.0, stderr=0.9128709291752769, count=4)
        """
        array = np.asarray(values, np.float64)
        if not array.size:
            return cls()
        stderr = float(array.std(ddof=1) / np.sqrt(array.size)) if array.size > 1 else None
        return cls(float(array.mean()), stderr, array.size)


@dataclass(frozen=True)
class DomainScores:
    """Scores on the held-out questions; `cut` is the number of answers truncated at the limit of length."""

    gold_logprob: Estimate
    token_f1: Estimate
    similarity: Estimate
    cut: int = 0


@dataclass(frozen=True)
class GeneralScores:
    """Scores on the general prompts; `cut` is the number of answers truncated at the limit of length."""

    divergence: Estimate
    accuracy: Estimate
    cut: int = 0


@dataclass(frozen=True)
class WeightDistance:
    """Relative distance to the base model's weights: mean over layers, of each layer, and of the embedding."""

    mean: float | None = None
    layers: list[float] = field(default_factory=list)
    embedding: float | None = None


@dataclass(frozen=True)
class DomainAnswer:
    """A greedy answer to a held-out question; `similarity` is None if the encoder does not know the words."""

    id: str
    question: str
    gold: str
    answer: str
    token_f1: float
    similarity: float | None
    gold_logprob: float
    cut: bool = False


@dataclass(frozen=True)
class GeneralAnswer:
    """A greedy answer to a general prompt; `correct` is None if it cannot be checked automatically."""

    id: str
    category: str
    prompt: str
    answer: str
    correct: bool | None
    divergence: float
    cut: bool = False


@dataclass(frozen=True)
class ModelScores:
    """All scores and answers of one model; `tokens` is the number of tokens generated for them."""

    domain: DomainScores
    general: GeneralScores
    weight_distance: WeightDistance
    answers: list[DomainAnswer]
    general_answers: list[GeneralAnswer]
    tokens: int
