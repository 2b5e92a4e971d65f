"""Questions and answers from the files that people have: JSONL, JSON, CSV, TSV, Parquet, tfds folders."""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import io
import json
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from raft_jax.errors import InputError
from raft_jax.sources import resolve


@dataclass(frozen=True)
class Columns:
    """Which column holds what.

    `question` and `answer` may name one and the same column, if it holds conversations.
    `id`, `split` and `context` may be absent under their default names; a name that was chosen must be there.
    An empty name says that there is none: with `context=""` a column called context is not read.
    """

    question: str = "question"
    answer: str = "answer"
    id: str | None = "id"  # None: rows are numbered
    split: str = "split"
    context: str = "context"


@dataclass(frozen=True)
class Example:
    """One question with its gold answer, and the text that the question refers to, if any."""

    id: str
    question: str
    answer: str
    context: str = ""
    turns: tuple[tuple[str, str], ...] = ()  # (role, content) of what came before the question


class _Row(NamedTuple):
    where: str
    values: dict[str, Any]


_DEFAULTS = Columns()
# What other tools call these columns: suggested when one is missing, never guessed.
_SYNONYMS = {
    "question": ("prompt", "instruction", "query", "input", "problem"),
    "answer": ("completion", "output", "response", "target", "solution", "chosen"),
}


def load_examples(path_or_uri: str | Path, columns: Columns = _DEFAULTS, split: str | None = None,
                  limit: int | None = None) -> list[Example]:
    """Reads questions and answers, in the order of the file.

    Three shapes of row are understood, and the first row decides: the columns named by `columns`; `prompt`
    and `completion`; `messages`, which holds a conversation.

    A question or an answer may be a list of chat turns. The last turn must be the assistant's and is the answer,
    the one before it the user's and is the question. What came earlier goes into `context`: the system turn as it
    is, the others as `User: …` and `Assistant: …`, a blank line between them. Other roles, and contents other than
    text, are refused.

    Args:
      path_or_uri: a file (.jsonl, .json, .csv, .tsv, each also .gz; .parquet), a folder written by tfds (also
        as `tfds://FOLDER`), or `package://MODULE/PATH`.
      columns: the names of the columns.
      split: only rows of this split (the value of the split column, or a split of a tfds folder). None: all.
      limit: at most so many examples.

    Returns:
      The examples. Where there is no id column, the id is the row's number in the file, from 000001.
      Ids may be text or whole numbers. Ids and splits are checked in all rows, texts in those asked for.

    Raises:
      InputError: naming file and line, what is wrong, and what to do.

    Example:
      >>> import tempfile
      >>> path = Path(tempfile.mkdtemp()) / "faq.jsonl"
      >>> _ = path.write_text('{"prompt": "How long?", "completion": "Thirty days."}')
      >>> load_examples(path)
      [Example(id='000001', question='How long?', answer='Thirty days.', context='')]
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit}: must be at least 1, or absent to read all rows")
    rows = _read(str(path_or_uri), columns)
    ids = _ids(rows, columns)
    if split is not None:
        splits = _splits(rows, columns)
        kept = [index for index, name in enumerate(splits) if name == split]
        if not kept:
            known = ", ".join(f"{name} ({count})" for name, count in sorted(Counter(splits).items()))
            advice = (f"there are: {known}; set data.train_split or data.test_split" if known
                      else f"there is no column {columns.split!r}; set data.split")
            raise InputError(f"{path_or_uri}: no rows of the split {split!r}; {advice}")
        rows, ids = [rows[index] for index in kept], [ids[index] for index in kept]
    shape = _shape(rows[0], columns)
    return [_example(id, row, shape, columns) for id, row in zip(ids[:limit], rows[:limit], strict=True)]


def split_counts(path_or_uri: str | Path, columns: Columns = _DEFAULTS) -> dict[str, int]:
    """Counts the rows of each split; empty where there is no split column (then see `split_held_out`)."""
    return dict(sorted(Counter(_splits(_read(str(path_or_uri), columns), columns)).items()))


def split_held_out(examples: list[Example], count: int, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Holds `count` examples out, chosen by a hash of seed and id.

    The order of the examples makes no difference, and adding one changes at most one place of the choice.

    Returns:
      (the others, at least one; the held-out ones), both in the order given.

    Example:
      >>> rest, held_out = split_held_out([Example(str(i), "q", "a") for i in range(8)], count=2)
      >>> len(rest), len(held_out)
      (6, 2)
    """
    if not 0 <= count < len(examples):
        raise InputError(f"cannot hold out {count} of {len(examples)} examples: one must be left; lower data.held_out")
    ids = [example.id for example in examples]
    chosen = set(sorted(ids, key=lambda id: hashlib.sha256(f"{seed}:{id}".encode()).digest())[:count])
    return ([example for example in examples if example.id not in chosen],
            [example for example in examples if example.id in chosen])


def fingerprint(path_or_uri: str | Path) -> str:
    """Returns the sha256 of a file, or of the names and contents of the files in a folder, in hexadecimal."""
    path = locate(str(path_or_uri))
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"{file.relative_to(path).as_posix()}\0{fingerprint(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def locate(source: str) -> Path:
    if source.startswith("hf://"):
        raise InputError(f"{source}: hf:// names a model; download the data set's file and give its path")
    return resolve(source.removeprefix("tfds://"))


# Files → rows


def _read(source: str, columns: Columns) -> list[_Row]:
    path = locate(source)
    if path.is_dir():
        rows = _read_tfds(source, path, columns)
    else:
        name = path.name.lower()
        zipped = name.endswith(".gz")
        kind = Path(name.removesuffix(".gz")).suffix
        if kind == ".parquet" and not zipped:
            rows = _read_parquet(source, path)
        elif kind in (".jsonl", ".json"):
            rows = _read_json(source, _text_of(source, path, zipped))
        elif kind in (".csv", ".tsv"):
            rows = _read_csv(source, _text_of(source, path, zipped), "," if kind == ".csv" else "\t")
        else:
            raise InputError(f"{source}: unknown kind of file; use .jsonl, .json, .csv, .tsv (all also .gz), "
                             ".parquet or a folder written by tfds")
    if not rows:
        raise InputError(f"{source}: no rows in it; give a file with questions and answers")
    return rows


def _text_of(source: str, path: Path, zipped: bool) -> str:
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if zipped else data
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{source}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}); "
                         "save the file with the encoding UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{source}: cannot be read ({_brief(error)}); mend or replace the file") from error


def _read_json(source: str, text: str) -> list[_Row]:
    if text.lstrip().startswith("["):
        rows = [_Row(f"{source}: item {number}", item)
                for number, item in enumerate(_parse(source, text, 1), start=1)]
    else:
        rows = [_Row(f"{source}:{number}", _parse(source, line, number))
                for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    for row in rows:
        if not isinstance(row.values, dict):
            raise InputError(f"{row.where}: expected an object with a key for each column, "
                             f"found {_kind(row.values)}")
    return rows


def _parse(source: str, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        raise InputError(f"{source}:{line}: not JSON ({getattr(error, 'msg', error)}); "
                         "write one object on each line, or one array of objects") from error


def _read_csv(source: str, text: str, delimiter: str) -> list[_Row]:
    # strict: a stray quote is an error, instead of text that loses its quotes or swallows the next rows.
    csv.field_size_limit(len(text) + 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header, rows, line = [], [], 1
    try:
        for fields in reader:
            where, line = f"{source}:{line}", reader.line_num + 1
            if not "".join(fields).strip():
                continue
            if not header:
                header = fields
                if len(set(header)) != len(header):
                    raise InputError(f"{where}: two columns have one name ({', '.join(header)}); rename one")
            elif len(fields) != len(header):
                raise InputError(f"{where}: {len(fields)} fields, but the header has {len(header)}; "
                                 'put fields that hold a separator into "quotes"')
            else:
                rows.append(_Row(where, dict(zip(header, fields, strict=True))))
    except csv.Error as error:
        raise InputError(f"{source}:{line}: not CSV ({error}); put fields that hold quotes into quotes, "
                         'and write each quote in them twice ("")') from error
    return rows


def _read_parquet(source: str, path: Path) -> list[_Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{source}: Parquet needs pyarrow; pip install pyarrow") from error
    try:
        values = pa.parquet.ParquetFile(path).read().to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{source}: not a whole Parquet file ({_brief(error)}); write it again") from error
    return [_Row(f"{source}: row {number}", value) for number, value in enumerate(values, start=1)]


def _read_tfds(source: str, path: Path, columns: Columns) -> list[_Row]:
    if not all((path / name).is_file() for name in ("features.json", "dataset_info.json")):
        inside = sorted(str(file.parent.relative_to(path)) for file in path.rglob("*/features.json"))
        inside = inside or sorted(file.name for file in path.iterdir() if not file.name.startswith("."))
        raise InputError(f"{source}: not a folder written by tfds (features.json and dataset_info.json); "
                         f"name one of the things in it: {', '.join(inside[:8]) or 'it is empty'}")
    import tensorflow_datasets as tfds

    rows = []
    try:
        builder = tfds.builder_from_directory(path)
        for name in sorted(builder.info.splits):
            if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
                _check_records(source, builder.info.splits[name])
            for number, values in enumerate(builder.as_data_source(name), start=1):
                plain = {columns.split: name} | {key: _plain(value) for key, value in values.items()}
                rows.append(_Row(f"{source}: {name} row {number}", plain))
    except InputError:
        raise
    # tfds raises all sorts of things for a damaged folder, or a format that it reads with TensorFlow only.
    except Exception as error:
        raise InputError(f"{source}: tfds cannot read it without TensorFlow ({_brief(error)}); "
                         "write it again, with file_format='array_record'") from error
    return rows


def _check_records(source: str, split: Any) -> None:
    # A truncated ArrayRecord file opens without complaint and reads as nothing.
    from array_record.python.array_record_module import ArrayRecordReader

    for path, expected in zip(split.filepaths, split.shard_lengths, strict=True):
        try:
            found = ArrayRecordReader(str(path)).num_records()
        except RuntimeError as error:
            found = f"none that can be read: {_brief(error)}"
        if found != expected:
            raise InputError(f"{source}: {Path(path).name} is damaged; expected {expected} rows, "
                             f"found {found}; write it again")


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return value.tolist() if hasattr(value, "tolist") else value


def _brief(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


# Rows → examples


def _ids(rows: list[_Row], columns: Columns) -> list[str]:
    if not _has(rows, columns, "id"):
        return [f"{number:06d}" for number in range(1, len(rows) + 1)]
    seen: dict[str, str] = {}
    for row in rows:
        id = _get(row, columns.id, "id")
        if isinstance(id, int) and not isinstance(id, bool):
            id = str(id)
        id = _text(id, row.where, columns.id)
        if id in seen:
            raise InputError(f"{row.where}: the id {id!r} is already that of {seen[id]}; "
                             "give each row its own, or set data.id=null to number the rows")
        seen[id] = row.where
    return list(seen)


def _splits(rows: list[_Row], columns: Columns) -> list[str]:
    """Returns each row's split, or nothing where there is no such column."""
    rows = rows if _has(rows, columns, "split") else []
    return [_text(_get(row, columns.split, "split"), row.where, columns.split) for row in rows]


def _has(rows: list[_Row], columns: Columns, field: str) -> bool:
    name = getattr(columns, field)
    return bool(name) and (name != getattr(_DEFAULTS, field) or any(name in row.values for row in rows))


def _get(row: _Row, name: str, field: str) -> Any:
    if name in row.values:
        return row.values[name]
    names = [str(key) for key in row.values]
    close = [other for other in _SYNONYMS.get(field, ()) if other in names]
    close += [other for other in difflib.get_close_matches(name, names, n=3) if other not in close]
    advice = f"set data.{field}" + (f", perhaps to {' or '.join(close)}" if close else "")
    raise InputError(f"{row.where}: no column {name!r}; there are: {', '.join(names) or 'none'}; {advice}")


def _shape(row: _Row, columns: Columns) -> tuple[str, str]:
    """Returns the columns of the question and of the answer; one column twice is a whole conversation."""
    named = columns.question, columns.answer
    if named == (_DEFAULTS.question, _DEFAULTS.answer) and not row.values.keys() >= set(named):
        for shape in (("prompt", "completion"), ("messages", "messages")):
            if row.values.keys() >= set(shape):
                return shape
    return named


def _example(id: str, row: _Row, shape: tuple[str, str], columns: Columns) -> Example:
    question, answer = _get(row, shape[0], "question"), _get(row, shape[1], "answer")
    turns = _turns(question, None if shape[0] == shape[1] else "user", row.where, shape[0])
    if shape[0] != shape[1]:
        turns += _turns(answer, "assistant", row.where, shape[1])
    roles = [role for role, _ in turns]
    if roles[-2:] != ["user", "assistant"] or "system" in roles[1:]:
        raise InputError(f"{row.where}: turns by {', '.join(roles)}; system may only be first, and the last "
                         "two must be user (the question) and assistant (the answer)")
    *earlier, (_, question), (_, answer) = turns
    told = [f"{role.capitalize()}: {text}".removeprefix("System: ") for role, text in earlier if text.strip()]
    # Null, or an empty field of a CSV file: this row has no context.
    if _has([row], columns, "context") and _get(row, columns.context, "context") not in (None, ""):
        told.insert(0, _text(row.values[columns.context], row.where, columns.context))
    question, answer = _text(question, row.where, shape[0]), _text(answer, row.where, shape[1])
    return Example(id, question, answer, context="\n\n".join(told))


def _turns(value: Any, role_of_text: str | None, where: str, name: str) -> list[tuple[str, str]]:
    if role_of_text and not isinstance(value, list):
        return [(role_of_text, _text(value, where, name))]
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: {name} must be a list of turns (role and content), got {_kind(value)}")
    turns = []
    for number, turn in enumerate(value, start=1):
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise InputError(f"{where}: turn {number} of {name} must have a role (system, user, assistant) "
                             f"and text as content, got {turn!r:.60}")
        turns.append((role, content))
    return turns


def _text(value: Any, where: str, name: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: {name} must be text, got {_kind(value)}")
    if not value.strip():
        raise InputError(f"{where}: {name} is empty; fill it in or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: {name} holds half a character (a lone surrogate at {error.start}); "
                         "write the file again as UTF-8") from error
    return value


def _kind(value: Any) -> str:
    kinds = {type(None): "null", str: "text", list: "a list", dict: "an object"}
    return "an empty list" if value == [] else kinds.get(type(value), type(value).__name__)
