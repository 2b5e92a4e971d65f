"""Reads rows from JSONL, JSON, CSV, TSV and Parquet files and tfds folders, with limits on memory."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from raft_jax.data.wording import Unread, Unreadable, brief, kind_of, quoted, shown
from raft_jax.errors import InputError, require_train
from raft_jax.files import hash_files, require_regular, unreadable
from raft_jax.sources import resolve

MAX_LINE = 2**26  # characters in a line; a longer line is not a row of text
MAX_ARRAY = 2**30  # characters in a JSON array, which must be parsed as a whole
# A .gz file may unpack to MAX_RATIO times its size (text compresses to a third or a tenth), and always to MIN_UNPACKED
# bytes.
MAX_RATIO = 100
MIN_UNPACKED = 2**26


@dataclass(frozen=True)
class Wanted:
    """The columns to read from a file whose format stores columns separately.

    Attributes:
      shapes: pairs of columns in order of preference; a later pair is read only if the earlier ones are missing, or
        null in some rows.
      others: columns that are read if they exist.
      noticed: columns of which only the presence of a value is read, and only in files of conversations.
      split: the column that holds the name of a tfds folder's split.
    """

    shapes: Sequence[tuple[str, str]]
    others: Sequence[str]
    noticed: Sequence[str] = ()
    split: str = "split"


class Row(NamedTuple):
    where: str  # file and line, for messages
    values: dict[str, Any]


def read_rows(source: str, wanted: Wanted) -> list[Row]:
    """Reads the rows of a file or a folder, in their order.

    Raises:
      InputError: the source cannot be read, or has no rows.
    """
    path = locate(source)
    name = path.name.lower()
    kind = Path(name.removesuffix(".gz")).suffix
    if path.is_dir():
        rows = _read_tfds(source, path, wanted)
    elif name.endswith(".parquet"):
        rows = _read_parquet(source, path, wanted)
    elif kind in (".jsonl", ".json"):
        rows = _read_json(source, path)
    elif kind in (".csv", ".tsv"):
        rows = _read_csv(source, path, "," if kind == ".csv" else "\t")
    else:
        raise InputError(
            f"{source}: unknown kind of file; use .jsonl, .json, .csv, .tsv (all also .gz), "
            ".parquet or a folder written by tfds"
        )
    if not rows:
        raise InputError(f"{source}: no rows in it; give a file with questions and answers")
    return rows


def locate(source: str) -> Path:
    """The file or folder of a data source.

    Raises:
      InputError: it does not exist, is neither a file nor a folder, or is an hf:// address.
    """
    if source.startswith("hf://datasets/"):
        name = source.removeprefix("hf://datasets/").split("@")[0]
        name = "/".join(name.split("/")[:2])
        raise InputError(
            f"{source}: data sets are not fetched; run `hf download {name} --repo-type dataset --local-dir FOLDER` "
            "(with --revision refs/convert/parquet where its files are of another kind), and give the path of a "
            ".parquet, .jsonl or .csv file in it"
        )
    if source.startswith("hf://"):
        raise InputError(f"{source}: hf:// names a model; download the data set's file and give its path")
    return resolve(source.removeprefix("tfds://"))


def fingerprint(path_or_uri: str | Path) -> str:
    """Returns the sha256 of a file, or of the names and contents of the files in a folder, in hexadecimal."""
    path = locate(str(path_or_uri))
    try:
        if path.is_file():
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        hashes = sorted((Path(name), digest) for name, digest in hash_files(path).items())
        lines = [f"{name.as_posix()}\0{digest}\n" for name, digest in hashes]
    except OSError as error:
        raise unreadable(Path(error.filename or path), error) from error
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# Lines


def lines_of(source: str, path: Path, newline: str) -> Iterator[str]:
    """The lines of a text file, compressed with gzip or not, without a byte order mark.

    Args:
      newline: as for `open`: with "\\n" only "\\n" ends a line, with "" also "\\r" and "\\r\\n".
    """
    zipped = path.name.lower().endswith(".gz")
    try:
        most = max(MIN_UNPACKED, MAX_RATIO * path.stat().st_size)
        with (gzip.open if zipped else open)(path, "rb") as binary:
            text = io.TextIOWrapper(binary, "utf-8-sig", newline=newline)
            number = 1
            while line := text.readline(MAX_LINE + 1):
                if zipped and binary.tell() > most:
                    raise InputError(
                        f"{source}: more than {most >> 20} MiB unpacked, over {MAX_RATIO} times its size; "
                        "if it is meant to be so, unpack it and give that file"
                    )
                if len(line) > MAX_LINE:
                    raise InputError(
                        f"{source}:{number}: a line of more than {MAX_LINE >> 20} million characters; "
                        "write each row on a line of its own"
                    )
                yield line
                number += line.endswith(("\n", "\r"))
    except UnicodeDecodeError:
        raise _not_utf8(source, path, zipped) from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{source}: cannot be read ({brief(error)}); mend or replace the file") from error


def _not_utf8(source: str, path: Path, zipped: bool) -> InputError:
    with (gzip.open if zipped else open)(path, "rb") as binary:
        for number, line in enumerate(iter(lambda: binary.readline(4 * MAX_LINE), b""), start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return InputError(
                    f"{source}:{number}: not UTF-8 (byte 0x{line[error.start]:02x}); "
                    "save the file with the encoding UTF-8"
                )
    return InputError(f"{source}: not UTF-8; save the file with the encoding UTF-8")


def _read_json(source: str, path: Path) -> list[Row]:
    rows = []
    lines = enumerate(lines_of(source, path, "\n"), start=1)
    for number, line in lines:
        if not line.strip():
            continue
        if not rows and line.lstrip().startswith("["):
            items = parse_json(source, _joined(source, line, lines), number)
            rows = [Row(f"{source}: item {index}", item) for index, item in enumerate(items, start=1)]
        else:
            rows.append(Row(f"{source}:{number}", parse_json(source, line.rstrip("\n"), number)))
    for row in rows:
        if not isinstance(row.values, dict):
            raise InputError(f"{row.where}: expected an object with a key for each column, found {kind_of(row.values)}")
    return rows


def _joined(source: str, first: str, lines: Iterator[tuple[int, str]]) -> str:
    parts, length = [first], len(first)
    for _, line in lines:
        parts.append(line)
        length += len(line)
        if length > MAX_ARRAY:
            raise InputError(
                f"{source}: a JSON array of more than {MAX_ARRAY >> 20} million characters; "
                "write it as .jsonl, one object on each line"
            )
    return "".join(parts)


def parse_json(source: str, text: str, line: int) -> Any:
    """Parses one JSON value; raises InputError with file and line, also if an object has the same key twice."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        raise InputError(
            f"{source}:{line}: not JSON ({getattr(error, 'msg', error)}); "
            "write one object on each line, or one array of objects"
        ) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {twice!r} twice")
    return mapping


def _read_csv(source: str, path: Path, delimiter: str) -> list[Row]:
    # strict makes a stray quote an error; without it, the text would lose its quotes or extend over the next rows.
    csv.field_size_limit(MAX_LINE)
    reader = csv.reader(_without_nul(source, lines_of(source, path, "")), delimiter=delimiter, strict=True)
    header, rows, line = [], [], 1
    try:
        for fields in reader:
            where, line = f"{source}:{line}", reader.line_num + 1
            if not "".join(fields).strip("\ufeff \t\r\n"):
                continue
            if not header:
                header = fields
                _require_header(where, header, delimiter)
            elif [field.strip("\ufeff ") for field in fields] == [field.strip() for field in header]:
                raise InputError(f"{where}: the header again; where two files were joined, remove the second's")
            elif len(fields) != len(header):
                raise InputError(
                    f"{where}: {len(fields)} fields, but the header has {len(header)}; "
                    'put fields that hold a separator into "quotes"'
                )
            else:
                rows.append(Row(where, dict(zip(header, fields, strict=True))))
    except csv.Error as error:
        raise InputError(
            f"{source}:{line}: not CSV ({error}); put fields that hold quotes into quotes, "
            'and write each quote in them twice ("")'
        ) from error
    return rows


def _require_header(where: str, header: Sequence[str], delimiter: str) -> None:
    _require_distinct(where, header)
    separator = next((mark for mark in ";\t|," if mark != delimiter and mark in header[0]), None)
    if len(header) == 1 and separator:
        raise InputError(
            f"{where}: one column {quoted(header[0])}: is the separator {separator!r}? "
            "save with commas, or as .tsv with tabs"
        )


def _require_distinct(where: str, names: Sequence[str]) -> None:
    if len(set(names)) != len(names):
        raise InputError(f"{where}: two columns have one name ({', '.join(map(shown, names))}); rename one")


def _without_nul(source: str, lines: Iterator[str]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if "\0" in line:
            raise InputError(
                f"{source}:{number}: holds a NUL character; is it UTF-16? save the file with the encoding UTF-8"
            )
        yield line


# Parquet


def _read_parquet(source: str, path: Path, wanted: Wanted) -> list[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{source}: Parquet needs pyarrow; pip install pyarrow") from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        schema, num_rows = file.schema_arrow, file.metadata.num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{source}: not a whole Parquet file ({brief(error)}); write it again") from error
    _require_distinct(source, schema.names)
    columns = {name: _column(source, file, name) for name in wanted.others if name in schema.names}
    undecided = range(num_rows)
    chat = False
    for shape in wanted.shapes:
        if undecided and set(shape) <= set(schema.names):
            columns |= {name: _column(source, file, name) for name in shape if name not in columns}
            undecided = [row for row in undecided if all(columns[name][row] is None for name in shape)]
            chat = chat or any(pa.types.is_nested(schema.field(name).type) for name in shape)
    for name in wanted.noticed if chat else ():
        if name in schema.names and name not in columns:
            columns[name] = _holds_something(source, file, name)
    unread = {field.name: Unread(_arrow_kind(field.type)) for field in schema if field.name not in columns}
    return [
        Row(
            f"{source}: row {number + 1}",
            {name: columns[name][number] if name in columns else unread[name] for name in schema.names},
        )
        for number in range(num_rows)
    ]


def _column(source: str, file, name: str) -> list[Any]:
    try:
        values = file.read(columns=[name]).column(name)
    except Exception as error:  # Arrow raises several types of exception
        raise InputError(f"{source}: column {quoted(name)} cannot be read ({brief(error)}); write it again") from error
    try:
        return values.to_pylist()
    except Exception:  # times out of range, unknown time zones, bytes that are not UTF-8
        return list(map(_cell, values))


def _cell(value) -> Any:
    try:
        return value.as_py()
    except Exception as error:
        return Unreadable(brief(error))


def _holds_something(source: str, file, name: str) -> list[bool]:
    """Whether each row has a value that is not null, "" or []; reads few rows at a time, since values may be large."""
    import pyarrow as pa
    import pyarrow.compute as pc

    held = []
    try:
        for batch in file.iter_batches(batch_size=64, columns=[name]):
            array = batch.column(0)
            if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
                sizes = pc.list_value_length(array).fill_null(0)  # pyright: ignore[reportAttributeAccessIssue]
            elif pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
                sizes = pc.binary_length(array).fill_null(0)  # pyright: ignore[reportAttributeAccessIssue]
            else:
                sizes = array.is_valid()
            held += map(bool, sizes.to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{source}: column {quoted(name)} cannot be read ({brief(error)}); write it again") from error
    return held


def _arrow_kind(type) -> str:
    import pyarrow as pa

    if pa.types.is_struct(type):
        return kind_of(dict.fromkeys(field.name for field in type))
    return "a list" if pa.types.is_nested(type) else str(type)


# tfds


def _read_tfds(source: str, path: Path, wanted: Wanted) -> list[Row]:
    if not all((path / name).is_file() for name in ("features.json", "dataset_info.json")):
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            raise InputError(
                f"{source}: a folder saved by datasets; write a split of it as Parquet "
                "(load_from_disk(FOLDER).to_parquet(FILE)), and give that file"
            )
        inside = sorted(str(file.parent.relative_to(path)) for file in path.rglob("*/features.json"))
        inside = inside or sorted(file.name for file in path.iterdir() if not file.name.startswith("."))
        raise InputError(
            f"{source}: not a folder written by tfds (features.json and dataset_info.json); "
            f"name one of the things in it: {', '.join(map(shown, inside[:8])) or 'it is empty'}"
        )
    require_train("array_record", "tensorflow_datasets")
    import tensorflow_datasets as tfds

    used = {*wanted.others, *wanted.noticed, *(name for shape in wanted.shapes for name in shape)}
    rows = []
    try:
        builder = tfds.builder_from_directory(path)
        for name in sorted(builder.info.splits):
            if builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD:
                _check_records(source, builder.info.splits[name])
            for number, values in enumerate(builder.as_data_source(name), start=1):  # pyright: ignore[reportCallIssue]
                where = f"{source}: {name} row {number}"
                plain = {
                    key: _plain(value, where, key) if key in used else Unread(kind_of(value))
                    for key, value in values.items()
                }
                rows.append(Row(where, {wanted.split: name} | plain))
    except InputError:
        raise
    # tfds raises many types of exception for a damaged folder, or for a format that it reads with TensorFlow only.
    except Exception as error:
        raise InputError(
            f"{source}: tfds cannot read it without TensorFlow ({brief(error)}); "
            "write it again, with file_format='array_record'"
        ) from error
    return rows


def _check_records(source: str, split: Any) -> None:
    # A truncated ArrayRecord file opens without an error and seems to have no records.
    from array_record.python.array_record_module import ArrayRecordReader

    for path, expected in zip(split.filepaths, split.shard_lengths, strict=True):
        if Path(path).exists():
            require_regular(Path(path))
        try:
            count = ArrayRecordReader(str(path)).num_records()
        except RuntimeError as error:
            count = f"none that can be read: {brief(error)}"
        if count != expected:
            raise InputError(
                f"{source}: {Path(path).name} is damaged; expected {expected} rows, found {count}; write it again"
            )


def _plain(value: Any, where: str, name: str) -> Any:
    """Converts arrays to lists and bytes to text, at any depth."""
    if isinstance(value, Mapping):
        return {key: _plain(item, where, name) for key, item in value.items()}
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list):
        return [_plain(item, where, name) for item in value]
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: column {quoted(name)} is not UTF-8; write it as text") from error
