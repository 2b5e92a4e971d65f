"""One question, answered by one model or by several side by side."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from raft_jax.config import Config
from raft_jax.data.prompts import question_prompt
from raft_jax.errors import InputError
from raft_jax.models import load_pretrained
from raft_jax.report.folder import label
from raft_jax.sampling import Sampler


def models_of(config: Config) -> list[tuple[str, str]]:
    """Name and source of a run's base model and of every model that it has exported."""
    folders = [(name, Path(config.run_dir) / name / "hf") for name in config.methods]
    tuned = [(label(name), str(folder)) for name, folder in folders if (folder / "config.json").exists()]
    return [("base", config.model.source), *tuned]


def generate(
    models: Sequence[tuple[str, str]], question: str, console: Console, *, max_new_tokens: int, temperature: float,
    seed: int, dtype: str = "float32", attention: str = "auto", thinking: bool | None = None,
    date: datetime.date | None = None,
) -> None:
    """Prints each model's answer; an answer that was cut at the limit ends with an ellipsis.

    `date` is what a chat template that prints one takes for today; None is today.

    Raises:
      InputError: there is no such model, or no room for the answer after the question.
    """
    answers = []
    for name, source in models:
        model = load_pretrained(source, jnp.dtype(dtype), attention=attention)
        model.tokenizer.thinking, model.tokenizer.date = thinking, date
        prompt = model.tokenizer.chat_prompt(question_prompt(question))
        room = model.config.max_positions - len(prompt)
        if room < 1:
            raise InputError(f"{source}: the question of {len(prompt)} tokens is too long for the model's "
                             f"{model.config.max_positions} positions")
        if max_new_tokens > room:
            raise InputError(f"{source}: the question leaves room for {room} tokens; lower --max-new-tokens "
                             f"{max_new_tokens}")
        (completion,) = Sampler(model, batch_size=1).generate(
            model.params, [prompt], key=jax.random.key(seed), temperature=temperature, max_new_tokens=max_new_tokens,
        )
        answer = model.tokenizer.decode(completion.tokens).strip()
        answers.append((name, answer if completion.finished else answer + " …"))
    if len(answers) == 1:
        console.print(Text(answers[0][1]), soft_wrap=True)
        return
    width = max(30, console.width // len(answers) - 1)
    console.print(Columns([Panel(Text(answer), title=Text(name), width=width) for name, answer in answers]))
