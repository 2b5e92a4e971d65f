"""Turns rows into questions and answers: names of columns, conversations, splits, held-out examples."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raft_jax.data.files import Row, Wanted, read_rows
from raft_jax.data.wording import Unread, Unreadable, kind_of, quoted, shown
from raft_jax.errors import InputError


@dataclass(frozen=True)
class Columns:
    """The names of the columns.

    `question` and `answer` may name the same column if it holds conversations.
    Columns with the default names of `id`, `split`, `context` and `system` may be missing; a column with another name
    must exist. An empty name means that there is no such column: with `context=""` a column called context is not read.
    """

    question: str = "question"
    answer: str = "answer"
    id: str | None = "id"  # None: rows are numbered
    split: str = "split"
    context: str = "context"
    system: str = "system"


@dataclass(frozen=True)
class Example:
    """One question with its gold answer and the turns before it.

    Attributes:
      id: unique in the data.
      question: the last user turn, or the value of the question column.
      answer: the gold answer.
      context: the text that the question refers to, from the context column; "" if there is none.
      turns: the turns before the question as (role, content): the system turn, and earlier questions and answers.
      more_answers: further gold answers of the row, each unlike the others.
    """

    id: str
    question: str
    answer: str
    context: str = ""
    turns: tuple[tuple[str, str], ...] = ()  # (role, content) of the turns before the question
    more_answers: tuple[str, ...] = ()


class BadRow(InputError):
    """An error in a single row: the other rows can be used without it."""


_DEFAULTS = Columns()
# Shapes of rows recognised by default, as (question column, answer column); for conversations both are one column.
_SHAPES = (
    (_DEFAULTS.question, _DEFAULTS.answer),
    ("prompt", "completion"),
    ("messages", "messages"),
    ("conversations", "conversations"),
)
# Names of these columns in other tools: suggested in the error if a column is missing, never used without being set.
_SYNONYMS = {
    "question": ("prompt", "instruction", "query", "input", "problem"),
    "answer": ("completion", "output", "response", "target", "solution", "chosen"),
}
# Columns that tell a row of a refined data set, in which the earlier turns are in a column of their own.
_REFINED = ("rewrite_status", "turns")
# ShareGPT's names of the roles.
_ROLES = {"human": "user", "gpt": "assistant"}
# Keys of a turn, or of the row of a conversation, that are errors: only texts are used, so their values would be lost.
_LOST_WITH_TURN = (
    "tool_calls",
    "function_call",
    "tool_call_id",
    "reasoning_content",
    "reasoning",
    "thinking",
    "images",
    "image",
    "audio",
    "audios",
    "video",
    "videos",
)
_LOST_WITH_ROW = (
    "tools",
    "functions",
    "documents",
    "images",
    "image",
    "audio",
    "audios",
    "video",
    "videos",
    "chat_template_kwargs",
)
_WEIGHTS = ("weight", "train", "loss")  # keys of a turn; 0 or false excludes it from training


def load_examples(
    path_or_uri: str | Path,
    columns: Columns = _DEFAULTS,
    split: str | None = None,
    limit: int | None = None,
    bad_rows: dict[str, str] | None = None,
) -> list[Example]:
    """Reads questions and answers, in the order of the file.

    By default, four shapes of row are recognised: `question` and `answer`; `prompt` and `completion`; `messages`, which
    holds a conversation; ShareGPT's `conversations`. A row has the first shape whose columns exist in it and are not
    all null. If `columns` names other columns for question and answer, only those are read.

    An answer may be a list of texts: several answers to one question (`more_answers`).

    A question or an answer may be a list of chat turns, as role and content or as ShareGPT's from and value. The last
    turn must be the assistant's and is the answer; the turn before it must be the user's and is the question. Earlier
    turns go into `turns`. Other roles, content that is not text, and turns with data besides text, such as tool calls,
    are errors.

    Args:
      path_or_uri: a file (.jsonl, .json, .csv, .tsv, each also .gz; .parquet), a folder written by tfds (also
        as `tfds://FOLDER`), or `package://MODULE/PATH`.
      columns: the names of the columns.
      split: only rows of this split (the value of the split column, or a split of a tfds folder). None: all.
      limit: the largest number of examples. None: no limit.
      bad_rows: if given, rows that cannot be used are left out and added here, as id → description of the error. Errors
        in ids, in splits or in the file itself are raised in any case.

    Returns:
      The examples. Without an id column, the id is the row's number in the file, from 000001.
      Ids may be text or whole numbers. Ids are checked in all rows, splits too if `split` is given. Texts are checked
      in the rows of the split only, until `limit` is reached.

    Raises:
      InputError: the message has file and line, the problem, and the remedy.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "faq.jsonl"
      >>> _ = path.write_text('{"prompt": "How long?", "completion": "Thirty days."}')
      >>> load_examples(path)
      [Example(id='000001', question='How long?', answer='Thirty days.', context='', turns=(), more_answers=())]
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit}: must be at least 1, or absent to read all rows")
    rows = _read(path_or_uri, columns)
    ids = _ids(rows, columns)
    if split is not None:
        splits = _splits(rows, columns)
        kept = [index for index, name in enumerate(splits) if name == split]
        if not kept:
            known = ", ".join(f"{shown(name)} ({count})" for name, count in sorted(Counter(splits).items()))
            advice = (
                f"there are: {known}; set data.train_split or data.test_split"
                if known
                else f"there is no column {columns.split!r}; set data.split"
            )
            raise InputError(f"{path_or_uri}: no rows of the split {split!r}; {advice}")
        rows, ids = [rows[index] for index in kept], [ids[index] for index in kept]
    return _examples(ids, rows, columns, limit, bad_rows)


def _examples(
    ids: Sequence[str], rows: Sequence[Row], columns: Columns, limit: int | None, bad_rows: dict[str, str] | None
) -> list[Example]:
    usual = _usual_shape(rows, columns)
    examples: list[Example] = []
    first_error = None
    for id, row in zip(ids, rows, strict=True):
        if len(examples) == limit:
            break
        try:
            examples.append(_example(id, row, _shape(row, columns) or usual, columns))
        except BadRow as error:
            if bad_rows is None:
                raise InputError(f"{error}; data.skip_bad_rows=true leaves such rows out") from error
            bad_rows[id] = str(error)
            first_error = first_error or error
    if not examples:
        raise InputError(f"{first_error}; none of the {len(rows)} rows can be used") from first_error
    return examples


def split_counts(path_or_uri: str | Path, columns: Columns = _DEFAULTS) -> dict[str, int]:
    """Counts the rows of each split; empty if there is no split column (then see `split_held_out`)."""
    return dict(sorted(Counter(_splits(_read(path_or_uri, columns), columns)).items()))


def split_held_out(examples: list[Example], count: int, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Holds `count` examples out, chosen by a hash of seed and id.

    The choice does not depend on the order of the examples, and adding one replaces at most one held-out example.

    Returns:
      (the remaining examples, at least one; the held-out examples), both in the order given.

    Example:
      >>> rest, held_out = split_held_out([Example(str(i), "q", "a") for i in range(8)], count=2)
      >>> len(rest), len(held_out)
      (6, 2)
    """
    if not 0 <= count < len(examples):
        raise InputError(f"cannot hold out {count} of {len(examples)} examples: one must be left; lower data.held_out")
    chosen = set(_in_hash_order([example.id for example in examples], f"{seed}:")[:count])
    return (
        [example for example in examples if example.id not in chosen],
        [example for example in examples if example.id in chosen],
    )


def sampling_order(examples: Iterable[Example], seed: int = 0) -> list[Example]:
    """Sorts examples by a hash of seed and id: adding an example replaces at most one of the first n.

    The order is independent of the choice of `split_held_out` with the same seed.
    """
    by_id = {example.id: example for example in examples}
    return [by_id[id] for id in _in_hash_order(by_id, f"{seed}:sample:")]


def _in_hash_order(ids: Iterable[str], salt: str) -> list[str]:
    return sorted(ids, key=lambda id: hashlib.sha256(f"{salt}{id}".encode()).digest())


def _read(path_or_uri: str | Path, columns: Columns) -> list[Row]:
    others = [name for name in (columns.id, columns.split, columns.context, columns.system) if name]
    others += ["weight", *_REFINED]
    return read_rows(str(path_or_uri), Wanted(_shapes(columns), others, _LOST_WITH_ROW, columns.split))


def _ids(rows: Sequence[Row], columns: Columns) -> list[str]:
    if not _has(rows, columns, "id"):
        return [f"{number:06d}" for number in range(1, len(rows) + 1)]
    advice = "give each row its own, or set data.id=null to number the rows"
    places: dict[str, str] = {}
    for row in rows:
        if columns.id not in row.values:
            raise _missing(row, str(columns.id), "id", "=null to number the rows")
        id = row.values[columns.id]
        if isinstance(id, int) and not isinstance(id, bool):
            id = str(id)
        try:
            id = _text(id, row.where, columns.id)
        except BadRow as error:
            problem = str(error).partition("; ")[0]
            raise InputError(f"{problem} (text or a whole number is expected); {advice}") from error
        if id in places:
            raise InputError(f"{row.where}: the id {quoted(id)} is already that of {places[id]}; {advice}")
        places[id] = row.where
    return list(places)


def _splits(rows: Sequence[Row], columns: Columns) -> list[str]:
    """The split of each row; empty if there is no split column."""
    splits = []
    for row in rows if _has(rows, columns, "split") else ():
        if columns.split not in row.values:
            raise _missing(row, columns.split, "split", '="" to use no column')
        try:
            splits.append(_text(row.values[columns.split], row.where, columns.split))
        except BadRow as error:
            problem = str(error).partition("; ")[0]
            raise InputError(
                f'{problem}; give each row its split, or set data.split="" to hold rows out by a hash of their ids'
            ) from error
    return splits


def _has(rows: Sequence[Row], columns: Columns, field: str) -> bool:
    name = getattr(columns, field)
    return bool(name) and (name != getattr(_DEFAULTS, field) or any(name in row.values for row in rows))


def _missing(row: Row, name: str, field: str, instead: str = "") -> BadRow:
    names = [str(key) for key in row.values]
    close = [other for other in _SYNONYMS.get(field, ()) if other in names]
    close += [other for other in difflib.get_close_matches(name, names, n=3) if other not in close]
    advice = f"set data.{field}{instead}"
    if close and not instead:
        advice += f", perhaps to {' or '.join(map(shown, close))}"
        value = row.values[close[0]]
        if isinstance(value, Unread | dict | list) and kind_of(value) not in ("string", "a list of objects"):
            advice += f" ({kind_of(value)} stands there; a text, or a list of {{role, content}}, is needed)"
    objects = [key for key, value in row.values.items() if kind_of(value).startswith("an object")]
    if objects and not close:
        advice += (
            f" ({shown(objects[0])} is {kind_of(row.values[objects[0]])}; its texts are needed in columns of their own)"
        )
    listed = ", ".join(map(shown, names[:20])) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return BadRow(f"{row.where}: no column {quoted(name)}; there are: {listed or 'none'}; {advice}")


def _shapes(columns: Columns) -> Sequence[tuple[str, str]]:
    """The pairs of columns that may hold question and answer; the same column twice holds conversations."""
    named = columns.question, columns.answer
    return _SHAPES if named == _SHAPES[0] else (named,)


def _shape(row: Row, columns: Columns) -> tuple[str, str] | None:
    """The first shape whose columns the row has, with at least one of them not null."""
    for shape in _shapes(columns):
        if all(name in row.values for name in shape) and any(row.values[name] is not None for name in shape):
            return shape
    return None


def _usual_shape(rows: Sequence[Row], columns: Columns) -> tuple[str, str]:
    """The shape of the first row that has one.

    Raises:
      InputError: no row has the columns.
    """
    shape = next(filter(None, (_shape(row, columns) for row in rows)), None)
    if shape is None:
        shape = _shapes(columns)[0]
        for name, field in zip(shape, ("question", "answer"), strict=True):
            if not any(name in row.values for row in rows):
                raise InputError(str(_missing(rows[0], name, field)))
    return shape


def _example(id: str, row: Row, shape: tuple[str, str], columns: Columns) -> Example:
    turns, more_answers, conversation = [], (), False
    for name, field, role in zip(shape, ("question", "answer"), ("user", "assistant"), strict=True):
        if name not in row.values:
            raise _missing(row, name, field)
        value, whole = row.values[name], shape[0] == shape[1]
        if field == "answer" and isinstance(value, list) and not any(isinstance(turn, dict) for turn in value):
            value, *more_answers = _answers(value, row.where, name)
        conversation = conversation or isinstance(value, list)
        turns += _turns(value, None if whole else role, row.where, name)
        if whole:
            break
    if conversation:
        _require_nothing_lost(row.values, _LOST_WITH_ROW, row.where, "the row")
        _require_trained(row.values, ("weight",), row.where, "the row")
    turns = _with_system([*_refined_turns(row), *turns], row, columns)
    roles = [role for role, _ in turns]
    if roles[-2:] != ["user", "assistant"] or "system" in roles[1:]:
        raise BadRow(
            f"{row.where}: turns by {_listed(roles)}; system may only be first, and the last "
            "two must be user (the question) and assistant (the answer)"
        )
    *earlier, (_, question), (_, answer) = turns
    return Example(id, question, answer, _optional(row, columns, "context"), tuple(earlier), tuple(more_answers))


def _answers(values: list, where: str, name: str) -> list[str]:
    """Several answers to one question; equal ones count once."""
    if not values:
        raise BadRow(f"{where}: {shown(name)} is an empty list; give at least one answer, or remove the row")
    texts = [_text(value, where, f"answer {number} of {name}") for number, value in enumerate(values, start=1)]
    return list(dict.fromkeys(texts))


def _optional(row: Row, columns: Columns, field: str) -> str:
    """The text of a column that some rows lack; "" where it is null, or an empty field of a CSV file."""
    if not _has([row], columns, field):
        return ""
    name = getattr(columns, field)
    if name not in row.values:
        raise _missing(row, name, field, '="" to use none')
    return "" if row.values[name] in (None, "") else _text(row.values[name], row.where, name)


def _listed(roles: Sequence[str]) -> str:
    return ", ".join(roles if len(roles) <= 6 else [*roles[:3], "…", *roles[-3:]])


def _turns(value: Any, role_of_text: str | None, where: str, name: str) -> list[tuple[str, str]]:
    if role_of_text and not isinstance(value, list):
        return [(role_of_text, _text(value, where, name))]
    name = shown(name)
    if not isinstance(value, list) or not value:
        raise BadRow(
            f"{where}: {name} must be a list of turns (role and content), got {kind_of(value)}; "
            'write [{"role": "user", "content": …}, {"role": "assistant", "content": …}]'
        )
    if role_of_text and all(isinstance(turn, str) for turn in value):
        raise BadRow(
            f"{where}: {name} must be one text, or a list of turns (role and content), got a list of texts; "
            "choose one of them"
        )
    turns = []
    for number, turn in enumerate(value, start=1):
        place = f"turn {number} of {name}"
        keys = (
            ("from", "value")
            if isinstance(turn, dict) and "from" in turn and "role" not in turn
            else ("role", "content")
        )
        role, content = (turn.get(key) for key in keys) if isinstance(turn, dict) else (None, None)
        role = _ROLES.get(role, role) if isinstance(role, str) and keys[0] == "from" else role
        if isinstance(turn, dict):
            _require_nothing_lost(turn, _LOST_WITH_TURN, where, place)
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            got = _turn_in_words(turn, *keys)
            raise BadRow(f"{where}: {place} must have a role (system, user, assistant) and text as content, got {got}")
        # An empty system turn is kept: without one, some chat templates insert a default text.
        turns.append((role, content if role == "system" and not content.strip() else _text(content, where, place)))
    _require_trained(value[-1], _WEIGHTS, where, f"the last turn of {name}")
    return turns


def _turn_in_words(turn: Any, role_key: str, content_key: str) -> str:
    if not isinstance(turn, dict):
        return kind_of(turn)
    if not isinstance(turn.get(role_key), str) or content_key not in turn:
        return kind_of(turn)
    content = turn[content_key]
    return f"the role {quoted(turn[role_key])} and {'text' if isinstance(content, str) else kind_of(content)}"


def _with_system(turns: list[tuple[str, str]], row: Row, columns: Columns) -> list[tuple[str, str]]:
    """Adds the system turn of a row that has it in a column of its own."""
    system = _optional(row, columns, "system")
    if not system or turns[0] == ("system", system):
        return turns
    if turns[0][0] == "system":
        raise BadRow(
            f"{row.where}: a system turn, and another text in the column {quoted(columns.system)}; remove one, or set "
            'data.system="" to use no column'
        )
    return [("system", system), *turns]


def _refined_turns(row: Row) -> list[tuple[str, str]]:
    """The earlier turns of a row of a refined data set: pairs of role and content, in its ArrayRecord as JSON."""
    if any(not row.values.get(name) for name in _REFINED):
        return []
    turns = row.values["turns"]
    try:
        pairs = json.loads(turns) if isinstance(turns, str) else turns
        named = [{"role": role, "content": content} for role, content in pairs]
    except (ValueError, TypeError) as error:
        raise BadRow(
            f"{row.where}: turns of a refined row must be pairs of role and content; restore the row"
        ) from error
    return _turns(named, None, row.where, "turns") if named else []


def _require_nothing_lost(values: dict[str, Any], names: Iterable[str], where: str, place: str) -> None:
    for name in names:
        if values.get(name) not in (None, "", [], {}, False):
            raise BadRow(
                f"{where}: {place} has {name}, which would be lost: questions and answers are texts; "
                "put it into the text, or remove it or the row"
            )


def _require_trained(values: dict[str, Any], names: Iterable[str], where: str, place: str) -> None:
    for name in names:
        value = values.get(name)
        if isinstance(value, int | float) and value != 1:
            raise BadRow(
                f"{where}: {place} has {name} {value}, but every answer is trained on, and all count alike; "
                f"remove the row, or {name}"
            )


def _text(value: Any, where: str, name: str) -> str:
    if isinstance(value, Unreadable):
        raise BadRow(f"{where}: column {quoted(name)} cannot be read ({value.problem}); write it as text")
    name = shown(name)
    if not isinstance(value, str):
        advice = "" if not isinstance(value, dict | list) else "; write a text, or a list of turns {role, content}"
        raise BadRow(f"{where}: {name} must be text, got {kind_of(value)}{advice}")
    if not value.strip():
        raise BadRow(f"{where}: {name} is empty; fill it in or remove the row")
    require_whole_characters(value, where, name)
    return value


def require_whole_characters(text: str, where: str, name: str) -> None:
    """Raises BadRow for lone surrogates (halves of characters), which no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow(
            f"{where}: {name} holds half a character (a lone surrogate at {error.start}); write the file again as UTF-8"
        ) from error
