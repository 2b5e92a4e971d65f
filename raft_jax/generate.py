"""Answers questions with one model, or with several models side by side."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from raft_jax.errors import InputError, require_train

require_train("rich")

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from raft_jax.config import Config
from raft_jax.data.prompts import question_prompt
from raft_jax.models import load_pretrained
from raft_jax.report.folder import label
from raft_jax.run_folder import RunFolder
from raft_jax.sampling import Sampler
from raft_jax.terminal import visible

BATCH_SIZE = 8


def models_of(config: Config) -> list[tuple[str, str]]:
    """(name, source) of a run's base model and of every model that the run has exported."""
    exports = [(name, RunFolder(config.run_dir).method(name).export) for name in config.methods]
    tuned = [(label(name), str(export)) for name, export in exports if (export / "config.json").exists()]
    return [("base", config.model.source), *tuned]


def generate(
    models: Sequence[tuple[str, str]],
    questions: Sequence[str],
    console: Console,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    dtype: str = "float32",
    attention: str = "auto",
    thinking: bool | None = None,
    date: datetime.date | None = None,
) -> None:
    """Prints each model's answers; an answer that was truncated at the limit ends with an ellipsis.

    `date` is the current date for chat templates that print it; None is today. Each model is loaded once.

    Raises:
      InputError: a model does not exist, or the question and max_new_tokens exceed its positions.
    """
    answers: list[list[str]] = []
    for _, source in models:
        model = load_pretrained(source, jnp.dtype(dtype), attention=attention)
        model.tokenizer.thinking, model.tokenizer.date = thinking, date
        prompts = [model.tokenizer.chat_prompt(question_prompt(question)) for question in questions]
        longest = max(map(len, prompts))
        room = model.config.max_positions - longest
        if room < 1:
            raise InputError(
                f"{source}: the question of {longest} tokens is too long for the model's "
                f"{model.config.max_positions} positions"
            )
        if max_new_tokens > room:
            raise InputError(
                f"{source}: the question leaves room for {room} tokens; lower --max-new-tokens {max_new_tokens}"
            )
        completions = Sampler(model, batch_size=min(len(prompts), BATCH_SIZE)).generate(
            model.params,
            prompts,
            key=jax.random.key(seed),
            temperature=temperature,
            max_new_tokens=max_new_tokens,
        )
        answers.append(
            [
                model.tokenizer.decode(completion.tokens).strip() + " …" * (not completion.finished)
                for completion in completions
            ]
        )
    for question, given in zip(questions, zip(*answers, strict=True), strict=True):
        if len(questions) > 1:
            console.print(Text(f"> {question}", style="bold"), soft_wrap=True)
        if len(models) == 1:
            console.print(Text(given[0]), soft_wrap=True)
            continue
        width = max(30, console.width // len(models) - 1)
        console.print(
            Columns(
                [
                    Panel(Text(visible(answer)), title=Text(visible(name)), width=width)
                    for answer, (name, _) in zip(given, models, strict=True)
                ]
            )
        )
