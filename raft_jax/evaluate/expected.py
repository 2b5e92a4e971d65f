"""What the data says of a right answer besides the gold text: a check that a program can do, and a label."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raft_jax.config import Config
from raft_jax.data.examples import Example
from raft_jax.data.files import Row, Wanted, read_rows
from raft_jax.data.prompts import Conversation, question_prompt
from raft_jax.errors import InputError
from raft_jax.evaluate.accuracy import require_check
from raft_jax.terminal import one_line

MOST_LABELS = 20
CHOICE = "Answer with one of these and nothing else: {labels}."


@dataclass(frozen=True)
class Expected:
    """How answers are recognised as right without their gold texts.

    Attributes:
      checks: the check of a question, by its id; see `raft_jax.evaluate.accuracy.is_correct`.
      labels: the label of a question, by its id.
      choices: all labels of the data, sorted.
    """

    checks: Mapping[str, dict[str, Any]]
    labels: Mapping[str, str]
    choices: tuple[str, ...] = ()

    def choice_prompt(self, example: Example) -> Conversation:
        """Asks for the label of a question."""
        asked = f"{example.question}\n\n{CHOICE.format(labels=', '.join(self.choices))}"
        return question_prompt(asked, example.context, example.turns)


NOTHING = Expected({}, {})


def load_expected(config: Config, examples: Sequence[Example]) -> Expected:
    """Reads the columns `evaluate.check` and `evaluate.label` of the data, for some of its rows.

    Raises:
      InputError: a check is none, a label is no text, the column of the labels does not exist or has too many
        different ones; names the row and the setting.
    """
    settings, data = config.evaluate, config.data
    if settings.check is None and settings.label is None:
        return NOTHING
    others = [name for name in (settings.check, settings.label, data.id) if name]
    rows = read_rows(data.path, Wanted((), others, split=data.split))
    ids = _ids(rows, data.id)
    kept = {example.id for example in examples}
    checks = {
        id: _check(row, settings.check)
        for id, row in zip(ids, rows, strict=True)
        if id in kept and settings.check and _cell(row, settings.check) is not None
    }
    if settings.label is None:
        return Expected(checks, {})
    labelled = {
        id: _label(row, settings.label)
        for id, row in zip(ids, rows, strict=True)
        if _cell(row, settings.label) is not None
    }
    choices = tuple(sorted(set(labelled.values())))
    if not 2 <= len(choices) <= MOST_LABELS:
        raise InputError(
            f"{data.path}: the column {settings.label!r} has {len(choices)} different labels; allowed: 2 to "
            f"{MOST_LABELS}; change evaluate.label, or set it to null"
        )
    return Expected(checks, {id: label for id, label in labelled.items() if id in kept}, choices)


def _ids(rows: Sequence[Row], column: str | None) -> list[str]:
    """The ids that `load_examples` gives: of the column, or the numbers of the rows."""
    if column and any(column in row.values for row in rows):
        return [str(row.values.get(column)) for row in rows]
    return [f"{number:06d}" for number in range(1, len(rows) + 1)]


def _cell(row: Row, column: str) -> Any:
    value = row.values.get(column)
    return None if value == "" else value


def _check(row: Row, column: str) -> dict[str, Any]:
    """The check of a row: an object, or its JSON where cells are text, as in CSV files."""
    value = row.values[column]
    try:
        value = json.loads(value) if isinstance(value, str) else value
        require_check(value)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{row.where}: {column!r} is no check ({one_line(error, 200)}); see docs/general_prompts.md, or set "
            "evaluate.check to another column, or to null"
        ) from error
    return value


def _label(row: Row, column: str) -> str:
    value = row.values[column]
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{row.where}: {column!r} is {value!r:.40}, not a label; labels are texts; see evaluate.label")
    return value.strip()


def label_in(text: str, choices: Iterable[str]) -> str | None:
    """The label that an answer gives: the first one in it as a whole word, ignoring case; None if there is none.

    Of labels that begin at the same place the longest counts.

    Example:
      >>> label_in("Maybe. Not no, and not yes.", ["yes", "no", "maybe"])
      'maybe'
      >>> label_in("I do not know.", ["yes", "no"]) is None
      True
    """
    by_name = {label.casefold(): label for label in choices}
    names = "|".join(map(re.escape, sorted(by_name, key=len, reverse=True)))
    match = re.search(rf"(?<!\w)(?:{names})(?!\w)", text.casefold())
    return by_name[match[0]] if match else None
