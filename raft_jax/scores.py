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
class Writing:
    """How answers are written.

    Attributes:
      ended: share of the answers that end before the limit of length.
      length: in tokens.
      distinct: share of an answer's runs of three words that are different; low where it goes round in circles.
    """

    ended: Estimate = Estimate()
    length: Estimate = Estimate()
    distinct: Estimate = Estimate()


@dataclass(frozen=True)
class DomainScores:
    """Scores on the held-out questions.

    Attributes:
      gold_logprob, token_f1, similarity: against the gold answers.
      cut: number of answers truncated at the limit of length.
      checked: share of the answers with a check that pass it.
      label_likelihood: share of the labelled questions whose label is the most likely one.
      label_text: share of the labelled questions whose label is the first one in the answer.
      accepted: domain accuracy, the share of answers that a majority of the judges accepts.
      agreement: Krippendorff's alpha of the judges' verdicts on this model's answers; None if it is undefined.
      divergence: KL(base ‖ model) on the base model's own answers to the questions, nats per token.
      writing: how the answers are written.
      teacher_gap: on the teacher's own answers, their log-likelihood under the teacher, which is given the gold answer,
        minus that under the model; nats per token.
    """

    gold_logprob: Estimate
    token_f1: Estimate
    similarity: Estimate
    cut: int = 0
    checked: Estimate = Estimate()
    label_likelihood: Estimate = Estimate()
    label_text: Estimate = Estimate()
    accepted: Estimate = Estimate()
    agreement: float | None = None
    divergence: Estimate = Estimate()
    writing: Writing = Writing()
    teacher_gap: Estimate = Estimate()


@dataclass(frozen=True)
class GeneralScores:
    """Scores on the general prompts.

    Attributes:
      cut: number of answers truncated at the limit of length.
      accepted: share of the answers to open prompts, those without a check, that a majority of the judges accepts.
      agreement: Krippendorff's alpha of these verdicts; None if it is undefined.
    """

    divergence: Estimate
    accuracy: Estimate
    cut: int = 0
    writing: Writing = Writing()
    accepted: Estimate = Estimate()
    agreement: float | None = None


@dataclass(frozen=True)
class WeightDistance:
    """Relative distance to the base model's weights: mean over layers, of each layer, and of the embedding."""

    mean: float | None = None
    layers: list[float] = field(default_factory=list)
    embedding: float | None = None


@dataclass(frozen=True)
class DomainAnswer:
    """A greedy answer to a held-out question.

    Attributes:
      similarity: None if the encoder does not know the words.
      cut: whether the answer is truncated at the limit of length.
      correct: whether it passes the check of its row; None without one.
      label: of its row, "" without one; `likely_label` is the most likely one under the model, `text_label` the first
        in the answer, "" if there is none.
      judges: each judge's score, None if it gave none, and `reasons` what it said.
      accepted: whether a majority of the judges accepts it; None if none gave a score.
      divergence: on the base model's own answer to the question; None where it was not measured.
      teacher_gap: on the teacher's answer to it; None where it was not measured.
    """

    id: str
    question: str
    gold: str
    answer: str
    token_f1: float
    similarity: float | None
    gold_logprob: float
    cut: bool = False
    correct: bool | None = None
    label: str = ""
    likely_label: str = ""
    text_label: str = ""
    judges: dict[str, float | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    accepted: bool | None = None
    divergence: float | None = None
    teacher_gap: float | None = None


@dataclass(frozen=True)
class GeneralAnswer:
    """A greedy answer to a general prompt.

    Attributes:
      correct: None if it cannot be checked automatically.
      judges, reasons, accepted: of an answer to an open prompt, as in DomainAnswer.
    """

    id: str
    category: str
    prompt: str
    answer: str
    correct: bool | None
    divergence: float
    cut: bool = False
    judges: dict[str, float | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    accepted: bool | None = None


@dataclass(frozen=True)
class TaskScore:
    """A metric of a task of lm-evaluation-harness, its standard error if it has one, and the number of questions."""

    value: float
    stderr: float | None
    count: int


@dataclass(frozen=True)
class ModelScores:
    """All scores and answers of one model.

    Attributes:
      tokens: number of tokens generated for the answers.
      tasks: the metrics of each task of `evaluate.tasks`, by their names.
    """

    domain: DomainScores
    general: GeneralScores
    weight_distance: WeightDistance
    answers: list[DomainAnswer]
    general_answers: list[GeneralAnswer]
    tokens: int
    tasks: dict[str, dict[str, TaskScore]] = field(default_factory=dict)
