"""Scores of a model on held-out questions of the domain and on general prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from raft_jax.config import EvaluateConfig
from raft_jax.data.examples import Example, require_whole_characters
from raft_jax.data.files import lines_of, parse_json
from raft_jax.data.prompts import Prompts, load_prompts, question_of, question_prompt
from raft_jax.data.tokenize import prompt_and_answer
from raft_jax.errors import InputError
from raft_jax.evaluate.accuracy import distinct, is_correct, require_check, token_f1
from raft_jax.evaluate.divergence import make_divergence, weight_distance
from raft_jax.evaluate.expected import NOTHING, Expected, label_in
from raft_jax.models import Model
from raft_jax.models.encoder import Encoder, similarities
from raft_jax.progress import progress
from raft_jax.sampling import Completion, Sampler, Scorer
from raft_jax.scores import DomainAnswer, DomainScores, Estimate, GeneralAnswer, GeneralScores, ModelScores, Writing
from raft_jax.sources import resolve
from raft_jax.terminal import one_line


@dataclass(frozen=True)
class GeneralPrompt:
    """A prompt outside the domain; `check` tells how a program recognises a correct answer, None if it cannot."""

    id: str
    category: str
    prompt: str
    check: dict[str, Any] | None = None

    def __post_init__(self):
        for name in ("id", "category", "prompt"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name).strip():
                raise ValueError(f"{name} must be text")
        if self.check is not None:
            require_check(self.check)


def load_general_prompts(source: str) -> list[GeneralPrompt]:
    """Reads a JSONL file of general prompts.

    Raises:
      InputError: a line is not a prompt or repeats an id (the message has file and line), or there are no prompts.
    """
    path = resolve(source)
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe or device"
        raise InputError(f"{path}: {kind}; evaluate.general_path is a JSONL file of general prompts")
    prompts, numbers = [], {}
    for number, line in enumerate(lines_of(str(path), path, "\n"), start=1):
        if not line.strip():
            continue
        values = parse_json(str(path), line.rstrip("\n"), number)
        require_whole_characters(json.dumps(values, ensure_ascii=False), f"{path}:{number}", "the prompt or its check")
        try:
            prompts.append(GeneralPrompt(**_as_ours(values)))
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{path}:{number}: not a general prompt ({one_line(error, 200)}); a line has id, category, prompt "
                "and check"
            ) from error
        if (first := numbers.setdefault(prompts[-1].id, number)) != number:
            raise InputError(f"{path}:{number}: id {prompts[-1].id!r} is that of line {first}; give each its own")
    if not prompts:
        raise InputError(f"{path}: no prompts in it")
    return prompts


def _as_ours(values: dict[str, Any]) -> dict[str, Any]:
    """The keys of a general prompt, also of a line of MT-Bench's questions, whose first turn is asked."""
    if "question_id" not in values:
        return values
    turns = values.get("turns")
    prompt = turns[0] if isinstance(turns, list) and turns else None
    return {"id": str(values["question_id"]), "category": values.get("category"), "prompt": prompt}


class Evaluator:
    """Evaluates models; holds what all of them share: questions, prompts, the base model's answers."""

    def __init__(
        self,
        model: Model,
        encoder: Encoder,
        questions: Sequence[Example],
        general: Sequence[GeneralPrompt],
        settings: EvaluateConfig,
        mesh: jax.sharding.Mesh | None = None,
        expected: Expected = NOTHING,
        prompts: Prompts | None = None,
    ):
        self.model, self.encoder, self.settings, self.expected = model, encoder, settings, expected
        self.questions, self.general = list(questions), list(general)
        self.sampler = Sampler(model, settings.batch_size, mesh, shrink=True)
        self.scorer = Scorer(model, settings.batch_size, mesh)
        self.divergence = make_divergence(model, settings.batch_size, mesh)
        tokenizer = model.tokenizer
        pairs = [prompt_and_answer(tokenizer, question_of(example), example.answer) for example in self.questions]
        self.question_prompts, self.gold_answers = map(list, zip(*pairs, strict=True))
        self.general_prompts = [tokenizer.chat_prompt(question_prompt(prompt.prompt)) for prompt in self.general]
        prompts = prompts or load_prompts()
        self.teacher_prompts = [
            tokenizer.chat_prompt(prompts.teacher(example.question, example.answer, example.context, example.turns))
            for example in self.questions
        ]
        self._base_continuations: list[Completion] | None = None
        self._base_answers: list[Completion] | None = None
        self._teacher_answers: tuple[list[list[int]], np.ndarray] | None = None

    def base_continuations(self) -> list[Completion]:
        """The base model's own greedy answers to the general prompts."""
        if self._base_continuations is None:
            self._base_continuations = self._greedy(
                self.model.params, self.general_prompts, self.settings.general_new_tokens, "base on general prompts"
            )
        return self._base_continuations

    def base_answers(self) -> list[Completion]:
        """The base model's own greedy answers to the held-out questions."""
        if self._base_answers is None:
            self._base_answers = self._greedy(
                self.model.params, self.question_prompts, self.settings.max_new_tokens, "base on questions"
            )
        return self._base_answers

    def teacher_answers(self) -> tuple[list[list[int]], np.ndarray]:
        """The teacher's greedy answers, and their log-likelihoods under it: the base model's, which is given gold."""
        if self._teacher_answers is None:
            params = self.model.params
            completions = self._greedy(params, self.teacher_prompts, self.settings.max_new_tokens, "teacher's answers")
            answers = [completion.tokens for completion in completions]
            with progress("teacher reads its answers", len(answers), "answers") as bar:
                logprobs = self.scorer.mean_logprob(params, self.teacher_prompts, answers, bar.advance)
            self._teacher_answers = answers, logprobs
        return self._teacher_answers

    def evaluate(self, name: str, params) -> ModelScores:
        """The scores of one model, which docs/evaluation.md defines."""
        answers, domain_completions = self._answer_questions(name, params)
        answers = self._with_labels(name, params, answers)
        general, general_completions = self._answer_general(name, params)
        similar = [answer.similarity for answer in answers if answer.similarity is not None]
        return ModelScores(
            DomainScores(
                Estimate.of([answer.gold_logprob for answer in answers]),
                Estimate.of([answer.token_f1 for answer in answers]),
                Estimate.of(similar),
                sum(answer.cut for answer in answers),
                Estimate.of([answer.correct for answer in answers if answer.correct is not None]),
                Estimate.of([answer.likely_label == answer.label for answer in answers if answer.label]),
                Estimate.of([answer.text_label == answer.label for answer in answers if answer.label]),
                divergence=Estimate.of([answer.divergence for answer in answers if answer.divergence is not None]),
                writing=_writing(domain_completions, [answer.answer for answer in answers]),
                teacher_gap=Estimate.of([answer.teacher_gap for answer in answers if answer.teacher_gap is not None]),
            ),
            GeneralScores(
                Estimate.of([answer.divergence for answer in general]),
                Estimate.of([answer.correct for answer in general if answer.correct is not None]),
                sum(answer.cut for answer in general),
                _writing(general_completions, [answer.answer for answer in general]),
            ),
            weight_distance(params, self.model.params),
            answers,
            general,
            _num_tokens(domain_completions) + _num_tokens(general_completions),
        )

    def _answer_questions(self, name: str, params) -> tuple[list[DomainAnswer], list[Completion]]:
        """Greedy answers to the held-out questions with their scores, and as completions.

        The divergence is measured on the base model's answers.
        """
        base = completions = self.base_answers()
        divergences = np.zeros(len(base), np.float32)
        if params is not self.model.params:
            completions = self._greedy(
                params, self.question_prompts, self.settings.max_new_tokens, f"{name} on questions"
            )
            divergences = self._divergence_on(name, params, self.question_prompts, base)
        texts, gold = self._texts(completions), [example.answer for example in self.questions]
        with progress(f"{name} reads gold answers", len(gold), "answers") as bar:
            logprobs = self.scorer.mean_logprob(params, self.question_prompts, self.gold_answers, bar.advance)
        teacher_answers, teacher_logprobs = self.teacher_answers()
        with progress(f"{name} reads the teacher's answers", len(gold), "answers") as bar:
            gaps = teacher_logprobs - self.scorer.mean_logprob(
                params, self.question_prompts, teacher_answers, bar.advance
            )
        with progress(f"{name}: similarity", 2 * len(gold), "texts") as bar:
            cosines = similarities(self.encoder, texts, gold, bar.advance)
        answers = [
            DomainAnswer(
                example.id,
                example.question,
                example.answer,
                text,
                float(token_f1(text, example.answer)),
                None if np.isnan(cosine) else float(cosine),
                float(logprob),
                not completion.finished,
                is_correct(self.expected.checks.get(example.id), text),
                divergence=float(divergence),
                teacher_gap=float(gap),
            )
            for example, text, completion, cosine, logprob, divergence, gap in zip(
                self.questions, texts, completions, cosines, logprobs, divergences, gaps, strict=True
            )
        ]
        return answers, completions

    def _with_labels(self, name: str, params, answers: list[DomainAnswer]) -> list[DomainAnswer]:
        """The answers with the labels that they give, and those that the model finds most likely when asked for one.

        A label's likelihood is that of the whole answer, the end of the turn included.
        """
        expected = self.expected
        labelled = [example for example in self.questions if example.id in expected.labels]
        if not labelled:
            return answers
        pairs = [
            prompt_and_answer(self.model.tokenizer, expected.choice_prompt(example), choice)
            for example in labelled
            for choice in expected.choices
        ]
        prompts, choices = map(list, zip(*pairs, strict=True))
        with progress(f"{name} reads labels", len(pairs), "labels") as bar:
            means = self.scorer.mean_logprob(params, prompts, choices, bar.advance)
        logprobs = (means * np.array(list(map(len, choices)))).reshape(len(labelled), len(expected.choices))
        likely = {
            example.id: expected.choices[best]
            for example, best in zip(labelled, np.argmax(logprobs, axis=1), strict=True)
        }
        return [
            replace(
                answer,
                label=expected.labels[answer.id],
                likely_label=likely[answer.id],
                text_label=label_in(answer.answer, expected.choices) or "",
            )
            if answer.id in likely
            else answer
            for answer in answers
        ]

    def _divergence_on(self, name: str, params, prompts, base: Sequence[Completion]) -> np.ndarray:
        with progress(f"{name} against base", len(base), "answers") as bar:
            answers = [answer.tokens for answer in base]
            return self.divergence(self.model.params, params, prompts, answers, bar.advance)

    def _answer_general(self, name: str, params) -> tuple[list[GeneralAnswer], list[Completion]]:
        """Greedy answers to the general prompts with their scores, and as completions.

        The divergence is measured on the base model's answers.
        """
        base = completions = self.base_continuations()
        divergences = np.zeros(len(base), np.float32)
        if params is not self.model.params:
            divergences = self._divergence_on(name, params, self.general_prompts, base)
            completions = self._greedy(
                params, self.general_prompts, self.settings.general_new_tokens, f"{name} on general prompts"
            )
        answers = [
            GeneralAnswer(
                prompt.id,
                prompt.category,
                prompt.prompt,
                text,
                is_correct(prompt.check, text),
                float(divergence),
                not completion.finished,
            )
            for prompt, text, completion, divergence in zip(
                self.general, self._texts(completions), completions, divergences, strict=True
            )
        ]
        return answers, completions

    def _texts(self, completions: Sequence[Completion]) -> list[str]:
        return [self.model.tokenizer.decode(completion.tokens).strip() for completion in completions]

    def _greedy(self, params, prompts, max_new_tokens: int, title: str) -> list[Completion]:
        with progress(title, len(prompts), "answers") as bar:
            return self.sampler.generate(
                params,
                prompts,
                key=jax.random.key(0),
                temperature=0.0,
                max_new_tokens=max_new_tokens,
                on_batch=lambda batch, _: bar.advance(len(batch)),
            )


def _writing(completions: Sequence[Completion], texts: Sequence[str]) -> Writing:
    return Writing(
        Estimate.of([completion.finished for completion in completions]),
        Estimate.of([len(completion.tokens) for completion in completions]),
        Estimate.of([share for text in texts if (share := distinct(text)) is not None]),
    )


def _num_tokens(completions: Sequence[Completion]) -> int:
    return sum(len(completion.tokens) for completion in completions)
