"""One model's marks: what it knows of the domain, and what it kept of the rest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from raft_jax.config import EvaluateConfig
from raft_jax.data.examples import Example, require_whole_characters
from raft_jax.data.files import lines_of, parse_json
from raft_jax.data.prompts import question_prompt
from raft_jax.errors import InputError
from raft_jax.evaluate.accuracy import is_correct, require_check, token_f1
from raft_jax.evaluate.drift import make_divergence, weight_distance
from raft_jax.models import Model
from raft_jax.models.encoder import Encoder, similarities
from raft_jax.progress import progress
from raft_jax.sampling import Completion, Sampler, Scorer
from raft_jax.sources import resolve
from raft_jax.terminal import one_line


@dataclass(frozen=True)
class GeneralPrompt:
    """A prompt outside the domain; `check` says how a program knows a right answer, if it can."""

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
      InputError: file and line of what is not a prompt.
    """
    path = resolve(source)
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe or device"
        raise InputError(f"{path}: {kind}; evaluate.general_path is a JSONL file of general prompts")
    prompts, seen = [], {}
    for number, line in enumerate(lines_of(str(path), path, "\n"), start=1):
        if not line.strip():
            continue
        values = parse_json(str(path), line.rstrip("\n"), number)
        require_whole_characters(json.dumps(values, ensure_ascii=False), f"{path}:{number}", "the prompt or its check")
        try:
            prompts.append(GeneralPrompt(**values))
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{path}:{number}: not a general prompt ({one_line(error, 200)}); a line has id, category, prompt "
                "and check"
            ) from error
        if (first := seen.setdefault(prompts[-1].id, number)) != number:
            raise InputError(f"{path}:{number}: id {prompts[-1].id!r} is that of line {first}; give each its own")
    if not prompts:
        raise InputError(f"{path}: no prompts in it")
    return prompts


class Evaluation:
    """Everything that is the same for each model that is evaluated: questions, prompts, the base model's words."""

    def __init__(
        self, model: Model, encoder: Encoder, questions: Sequence[Example], general: Sequence[GeneralPrompt],
        settings: EvaluateConfig, mesh: jax.sharding.Mesh | None = None,
    ):
        self.model, self.encoder, self.settings = model, encoder, settings
        self.questions, self.general = list(questions), list(general)
        self.sampler = Sampler(model, settings.batch_size, mesh)
        self.scorer = Scorer(model, settings.batch_size, mesh)
        self.divergence = make_divergence(model, settings.batch_size, mesh)
        tokenizer = model.tokenizer
        asked = [question_prompt(example.question, example.context, example.turns) for example in self.questions]
        self.question_prompts = [tokenizer.chat_prompt(messages) for messages in asked]
        self.gold_answers = [
            tokenizer.chat_answer([*messages, {"role": "assistant", "content": example.answer}])
            for messages, example in zip(asked, self.questions, strict=True)
        ]
        self.general_prompts = [tokenizer.chat_prompt(question_prompt(prompt.prompt)) for prompt in self.general]
        self._base_continuations: list[Completion] | None = None

    def base_continuations(self) -> list[Completion]:
        """The base model's own greedy answers to the general prompts."""
        if self._base_continuations is None:
            self._base_continuations = self._greedy(
                self.model.params, self.general_prompts, self.settings.general_new_tokens, "base on general prompts"
            )
        return self._base_continuations

    def evaluate(self, name: str, params) -> dict[str, Any]:
        """The marks of one model; see docs/evaluation.md for each."""
        decode = self.model.tokenizer.decode
        is_base = params is self.model.params
        written = self._greedy(params, self.question_prompts, self.settings.max_new_tokens, f"{name} on questions")
        answers = [decode(completion.tokens).strip() for completion in written]
        gold = [example.answer for example in self.questions]
        with progress(f"{name} reads gold answers", len(gold), "answers") as bar:
            logprob = self.scorer.mean_logprob(params, self.question_prompts, self.gold_answers, bar.advance)
        overlap = [token_f1(answer, wanted) for answer, wanted in zip(answers, gold, strict=True)]
        with progress(f"{name}: similarity", 2 * len(gold), "texts") as bar:
            similar = [None if np.isnan(value) else float(value)
                       for value in similarities(self.encoder, answers, gold, bar.advance)]

        base = self.base_continuations()
        tokens = [completion.tokens for completion in base]
        drift = np.zeros(len(tokens), np.float32)
        if is_base:
            general = base
        else:
            with progress(f"{name} against base", len(tokens), "answers") as bar:
                drift = self.divergence(self.model.params, params, self.general_prompts, tokens, bar.advance)
            general = self._greedy(
                params, self.general_prompts, self.settings.general_new_tokens, f"{name} on general prompts"
            )
        said = [decode(completion.tokens).strip() for completion in general]
        correct = [is_correct(prompt.check, text) for prompt, text in zip(self.general, said, strict=True)]
        return {
            "domain": {
                "gold_logprob": _estimate(logprob), "token_f1": _estimate(overlap),
                "similarity": _estimate([cosine for cosine in similar if cosine is not None]), "cut": _num_cut(written),
            },
            "general": {
                "divergence": _estimate(drift), "accuracy": _estimate([mark for mark in correct if mark is not None]),
                "cut": _num_cut(general),
            },
            "weight_distance": weight_distance(params, self.model.params),
            "answers": [
                {"id": example.id, "question": example.question, "gold": example.answer, "answer": answer,
                 "cut": not completion.finished, "token_f1": float(f1), "similarity": cosine,
                 "gold_logprob": float(value)}
                for example, answer, completion, f1, cosine, value in zip(
                    self.questions, answers, written, overlap, similar, logprob, strict=True
                )
            ],
            "general_answers": [
                {"id": prompt.id, "category": prompt.category, "prompt": prompt.prompt, "answer": text,
                 "cut": not completion.finished, "correct": mark, "divergence": float(value)}
                for prompt, text, completion, mark, value in zip(
                    self.general, said, general, correct, drift, strict=True
                )
            ],
            "tokens": sum(len(completion.tokens) for completion in [*written, *general]),
        }

    def _greedy(self, params, prompts, max_new_tokens: int, title: str) -> list[Completion]:
        with progress(title, len(prompts), "answers") as bar:
            return self.sampler.generate(
                params, prompts, key=jax.random.key(0), temperature=0.0, max_new_tokens=max_new_tokens,
                on_batch=lambda batch, _: bar.advance(len(batch)),
            )


def _num_cut(completions: Sequence[Completion]) -> int:
    """How many answers were not at their end when the limit came."""
    return sum(not completion.finished for completion in completions)


def _estimate(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean, its standard error, and how many values there are."""
    array = np.asarray(values, np.float64)
    if not array.size:
        return {"mean": None, "stderr": None, "count": 0}
    stderr = float(array.std(ddof=1) / np.sqrt(array.size)) if array.size > 1 else None
    return {"mean": float(array.mean()), "stderr": stderr, "count": int(array.size)}
