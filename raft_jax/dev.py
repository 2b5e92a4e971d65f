"""Scores during training, on rows that are neither trained on nor part of the final evaluation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import jax
import numpy as np

from raft_jax.config import Config
from raft_jax.data.examples import Example, load_examples, split_counts
from raft_jax.data.prompts import question_of, question_prompt
from raft_jax.data.tokenize import prompt_and_answer
from raft_jax.errors import InputError
from raft_jax.evaluate.compare import GeneralPrompt
from raft_jax.evaluate.divergence import make_divergence
from raft_jax.lengths import fitting
from raft_jax.models.tokenizer import Tokenizer
from raft_jax.run_data import columns_of
from raft_jax.sampling import Sampler, Scorer

if TYPE_CHECKING:
    from raft_jax.train.student import Student

NAMES = ("dev", "validation", "val")  # of the split, where data.dev_split is null


def dev_rows(config: Config, tokenizer: Tokenizer) -> list[Example]:
    """The rows of the dev split within the limits of length, at most `data.max_dev` of them.

    Raises:
      InputError: the data has no such rows, or they are training or held-out rows.
    """
    data, columns = config.data, columns_of(config.data)
    counts = split_counts(data.path, columns)
    names = NAMES if data.dev_split is None else (data.dev_split,)
    split = next((name for name in names if counts.get(name)), None)
    if split is None:
        raise InputError(
            f"train.eval_every: {data.path} has no rows of the split {' or '.join(names)} "
            f"(splits there: {', '.join(counts) or 'none'}); add some, set data.dev_split, or set train.eval_every=0"
        )
    if split in (data.train_split, data.test_split):
        raise InputError(f"data.dev_split is {split!r}, whose rows are training or held-out rows; use another split")
    rows = load_examples(data.path, columns, split, bad_rows={} if data.skip_bad_rows else None)
    kept = fitting(rows, tokenizer, config, data.max_dev).kept
    if not kept:
        raise InputError(f"{data.path}: all {len(rows)} rows of the split {split} are longer than the limits of data.*")
    return kept


class DevScores:
    """Log-likelihood of the gold answers of the dev rows, and divergence from the base model on general prompts.

    The base model answers the general prompts once, greedily; nothing else is sampled.
    """

    def __init__(
        self,
        student: Student,
        rows: Sequence[Example],
        general: Sequence[GeneralPrompt],
        *,
        general_new_tokens: int,
        batch_size: int,
        mesh: jax.sharding.Mesh | None,
    ):
        self._student, self._base = student, student.model.params
        self._forward_params = jax.jit(student.forward_params)
        self._scorer = Scorer(student.model, batch_size, mesh)
        self._divergence = make_divergence(student.model, batch_size, mesh)
        self._sampler, self._new_tokens = Sampler(student.model, batch_size, mesh, shrink=True), general_new_tokens
        tokenizer = student.model.tokenizer
        pairs = [prompt_and_answer(tokenizer, question_of(row), row.answer) for row in rows]
        self._prompts, self._answers = map(list, zip(*pairs, strict=True))
        self._general = [tokenizer.chat_prompt(question_prompt(prompt.prompt)) for prompt in general]

    @cached_property
    def _base_answers(self) -> list[list[int]]:
        completions = self._sampler.generate(
            self._base, self._general, key=jax.random.key(0), temperature=0.0, max_new_tokens=self._new_tokens
        )
        return [completion.tokens for completion in completions]

    def __call__(self, params) -> dict[str, float]:
        """`dev_gold_logprob` and `dev_divergence`, nats per token, of the trained parameters; and `dev_seconds`."""
        began = time.perf_counter()
        params = self._forward_params(params, self._base)
        logprobs = self._scorer.mean_logprob(params, self._prompts, self._answers)
        divergences = self._divergence(self._base, params, self._general, self._base_answers)
        means = {"dev_gold_logprob": float(np.mean(logprobs)), "dev_divergence": float(np.mean(divergences))}
        return means | {"dev_seconds": time.perf_counter() - began}
