"""Reading questions and answers: every format and shape, and what bad input is told."""

import csv
import gzip
import io
import json
import sys

import pytest

from raft_jax.data.examples import Columns, Example, fingerprint, load_examples, split_counts, split_held_out
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
    assert message.startswith(str(path)) and "\n" not in message
    return message.removeprefix(str(path))


# Formats


@pytest.mark.parametrize(("name", "data"), [
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
])
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
    assert error_of(path) == ": row 4: answer must be text, got null"
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
            data_dir=folder, dataset_name="faq", split=split, filetype_suffix="array_record")
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=[len(rows)], num_bytes=0,
                                         filename_template=template))
    tfds.folder_dataset.write_metadata(data_dir=folder, features=features, split_infos=infos,
                                       check_data=False)
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
        records.write_bytes(records.read_bytes()[:65536 if damage == "truncated" else 0])
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


@pytest.mark.parametrize(("row", "expected"), [
    ({"prompt": "Why?", "completion": "So."}, ("Why?", "So.", "")),
    ({"prompt": turns("Why?"), "completion": turns("So.", first="assistant")}, ("Why?", "So.", "")),
    ({"prompt": [SYSTEM, *turns("Who?", "I.", "Why?")], "completion": "So."},
     ("Why?", "So.", "You are a clerk.\n\nUser: Who?\n\nAssistant: I.")),
    ({"messages": turns("Why?", "So.")}, ("Why?", "So.", "")),
    ({"messages": [SYSTEM, *turns("Why?", "So.")]}, ("Why?", "So.", "You are a clerk.")),
    ({"messages": [{"role": "system", "content": ""}, *turns("Why?", "So.")]}, ("Why?", "So.", "")),
    ({"messages": turns("Who?", "I.", "Why?", "So."), "context": "Form 10."},
     ("Why?", "So.", "Form 10.\n\nUser: Who?\n\nAssistant: I.")),
    ({"question": "Why?", "answer": "So.", "context": "Form 10.", "messages": 3},
     ("Why?", "So.", "Form 10.")),
    ({"question": "Why?", "answer": "So.", "context": None}, ("Why?", "So.", "")),
    ({"question": "Why?", "answer": "So.", "context": ""}, ("Why?", "So.", "")),
])
def test_shapes(tmp_path, row, expected):
    assert load_examples(write(tmp_path, [row])) == [Example("000001", *expected)]


def test_the_first_row_decides_the_shape(tmp_path):
    path = write(tmp_path, [{"messages": turns("Why?", "So.")}, {"prompt": "Why?", "completion": "So."}])
    assert ":2: no column 'messages'; there are: prompt, completion" in error_of(path)


@pytest.mark.parametrize(("row", "message"), [
    ({"messages": []}, "messages must be a list of turns (role and content), got an empty list"),
    ({"messages": "Why? So."}, "messages must be a list of turns (role and content), got text"),
    ({"messages": turns("Why?")}, "turns by user; system may only be first, and the last two must be"),
    ({"messages": turns("Why?", "So.", "And?")}, "turns by user, assistant, user; "),
    ({"messages": turns("So.", first="assistant")}, "turns by assistant; "),
    ({"messages": [*turns("Who?"), SYSTEM, *turns("Why?", "So.")]},
     "turns by user, system, user, assistant; "),
    ({"messages": [*turns("Why?"), {"role": "tool", "content": "1"}, *turns("So.", first="assistant")]},
     "turn 2 of messages must have a role (system, user, assistant) and text as content, got {'role': "),
    ({"messages": [*turns("Why?"), {"role": "assistant", "content": None}]},
     "text as content, got {'role': 'assistant', 'content': None}"),
    ({"messages": ["Why?", "So."]}, "turn 1 of messages must have a role (system, user, assistant)"),
    ({"messages": turns("Why?", " \n")}, "messages is empty"),
    ({"prompt": turns("Why?", "So"), "completion": "."}, "turns by user, assistant, assistant; "),
    ({"prompt": "Why?", "completion": []},
     "completion must be a list of turns (role and content), got an empty"),
    ({"prompt": "Why?", "completion": {"text": "So."}}, "completion must be text, got an object"),
])
def test_shapes_that_cannot_be_mapped(tmp_path, row, message):
    assert message in error_of(write(tmp_path, [row]))


def test_named_columns(tmp_path):
    row = {"n": 5, "ask": "Why?", "reply": "So.", "fold": "x", "page": "Form 10.", "context": [1]}
    path = write(tmp_path, [row])
    named = Columns(question="ask", answer="reply", id="n", split="fold", context="page")
    assert load_examples(path, named, split="x") == [Example("5", "Why?", "So.", "Form 10.")]
    assert error_of(path, columns=Columns("ask", "reply")) == ":1: context must be text, got a list"
    assert load_examples(path, Columns("ask", "reply", context="")) == [Example("000001", "Why?", "So.")]
    for field in ("question", "answer", "id", "context"):
        chosen = Columns(**{"question": "ask", "answer": "reply", "context": "page", field: "absent"})
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


@pytest.mark.parametrize(("line", "message"), [
    (b'{"question": "Why?", "answer": ', "not JSON (Expecting value)"),
    (b"Why? So.", "not JSON"),
    (b"[" * 100000, "not JSON"),
    (b'{"question": "Wh\xe4?", "answer": "So."}', "not UTF-8 (byte 0xe4)"),
    (b'["Why?", "So."]', "expected an object with a key for each column, found a list"),
    (b"null", "expected an object with a key for each column, found null"),
    (b'{"id": "b", "question": "Why?", "anser": "So."}',
     "no column 'answer'; there are: id, question, anser; set data.answer, perhaps to anser"),
    (b'{"id": "b", "instruction": "Why?", "output": "So."}',
     "no column 'question'; there are: id, instruction, output; "
     "set data.question, perhaps to instruction"),
    (b'{"question": "Why?", "answer": "So."}',
     "no column 'id'; there are: question, answer; set data.id"),
    (b"{}", "no column 'id'; there are: none"),
    (b'{"id": "b", "question": " \\n\\u00a0", "answer": "So."}', "question is empty"),
    (b'{"id": "b", "question": "Why?", "answer": ""}', "answer is empty"),
    (b'{"id": "b", "question": 3, "answer": "So."}', "question must be text, got int"),
    (b'{"id": "b", "question": "Why?", "answer": null}', "answer must be text, got null"),
    (b'{"id": "b", "question": "Why?", "answer": {"text": "So."}}', "answer must be text, got an object"),
    (b'{"id": "b", "question": "Why?", "answer": ["So."]}',
     "turn 1 of answer must have a role (system, user, assistant) and text as content, got 'So.'"),
    (b'{"id": "b", "question": "Why \\ud800?", "answer": "So."}', "question holds half a character"),
    (b'{"id": "", "question": "Why?", "answer": "So."}', "id is empty"),
    (b'{"id": 1.5, "question": "Why?", "answer": "So."}', "id must be text, got float"),
    (b'{"id": true, "question": "Why?", "answer": "So."}', "id must be text, got bool"),
])
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
        write(tmp_path, [ROWS[0], {"id": "b", "question": "Why?", "answer": "So."}]), split="train")
    path = write(tmp_path, GOOD)
    assert "there is no column 'split'; set data.split" in error_of(path, split="train")
    assert split_counts(path) == {}


def test_limit_must_be_positive(tmp_path):
    with pytest.raises(InputError, match="limit 0"):
        load_examples(write(tmp_path, ROWS), limit=0)


@pytest.mark.parametrize(("data", "message"), [
    (b'question,answer\nWhy?,So.\nWhy, then?,So.\n', ":3: 3 fields, but the header has 2"),
    (b'question,answer\n"Why,\nthen?",So.\nWhy?\n', ":4: 1 fields, but the header has 2"),
    (b'question,answer\n"Why,\nthen?",So.\n" ",So.\n', ":4: question is empty"),
    (b'question,answer\nWhy?,"So" it is.\n', ":2: not CSV"),
    (b'question,answer\nWhy?,So.\nWhy?,"So.\nWhy?,So.\n', ":3: not CSV"),
    (b'question,answer,answer\nWhy?,So.,No.\n', ":1: two columns have one name"),
    (b'question;answer\nWhy?;So.\n', ":2: no column 'question'; there are: question;answer"),
])
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
