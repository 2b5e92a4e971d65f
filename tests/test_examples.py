"""Reading questions and answers: every format and shape, and what bad input is told."""

import csv
import datetime
import errno
import gzip
import io
import json
import os
import sys
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import pytest

from raft_jax.data import files
from raft_jax.data.answers import each_answer, first_answers
from raft_jax.data.examples import (
    Columns,
    Example,
    load_examples,
    sampling_order,
    split_counts,
    split_held_out,
)
from raft_jax.data.files import fingerprint
from raft_jax.errors import InputError

ROWS = [
    {"id": "a", "question": "Was heißt „fair“?", "answer": 'Two lines,\n"quoted".', "split": "train"},
    {"id": "b", "question": "Why?\u2028", "answer": "Because.", "split": "test"},
    {"id": "c", "question": "How, then?", "answer": "\tSo. ", "split": "train"},
]
EXAMPLES = [Example(row["id"], row["question"], row["answer"]) for row in ROWS]


def as_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(rows, delimiter=","):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0].keys(), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def write(folder, data, name="rows.jsonl"):
    path = folder / name
    path.write_bytes(as_jsonl(data) if isinstance(data, list) else data)
    return path


def error_of(path, **kwargs):
    with pytest.raises(InputError) as caught:
        load_examples(path, **kwargs)
    message = str(caught.value)
    assert message.startswith(str(path)) and message.isprintable()  # one line, and nothing that a terminal obeys
    return message.removeprefix(str(path))


@contextmanager
def memory_below(num_bytes):
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < num_bytes
    finally:
        tracemalloc.stop()


# Formats


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("rows.jsonl", as_jsonl(ROWS)),
        ("rows.JSONL", b"\n  \n" + as_jsonl(ROWS).rstrip() + b"\n\n"),
        ("rows.jsonl", b"\xef\xbb\xbf" + as_jsonl(ROWS).replace(b"\n", b"\r\n")),
        ("rows.jsonl.gz", gzip.compress(as_jsonl(ROWS))),
        ("rows.json", json.dumps(ROWS, indent=2).encode()),
        ("rows.json", as_jsonl(ROWS)),
        ("rows.csv", as_csv(ROWS)),
        ("rows.csv", b"\xef\xbb\xbf\r\n" + as_csv(ROWS) + b"\r\n"),
        ("rows.csv.gz", gzip.compress(as_csv(ROWS))),
        ("rows.tsv", as_csv(ROWS, "\t")),
    ],
)
def test_formats_say_the_same(tmp_path, name, data):
    path = write(tmp_path, data, name)
    assert load_examples(path) == EXAMPLES
    assert load_examples(str(path), split="train") == [EXAMPLES[0], EXAMPLES[2]]
    assert load_examples(path, limit=2) == EXAMPLES[:2]
    assert load_examples(path, split="train", limit=1) == EXAMPLES[:1]
    assert split_counts(path) == {"test": 1, "train": 2}


def test_parquet(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    pa.parquet.write_table(pa.Table.from_pylist(ROWS), path)
    assert load_examples(path) == EXAMPLES
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    pa.parquet.write_table(pa.Table.from_pylist([{"id": 7, "messages": chat}]), path)
    assert load_examples(path) == [Example("7", "Why?", "So.")]
    pa.parquet.write_table(pa.Table.from_pylist([*ROWS, {**ROWS[0], "id": "d", "answer": None}]), path)
    assert error_of(path).startswith(": row 4: answer must be text, got null; data.skip_bad_rows=true")
    whole = path.read_bytes()
    for data in (b"", whole[:-9], b"no parquet"):
        path.write_bytes(data)
        assert "not a whole Parquet file" in error_of(path)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in error_of(write(tmp_path, b"", "rows.parquet"))


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    folder = tmp_path_factory.mktemp("faq") / "1.0.0"
    folder.mkdir()
    names = ("id", "question", "answer")
    features = tfds.features.FeaturesDict({name: tfds.features.Text() for name in names})
    serializer = ExampleSerializer(features.get_serialized_info())
    infos = []
    for split in ("train", "test"):
        rows = [row for row in ROWS if row["split"] == split]
        writer = ArrayRecordWriter(str(folder / f"faq-{split}.array_record-00000-of-00001"), "group_size:1")
        for row in rows:
            writer.write(serializer.serialize_example({name: row[name] for name in names}))
        writer.close()
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name="faq", split=split, filetype_suffix="array_record"
        )
        infos.append(
            tfds.core.SplitInfo(name=split, shard_lengths=[len(rows)], num_bytes=0, filename_template=template)
        )
    tfds.folder_dataset.write_metadata(data_dir=folder, features=features, split_infos=infos, check_data=False)
    return folder


def test_tfds_folder(tfds_folder):
    for source in (tfds_folder, f"tfds://{tfds_folder}"):
        assert load_examples(source, split="train") == [EXAMPLES[0], EXAMPLES[2]]
        assert load_examples(source) == [EXAMPLES[1], EXAMPLES[0], EXAMPLES[2]]
        assert split_counts(source) == {"test": 1, "train": 2}
    assert "there are: test (1), train (2); set" in error_of(tfds_folder, split="validation")
    assert "1.0.0" in error_of(tfds_folder.parent)


@pytest.mark.parametrize("damage", ["truncated", "empty", "missing", "metadata"])
def test_damaged_tfds_folder(tfds_folder, tmp_path, damage):
    for path in tfds_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    records = tmp_path / "faq-test.array_record-00000-of-00001"
    if damage == "missing":
        records.unlink()
    elif damage == "metadata":
        (tmp_path / "dataset_info.json").write_text("{")
    else:
        records.write_bytes(records.read_bytes()[: 65536 if damage == "truncated" else 0])
    message = error_of(tmp_path)
    if damage == "metadata":
        assert "tfds cannot read it" in message
    else:
        assert f"{records.name} is damaged; expected 1 rows, found " in message


def test_package_source():
    # The package has no data of its own that is certain to be there; its sources are of an unknown kind.
    with pytest.raises(InputError, match="unknown kind of file"):
        load_examples("package://raft_jax/errors.py")


# Shapes


def turns(*texts, first="user"):
    roles = ["user", "assistant"] * len(texts)
    start = 0 if first == "user" else 1
    return [{"role": role, "content": text} for role, text in zip(roles[start:], texts, strict=False)]


SYSTEM = {"role": "system", "content": "You are a clerk."}
CLERK = ("system", "You are a clerk.")
EARLIER = (("user", "Who?"), ("assistant", "I."))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Why?", "completion": "So."}, ("Why?", "So.", "")),
        ({"prompt": turns("Why?"), "completion": turns("So.", first="assistant")}, ("Why?", "So.", "")),
        (
            {"prompt": [SYSTEM, *turns("Who?", "I.", "Why?")], "completion": "So."},
            ("Why?", "So.", "", (CLERK, *EARLIER)),
        ),
        ({"messages": turns("Why?", "So.")}, ("Why?", "So.", "")),
        ({"messages": [SYSTEM, *turns("Why?", "So.")]}, ("Why?", "So.", "", (CLERK,))),
        # Some templates write words of their own where there is no system turn, and none where it is empty.
        (
            {"messages": [{"role": "system", "content": ""}, *turns("Why?", "So.")]},
            ("Why?", "So.", "", (("system", ""),)),
        ),
        ({"messages": turns("Who?", "I.", "Why?", "So."), "context": "Form 10."}, ("Why?", "So.", "Form 10.", EARLIER)),
        ({"messages": turns("Why?", "So."), "system": "You are a clerk."}, ("Why?", "So.", "", (CLERK,))),
        ({"messages": turns("Why?", "So."), "system": None, "tools": [], "images": None}, ("Why?", "So.", "")),
        ({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}, ("Why?", "So.", "")),
        (
            {
                "conversations": [
                    {"from": "system", "value": "You are a clerk."},
                    {"from": "human", "value": "Who?"},
                    {"from": "gpt", "value": "I."},
                    {"from": "user", "value": "Why?"},
                    {"from": "assistant", "value": "So.", "weight": 1},
                ]
            },
            ("Why?", "So.", "", (CLERK, *EARLIER)),
        ),
        ({"conversations": turns("Why?", "So."), "id_of_source": 3}, ("Why?", "So.", "")),
        # Weights of turns that are not trained on in any case are without consequence, and so are empty fields.
        (
            {
                "messages": [
                    {"role": "user", "content": "Who?", "weight": 0, "tool_calls": None},
                    {"role": "assistant", "content": "I.", "weight": 0, "tool_calls": [], "reasoning_content": ""},
                    *turns("Why?", "So."),
                ]
            },
            ("Why?", "So.", "", EARLIER),
        ),
        (
            {"messages": turns("Why?", "So."), "question": None, "answer": None, "prompt": None, "completion": None},
            ("Why?", "So.", ""),
        ),
        ({"question": "Why?", "answer": "So.", "tools": ["saw"], "weight": 0}, ("Why?", "So.", "")),
        (
            {"question": "Why?", "answer": "So.", "system": "You are a clerk.", "context": "Form 10."},
            ("Why?", "So.", "Form 10.", (CLERK,)),
        ),
        (
            {"prompt": [SYSTEM, *turns("Why?")], "completion": "So.", "system": SYSTEM["content"]},
            ("Why?", "So.", "", (CLERK,)),
        ),
        ({"question": "Why?", "answer": "So.", "system": ""}, ("Why?", "So.", "")),
        ({"question": "Why?", "answer": "So.", "context": "Form 10.", "messages": 3}, ("Why?", "So.", "Form 10.")),
        ({"question": "Why?", "answer": "So.", "context": None}, ("Why?", "So.", "")),
        ({"question": "Why?", "answer": "So.", "context": ""}, ("Why?", "So.", "")),
    ],
)
def test_shapes(tmp_path, row, expected):
    assert load_examples(write(tmp_path, [row])) == [Example("000001", *expected)]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
@pytest.mark.parametrize("columns", [("question", "answer"), ("prompt", "completion")])
def test_several_answers(tmp_path, name, columns):
    answers = [["So.", "Thus.", "So."], ["So."], ["Thus.", "So."]]
    rows = [dict(zip((*columns, "tools"), ("Why?", texts, ["saw"]), strict=True)) for texts in answers]
    path = write(tmp_path, rows, name) if name == "rows.jsonl" else tmp_path / name
    if name == "rows.parquet":
        import pyarrow as pa
        import pyarrow.parquet

        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    found = load_examples(path)
    assert [(example.answer, example.more_answers) for example in found] == [
        ("So.", ("Thus.",)),
        ("So.", ()),
        ("Thus.", ("So.",)),
    ]
    assert [example.answer for example in first_answers(found)] == ["So.", "So.", "Thus."]
    rows = each_answer(found)
    assert [(row.id, row.answer) for row in rows] == [
        ("000001#1", "So."),
        ("000001#2", "Thus."),
        ("000002", "So."),
        ("000003#1", "Thus."),
        ("000003#2", "So."),
    ]
    assert {(row.question, row.more_answers) for row in rows} == {("Why?", ())}


def test_each_row_has_its_shape(tmp_path):
    path = write(tmp_path, [{"messages": turns("Why?", "So.")}, {"prompt": "Who?", "completion": "I."}])
    assert load_examples(path) == [Example("000001", "Why?", "So."), Example("000002", "Who?", "I.")]
    path = write(tmp_path, [{"messages": turns("Why?", "So.")}, {"prompt": "Who?"}])
    assert ":2: no column 'messages'; there are: prompt" in error_of(path)


LOST = {
    "tool_calls": [{"id": "c1"}],
    "function_call": {"name": "look"},
    "reasoning_content": "Hm.",
    "thinking": "Hm.",
    "images": ["pier.png"],
    "weight": 0,
}


@pytest.mark.parametrize("key", LOST)
@pytest.mark.parametrize("shape", ["messages", "earlier", "completion", "conversations"])
def test_what_would_be_lost_of_a_turn_is_refused(tmp_path, key, shape):
    last = {"role": "assistant", "content": "So.", key: LOST[key]}
    row = {
        "messages": {"messages": [*turns("Why?"), last]},
        "earlier": {"messages": [*turns("Who?"), last, *turns("Why?", "So.")]},
        "completion": {"prompt": "Why?", "completion": [last]},
        "conversations": {
            "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So.", key: LOST[key]}]
        },
    }[shape]
    good = {"messages": turns("Why?", "So.")}
    path = write(tmp_path, [good, row, good])
    if (shape, key) == ("earlier", "weight"):  # not trained on in any case
        assert len(load_examples(path)) == 3
        return
    message = error_of(path)
    assert message.startswith(":2: ") and f" has {key}" in message and "data.skip_bad_rows" in message
    bad = {}
    assert len(load_examples(path, bad_rows=bad)) == 2
    assert list(bad) == ["000002"] and f" has {key}" in bad["000002"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("images", ["pier.png"]),
        ("weight", 0),
        ("weight", 0.5),
        ("functions", [{}]),
        ("videos", ["pier.mp4"]),
        ("documents", [{"text": "Tides."}]),
    ],
)
def test_what_would_be_lost_of_a_conversation_is_refused(tmp_path, key, value):
    for row in ({"messages": turns("Why?", "So.")}, {"prompt": turns("Why?"), "completion": "So."}):
        assert f":1: the row has {key}" in error_of(write(tmp_path, [{**row, key: value}]))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "system", "content": "Be \udc80 brief"}, *turns("Why?", "So.")]},
        {"messages": turns("Wh\ud800o?", "I.", "Why?", "So.")},
        {"question": "Why?", "answer": "So.", "context": "\udfff"},
        {"conversations": [{"from": "human", "value": "Why \udc80?"}, {"from": "gpt", "value": "So."}]},
    ],
)
def test_halves_of_characters_are_refused_everywhere(tmp_path, row):
    assert "holds half a character" in error_of(write(tmp_path, json.dumps(row).encode()))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "messages must be a list of turns (role and content), got an empty list"),
        ({"messages": "Why? So."}, "messages must be a list of turns (role and content), got text"),
        ({"messages": turns("Why?")}, "turns by user; system may only be first, and the last two must be"),
        ({"messages": turns("Why?", "So.", "And?")}, "turns by user, assistant, user; "),
        ({"messages": turns("So.", first="assistant")}, "turns by assistant; "),
        ({"messages": [*turns("Who?"), SYSTEM, *turns("Why?", "So.")]}, "turns by user, system, user, assistant; "),
        (
            {"messages": [*turns("Why?"), {"role": "tool", "content": "1"}, *turns("So.", first="assistant")]},
            "turn 2 of messages must have a role (system, user, assistant) and text as content, "
            "got the role 'tool' and text",
        ),
        (
            {"messages": [*turns("Why?"), {"role": "assistant", "content": None}]},
            "text as content, got the role 'assistant' and null",
        ),
        ({"messages": ["Why?", "So."]}, "turn 1 of messages must have a role (system, user, assistant)"),
        ({"messages": turns("Why?", " \n")}, "turn 2 of messages is empty"),
        ({"prompt": turns("Why?", "So"), "completion": "."}, "turns by user, assistant, assistant; "),
        ({"prompt": "Why?", "completion": []}, "completion is an empty list; give at least one answer, or remove the"),
        ({"question": "Why?", "answer": ["So.", " "]}, "answer 2 of answer is empty"),
        ({"question": "Why?", "answer": [None, "So."]}, "answer 1 of answer must be text, got null"),
        ({"question": "Why?", "answer": ["So.", ["So."]]}, "answer 2 of answer must be text, got a list of texts"),
        ({"question": ["Why?"], "answer": "So."}, "question must be one text, or a list of turns"),
        ({"prompt": "Why?", "completion": {"text": "So."}}, "completion must be text, got an object"),
        (
            {"messages": [SYSTEM, *turns("Why?", "So.")], "system": "You are a judge."},
            "a system turn, and another text in the column 'system'; remove one, or set data.system",
        ),
        ({"prompt": [SYSTEM, *turns("Why?")], "completion": "So.", "system": "You are a judge."}, "a system turn, and"),
        ({"question": "Why?", "answer": "So.", "system": ["metric"]}, "system must be text, got a list of texts"),
    ],
)
def test_shapes_that_cannot_be_mapped(tmp_path, row, message):
    assert message in error_of(write(tmp_path, [row]))


def test_named_columns(tmp_path):
    row = {"n": 5, "ask": "Why?", "reply": "So.", "fold": "x", "page": "Form 10.", "context": [1]}
    row |= {"role": "You are a clerk.", "system": ["metric"]}
    path = write(tmp_path, [row])
    named = Columns(question="ask", answer="reply", id="n", split="fold", context="page", system="role")
    assert load_examples(path, named, split="x") == [Example("5", "Why?", "So.", "Form 10.", (CLERK,))]
    assert ":1: context must be text, got a list; write" in error_of(path, columns=Columns("ask", "reply", system=""))
    without = Columns("ask", "reply", context="", system="")
    assert load_examples(path, without) == [Example("000001", "Why?", "So.")]
    for field in ("question", "answer", "id", "context", "system"):
        chosen = Columns(**{"question": "ask", "answer": "reply", "context": "page", "system": "", field: "absent"})
        message = error_of(path, columns=chosen)
        assert "no column 'absent'" in message and f"set data.{field}" in message
    chat = write(tmp_path, [{"talk": turns("Why?", "So.")}])
    assert load_examples(chat, Columns("talk", "talk")) == [Example("000001", "Why?", "So.")]
    # A name that was chosen is not silently passed over for another shape.
    other = write(tmp_path, [{"prompt": "Why?", "completion": "So."}])
    message = error_of(other, columns=Columns(question="promt", answer="completion"))
    assert "no column 'promt'; there are: prompt, completion; set data.question, " in message


def test_ids_without_a_column_are_row_numbers(tmp_path):
    rows = [{"question": f"Q{number}?", "answer": "A.", "split": "ab"[number % 2]} for number in range(12)]
    path = write(tmp_path, b"\n" + as_jsonl(rows))
    assert [example.id for example in load_examples(path)] == [f"{number:06d}" for number in range(1, 13)]
    # The same row has the same id, whatever is asked for.
    assert [example.id for example in load_examples(path, split="b", limit=2)] == ["000002", "000004"]


# Bad input


def test_missing_and_unknown_files(tmp_path):
    assert error_of(tmp_path / "nothing.jsonl").startswith(": no such file or folder")
    assert "unknown kind of file" in error_of(write(tmp_path, b"", "rows.xlsx"))
    assert error_of(tmp_path / "rows.xlsx").endswith("or a folder written by tfds")
    assert "name one of the things in it: rows.xlsx" in error_of(tmp_path)
    assert "hf:// names a model" in error_of("hf://someone/something")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.tsv"])
@pytest.mark.parametrize("data", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_empty_files(tmp_path, name, data):
    assert error_of(write(tmp_path, data, name)).startswith(": no rows in it")


def test_files_with_a_head_only(tmp_path):
    assert error_of(write(tmp_path, b"[ ]", "rows.json")).startswith(": no rows in it")
    assert error_of(write(tmp_path, b"question,answer\n", "rows.csv")).startswith(": no rows in it")


GOOD = b'{"id": "a", "question": "Why?", "answer": "So."}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"question": "Why?", "answer": ', "not JSON (Expecting value)"),
        (b"Why? So.", "not JSON"),
        (b"[" * 100000, "not JSON"),
        (b'{"question": "Wh\xe4?", "answer": "So."}', "not UTF-8 (byte 0xe4)"),
        (b'["Why?", "So."]', "expected an object with a key for each column, found a list"),
        (b"null", "expected an object with a key for each column, found null"),
        (
            b'{"id": "b", "question": "Why?", "anser": "So."}',
            "no column 'answer'; there are: id, question, anser; set data.answer, perhaps to anser",
        ),
        (
            b'{"id": "b", "instruction": "Why?", "output": "So."}',
            "no column 'question'; there are: id, instruction, output; set data.question, perhaps to instruction",
        ),
        (b'{"question": "Why?", "answer": "So."}', "no column 'id'; there are: question, answer; set data.id"),
        (b"{}", "no column 'id'; there are: none"),
        (b'{"id": "b", "question": " \\n\\u00a0", "answer": "So."}', "question is empty"),
        (b'{"id": "b", "question": "Why?", "answer": ""}', "answer is empty"),
        (b'{"id": "b", "question": 3, "answer": "So."}', "question must be text, got int"),
        (b'{"id": "b", "question": "Why?", "answer": null}', "answer must be text, got null"),
        (b'{"id": "b", "question": "Why?", "answer": {"text": "So."}}', "answer must be text, got an object"),
        (
            b'{"id": "b", "question": ["Why?"], "answer": "So."}',
            "question must be one text, or a list of turns (role and content), got a list of texts; choose one of them",
        ),
        (b'{"id": "b", "question": "Why \\ud800?", "answer": "So."}', "question holds half a character"),
        (b'{"id": "", "question": "Why?", "answer": "So."}', "id is empty"),
        (b'{"id": 1.5, "question": "Why?", "answer": "So."}', "id must be text, got float"),
        (b'{"id": true, "question": "Why?", "answer": "So."}', "id must be text, got bool"),
    ],
)
def test_bad_rows(tmp_path, line, message):
    said = error_of(write(tmp_path, GOOD + b"\n" + line + b"\n" + GOOD.replace(b'"a"', b'"z"')))
    assert said.startswith(":3: ") and message in said


def test_duplicate_ids_name_both_lines(tmp_path):
    path = write(tmp_path, [*ROWS, {**ROWS[1], "split": "train"}])
    assert f":4: the id 'b' is already that of {path}:2; " in error_of(path)
    # Also where the other one is in a split that was not asked for, or one is text and one a number.
    assert "already" in error_of(path, split="train")
    assert "already" in error_of(write(tmp_path, [{**ROWS[0], "id": 1}, {**ROWS[1], "id": "1"}]))
    assert [example.id for example in load_examples(path, Columns(id=""))] == ["000001", "000002"]


def test_splits(tmp_path):
    path = write(tmp_path, ROWS)
    assert "no rows of the split 'dev'; there are: test (1), train (2); set" in error_of(path, split="dev")
    # Answers that are held back do not matter to those who ask for another split.
    path = write(tmp_path, [ROWS[0], {**ROWS[1], "answer": ""}])
    assert load_examples(path, split="train") == EXAMPLES[:1]
    assert ":2: answer is empty" in error_of(path, split="test")
    assert ":2: no column 'split'" in error_of(
        write(tmp_path, [ROWS[0], {"id": "b", "question": "Why?", "answer": "So."}]), split="train"
    )
    path = write(tmp_path, GOOD)
    assert "there is no column 'split'; set data.split" in error_of(path, split="train")
    assert split_counts(path) == {}


def test_limit_must_be_positive(tmp_path):
    with pytest.raises(InputError, match="limit 0"):
        load_examples(write(tmp_path, ROWS), limit=0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"question,answer\nWhy?,So.\nWhy, then?,So.\n", ":3: 3 fields, but the header has 2"),
        (b'question,answer\n"Why,\nthen?",So.\nWhy?\n', ":4: 1 fields, but the header has 2"),
        (b'question,answer\n"Why,\nthen?",So.\n" ",So.\n', ":4: question is empty"),
        (b'question,answer\nWhy?,"So" it is.\n', ":2: not CSV"),
        (b'question,answer\nWhy?,So.\nWhy?,"So.\nWhy?,So.\n', ":3: not CSV"),
        (b"question,answer,answer\nWhy?,So.,No.\n", ":1: two columns have one name"),
        (
            b"question;answer\nWhy?;So.\n",
            ":1: one column 'question;answer': is the separator ';'? save with commas, or",
        ),
        (b"question\tanswer\nWhy?\tSo.\n", ":1: one column 'question\\tanswer'"),
        (b"question|answer\nWhy?|So, then.\n", ":1: one column 'question|answer': is the separator '|'?"),
        (b"question,answer\nWhy?,So.\n\xef\xbb\xbfquestion,answer\nWho?,I.\n", ":3: the header again"),
        (b"question,answer\nWhy?,So.\nquestion, answer\n", ":3: the header again"),
        (b'"question","answer"\nWhy?,So.\n\n"question","answer"\n', ":4: the header again"),
        (b"question,answer\nWhy?,S\0o.\n", ":2: holds a NUL character; is it UTF-16?"),
        ("question,answer\nWhy?,So.\n".encode("utf-16-le"), ":1: holds a NUL character; is it UTF-16?"),
        ("question,answer\nWhy?,So.\n".encode("utf-16"), ":1: not UTF-8 (byte 0xff)"),
        (b"question,answer\nWhy?,So.\nWh\xe4?,So.\n", ":3: not UTF-8 (byte 0xe4)"),
    ],
)
def test_bad_csv(tmp_path, data, message):
    assert error_of(write(tmp_path, data, "rows.csv")).startswith(message)


def test_bad_json_array(tmp_path):
    data = json.dumps(ROWS, indent=2).encode()
    assert error_of(write(tmp_path, data[:-3], "rows.json")).startswith(":19: not JSON")
    data = json.dumps([*ROWS, "d"]).encode()
    assert error_of(write(tmp_path, data, "rows.json")).startswith(": item 4: expected an object")


def test_bad_gzip(tmp_path):
    whole = gzip.compress(as_jsonl(ROWS))
    for data in (b"no gzip", whole[:-10], whole[:20] + b"\0\0\0" + whole[23:]):
        assert ": cannot be read (" in error_of(write(tmp_path, data, "rows.jsonl.gz"))


def test_pipes_and_devices_are_refused(tmp_path):
    for name in ("rows.jsonl", "rows.csv", "rows.parquet"):
        os.mkfifo(tmp_path / name)
        assert error_of(tmp_path / name).startswith(": expected a file, found a ")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    assert error_of(tmp_path / "zero.jsonl").startswith(": expected a file, found a ")
    with pytest.raises(InputError, match="expected a file, found a named pipe"):
        fingerprint(tmp_path / "rows.jsonl")


def test_what_unpacks_to_far_more_than_text_does_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MIN_UNPACKED", 2**20)
    for name, data in (
        ("rows.jsonl.gz", GOOD + (b" " * 1023 + b"\n") * 2**14),
        ("rows.csv.gz", b"question,answer\n" + (b" " * 1023 + b",\n") * 2**14),
    ):
        path = write(tmp_path, gzip.compress(data), name)
        with memory_below(2**22):  # of 16 MiB unpacked
            assert " MiB unpacked, over 100 times its size" in error_of(path)
    # Text that packs well is read.
    write(tmp_path, gzip.compress(as_jsonl([{"question": "Why?" * 2**14, "answer": "So."}])), "rows.jsonl.gz")
    assert len(load_examples(tmp_path / "rows.jsonl.gz")) == 1


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.jsonl.gz"])
def test_a_line_without_end_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files, "MAX_LINE", 2**16)
    data = (b"question,answer\n" if "csv" in name else GOOD) + b"x" * 2**22
    path = write(tmp_path, gzip.compress(data) if ".gz" in name else data, name)
    with memory_below(2**21):  # of 4 MiB
        assert error_of(path).startswith(":2: a line of")
    monkeypatch.setattr(files, "MAX_ARRAY", 2**16)
    array = b"[" + b",\n".join([GOOD] * 2000) + b"]"
    assert ": a JSON array of more than" in error_of(write(tmp_path, array, "array.json"))


def test_one_key_twice_is_refused(tmp_path):
    path = write(tmp_path, GOOD + b'{"id": "b", "question": "Why?", "answer": "So.", "answer": "No."}')
    assert error_of(path).startswith(":2: not JSON (an object has the key 'answer' twice)")


def test_errors_obey_no_control_characters_of_the_data(tmp_path):
    escape = "\x1b[2J\n\x9b"
    for rows in (
        [{escape: "Why?", "answers": "So."}],
        [{"id": escape, **row} for row in [{}, {}]],
        [{"messages": [{"role": escape, "content": "So."}]}],
        [{"messages": [{escape: "x"}]}],
        [{"question": {escape: 1}, "answer": "So."}],
        [{"question": "Why?", "answer": "So.", "split": escape}],
    ):
        path = write(tmp_path, rows)
        error_of(path, split="train" if "split" in rows[0] else None)
    error_of(write(tmp_path, f'question,answer\nWhy?,So.\n"{escape}",\n'.encode(), "rows.csv"))
    error_of(write(tmp_path, b"question\x1b[2J,question\x1b[2J\nWhy?,So.\n", "rows.csv"))


def test_a_missing_column_is_the_files_fault_and_in_some_rows_theirs(tmp_path):
    rows = [{"question": "Why?", "answer": "So."}, {"question": "Who?"}]
    assert "data.skip_bad_rows" in error_of(write(tmp_path, rows))
    assert "data.skip_bad_rows" not in error_of(write(tmp_path, rows[1:]))
    bad = {}
    assert [example.id for example in load_examples(write(tmp_path, rows), bad_rows=bad)] == ["000001"]
    assert ":2: no column 'answer'" in bad["000002"]


def test_bad_rows_are_left_out_and_named_where_asked(tmp_path):
    rows = [
        *ROWS,
        {**ROWS[0], "id": "d", "answer": ""},
        {**ROWS[0], "id": "e", "question": 3},
        {**ROWS[0], "id": "f", "question": "Who?"},
        {**ROWS[1], "id": "g", "answer": None},
    ]
    path = write(tmp_path, rows)
    assert ":4: answer is empty; fill it in or remove the row; data.skip_bad_rows=true leaves" in error_of(path)
    bad = {}
    assert [example.id for example in load_examples(path, split="train", bad_rows=bad)] == ["a", "c", "f"]
    assert bad == {
        "d": f"{path}:4: answer is empty; fill it in or remove the row",
        "e": f"{path}:5: question must be text, got int",
    }
    # What is wrong with the file is an error all the same, and so is a file without a good row.
    for broken, message in (
        ([*rows, rows[0]], "is already that of"),
        ([{**ROWS[0], "id": 1.5}], "id must be text"),
        ([*rows, {**ROWS[0], "id": "h", "split": None}], "split must be text"),
        (rows[3:5], "answer is empty; fill it in or remove the row; none of the 2 rows can be used"),
    ):
        assert message in error_of(write(tmp_path, broken), split="train", bad_rows={})


@pytest.mark.parametrize(
    ("row", "way_out"),
    [
        ({"id": 1.5}, "data.id=null"),
        ({"id": None}, "data.id=null"),
        ({"id": ["a"]}, "data.id=null"),
        ({"id": "a", "split": None}, 'data.split=""'),
        ({"id": "a", "split": 3}, 'data.split=""'),
        ({}, "data.id=null"),
        ({"id": "c", "split": ""}, 'data.split=""'),
    ],
)
def test_errors_of_ids_and_splits_name_the_way_out(tmp_path, row, way_out):
    text = {"question": "Why?", "answer": "So."}
    first = {"id": "first", **({"split": "train"} if "split" in row else {}), **text}
    path = write(tmp_path, [first, {**row, **text}])
    assert way_out in error_of(path, split="train" if "split" in row else None)
    columns = Columns(id=None) if "id" in way_out else Columns(split="")
    assert len(load_examples(path, columns)) == 2
    if "split" in row:
        path = write(tmp_path, [first, {"id": "z", **text}])
        assert 'data.split=""' in error_of(path, split="train")


def test_lists_and_objects_are_named_with_what_to_write_instead(tmp_path):
    squad = {"question": "Why?", "answers": {"text": ["So."], "answer_start": [0]}}
    assert (
        "perhaps to answers (an object with text, answer_start stands there; a text, or a list of {role, content}"
        in error_of(write(tmp_path, [squad]))
    )
    assert "answers must be text, got an object with text, answer_start; write a text, or a list of turns" in error_of(
        write(tmp_path, [squad]), columns=Columns(answer="answers")
    )
    assert "set data.question (qa is an object with question, answer; its texts are needed in columns" in error_of(
        write(tmp_path, [{"qa": {"question": "Why?", "answer": "So."}}])
    )
    nested = {"messages": {"role": ["user", "assistant"], "content": ["Why?", "So."]}}
    assert 'got an object with role, content; write [{"role": "user", "content": …}' in error_of(
        write(tmp_path, [nested])
    )


# Parquet


def write_parquet(folder, columns):
    import pyarrow as pa
    import pyarrow.parquet

    path = folder / "rows.parquet"
    table = pa.Table.from_arrays(list(columns.values()), names=[name.split("#")[0] for name in columns])
    pa.parquet.write_table(table, path)
    return path


def test_of_parquet_the_columns_that_are_used_are_read(tmp_path):
    import pyarrow as pa

    texts = {"question": pa.array(["Why?", "Who?"]), "answer": pa.array(["So.", "I."])}
    nanoseconds = pa.array([1700000000123456789] * 2, pa.timestamp("ns"))
    beyond = pa.array([2**62] * 2, pa.timestamp("us"))
    mars = pa.array([0, 0], pa.timestamp("us", tz="Mars/Olympus"))
    not_utf8 = pa.Array.from_buffers(pa.string(), 2, pa.array([b"a", b"\xff"]).buffers())
    for name, odd in {
        "ns": nanoseconds,
        "beyond": beyond,
        "mars": mars,
        "bytes": not_utf8,
        "messages": not_utf8,
        "made at\x1b[2J": mars,
    }.items():
        path = write_parquet(tmp_path, {**texts, name: odd})
        assert load_examples(path) == [Example("000001", "Why?", "So."), Example("000002", "Who?", "I.")]
    for odd in (beyond, mars, not_utf8):
        path = write_parquet(tmp_path, {**texts, "context": odd})
        message = error_of(path)
        assert "column 'context' cannot be read" in message and message.startswith(": row ")
    assert ": row 2: column 'answer' cannot be read (UnicodeDecodeError" in error_of(
        write_parquet(tmp_path, {**texts, "answer": not_utf8})
    )
    bad = {}  # counted and named where rows may be left out
    assert load_examples(tmp_path / "rows.parquet", bad_rows=bad) == [Example("000001", "Why?", "a")]
    assert list(bad) == ["000002"] and ": row 2: column 'answer' cannot be read (UnicodeDecodeError" in bad["000002"]
    assert ": row 1: question must be text, got bytes" in error_of(
        write_parquet(tmp_path, {**texts, "question": pa.array([b"Why?", b"Who?"])})
    )
    assert (
        ": row 1: id must be text, got float (text or a whole number is expected); give each row its own, or set "
        "data.id=null" in error_of(write_parquet(tmp_path, {**texts, "id": pa.array([0.0, 1.0])}))
    )
    assert "two columns have one name (question, answer, answer)" in error_of(
        write_parquet(tmp_path, {**texts, "answer#2": texts["answer"]})
    )
    assert "id must be text, got datetime" in error_of(
        write_parquet(tmp_path, {**texts, "id": pa.array([datetime.datetime(2026, 1, 2)] * 2)})
    )
    assert (
        "no column 'answer'; there are: question, answers; set data.answer, perhaps to answers (an object"
        in error_of(
            write_parquet(tmp_path, {"question": texts["question"], "answers": pa.array([{"text": ["So."]}] * 2)})
        )
    )


def test_columns_of_nulls_do_not_decide_the_shape_of_parquet(tmp_path):
    import pyarrow as pa

    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    path = write_parquet(
        tmp_path,
        {
            "prompt": pa.array([None, "Who?"]),
            "completion": pa.array([None, "I."]),
            "messages": pa.array([chat, None]),
            "tools": pa.array([None, None], pa.list_(pa.string())),
        },
    )
    assert load_examples(path) == [Example("000001", "Why?", "So."), Example("000002", "Who?", "I.")]
    path = write_parquet(tmp_path, {"messages": pa.array([chat, chat]), "tools": pa.array([[], ["saw"]])})
    assert ": row 2: the row has tools" in error_of(path)


def test_large_columns_of_parquet_that_are_not_used_are_not_read(tmp_path):
    import pyarrow as pa

    pictures = pa.array([os.urandom(2**16) for _ in range(64)])
    chat = pa.array([[{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]] * 64)
    texts = {"question": pa.array(["Why?"] * 64), "answer": pa.array(["So."] * 64)}
    for columns in (
        {**texts, "page": pictures, "messages": pictures, "images": pictures},
        {"messages": chat, "page": pictures},
    ):
        path = write_parquet(tmp_path, columns)
        before = pa.total_allocated_bytes()
        peak = pa.default_memory_pool().max_memory()
        with memory_below(2**20):
            assert len(load_examples(path)) == 64
        assert pa.total_allocated_bytes() <= before + 2**20
        assert pa.default_memory_pool().max_memory() <= max(peak, before + 2**21)


# Held-out rows and fingerprints


def test_held_out_choice_is_independent_of_order_and_stable():
    examples = [Example(f"{number}", "Q?", "A.") for number in range(200)]
    rest, held_out = split_held_out(examples, 40, seed=3)
    assert len(held_out) == 40 and sorted(rest + held_out, key=examples.index) == examples
    assert rest == sorted(rest, key=examples.index) and held_out == sorted(held_out, key=examples.index)
    back_rest, back = split_held_out(examples[::-1], 40, seed=3)
    assert back == held_out[::-1] and back_rest == rest[::-1]
    assert split_held_out(examples, 40, seed=4)[1] != held_out
    more = split_held_out([*examples, Example("new", "Q?", "A.")], 40, seed=3)[1]
    assert len(set(held_out) - set(more)) <= 1
    assert split_held_out(examples[:1], 0) == (examples[:1], [])
    # A worked constant: if the choice ever changed, a resumed run would train on what it had held out.
    assert [example.id for example in split_held_out(examples[:10], 3, seed=0)[1]] == ["4", "7", "9"]


def test_a_sample_is_independent_of_order_and_of_what_is_held_out():
    examples = [Example(f"{number:03d}", "Q?", "A.") for number in range(400)]
    sample = [example.id for example in sampling_order(examples)[:40]]
    assert sample == [example.id for example in sampling_order(examples[::-1])[:40]]
    # The first 40 of an ordered file would have the mean 19.5; of a sample it is 199.5, give or take 18.
    assert 130 < sum(map(int, sample)) / 40 < 270
    more = [example.id for example in sampling_order([*examples, Example("new", "Q?", "A.")])[:40]]
    assert len(set(sample) - set(more)) <= 1
    assert set(sample) != {example.id for example in sampling_order(examples, seed=1)[:40]}
    held_out = {example.id for example in split_held_out(examples, 200)[1]}
    assert 8 < len(held_out & set(sample)) < 32
    # A worked constant: if the choice ever changed, a resumed run would go on with other rows.
    assert [example.id for example in sampling_order(examples[:10])[:3]] == ["003", "007", "004"]


@pytest.mark.parametrize("count", [-1, 3, 4])
def test_held_out_count(count):
    with pytest.raises(InputError, match=f"cannot hold out {count} of 3"):
        split_held_out(EXAMPLES, count)


def test_fingerprint(tmp_path):
    path = write(tmp_path, b"abc")
    # FIPS 180-2's example.
    assert fingerprint(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert fingerprint(str(path)) == fingerprint(path)
    folder = fingerprint(tmp_path)
    path.rename(tmp_path / "other.jsonl")
    renamed = fingerprint(tmp_path)
    write(tmp_path, b"abd", "other.jsonl")
    assert len({folder, renamed, fingerprint(tmp_path)}) == 3
    with pytest.raises(InputError):
        fingerprint(path)


@pytest.mark.parametrize("source", ["rows.jsonl", "."])
def test_a_file_that_the_system_does_not_let_us_read_has_no_fingerprint(tmp_path, monkeypatch, source):
    def refuse(path, *arguments):
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    path = write(tmp_path, GOOD, "rows.jsonl")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=f"^{path}: cannot be read .*EMFILE"):
        fingerprint(tmp_path / source)
