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
from raft_jax.host_memory import return_memory_after_compiling
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
    return_memory_after_compiling()
    answers = []
    for _, source in models:
        model = load_pretrained(source, jnp.dtype(dtype), attention=attention)
        model.tokenizer.thinking, model.tokenizer.date = thinking, date
        prompts = [model.tokenizer.chat_prompt(question_prompt(question)) for question in questions]
        _require_positions(source, model.config.max_positions, max(map(len, prompts)), max_new_tokens)
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
    names = [name for name, _ in models]
    for question, texts in zip(questions, zip(*answers, strict=True), strict=True):
        if len(questions) > 1:
            console.print(Text(f"> {question}", style="bold"), soft_wrap=True)
        _print_answers(console, names, texts)


def _require_positions(source: str, max_positions: int, num_prompt_tokens: int, max_new_tokens: int) -> None:
    """Raises InputError where the longest prompt and the answer exceed the model's positions."""
    left = max_positions - num_prompt_tokens
    if left < 1:
        raise InputError(
            f"{source}: the question of {num_prompt_tokens} tokens is too long for the model's {max_positions} "
            "positions"
        )
    if max_new_tokens > left:
        raise InputError(
            f"{source}: the question leaves room for {left} tokens; lower --max-new-tokens {max_new_tokens}"
        )


def _print_answers(console: Console, names: Sequence[str], texts: Sequence[str]) -> None:
    if len(names) == 1:
        console.print(Text(texts[0]), soft_wrap=True)
        return
    width = max(30, console.width // len(names) - 1)
    console.print(
        Columns(
            [
                Panel(Text(visible(text)), title=Text(visible(name)), width=width)
                for name, text in zip(names, texts, strict=True)
            ]
        )
    )
