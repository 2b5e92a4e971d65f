"""The refined data set: what tfds and people read, what damage says, and what a kill leaves behind."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest

from raft_jax.data import refined
from raft_jax.data.examples import Example, load_examples
from raft_jax.data.refined import RefinedRow, Round, TextQuality, load_refined, publish, refined_with
from raft_jax.errors import InputError


def make_rows(num_rows=3, word="first"):
    rows = []
    for number in range(num_rows):
        accepted = number % 3 != 2
        rounds = (
            [
                Round(
                    round=1,
                    candidate=f"Candidate ü {number}",
                    status="ok",
                    scores={"coverage": 0.5, "likelihood": None},
                    mean=0.5,
                ),
                Round(round=2, candidate="", status="facts", note="the number 3 is missing", scores={}, mean=None),
            ]
            if accepted
            else []
        )
        rows.append(
            RefinedRow(
                id=f"q{number}",
                question=f"Question {number}?\u2028",
                context="Während der Fahrt" if number else "",
                turns=[["system", "Be brief."]] if number == 1 else [],
                gold=f"Gold {number}\nline two",
                rewrite=f"Rewrite {word}" if accepted else "",
                rewrite_status="ok" if accepted else "empty",
                rewrite_note="",
                similarity=0.1 * (number + 8) if accepted else None,
                accepted=accepted,
                rounds=rounds,
                gold_scores={"coverage": 1.0} if accepted else {},
                gold_mean=1.0 if accepted else None,
                answer=f"Candidate {word} {number}" if accepted else f"Gold {number}",
                chosen="fusion" if accepted else "gold",
                chosen_round=1 if accepted else None,
                reason="It was the best.",
                quality={"gold": TextQuality(logprob=-2.5, length=1.0, coverage=None)} if accepted else None,
            )
        )
    return rows


def written(row: RefinedRow) -> dict:
    """A row as the file has it: what no judge has said is not written."""
    entry = dataclasses.asdict(row)
    for candidate in entry["rounds"]:
        candidate.pop("reasons") if not candidate["reasons"] else None
    return entry


def read_with_tfds(folder):
    import tensorflow_datasets as tfds

    return list(tfds.builder_from_directory(folder).as_data_source("train"))


def test_published_rows_come_back(tmp_path):
    rows = make_rows(7)
    publish(rows, tmp_path / "refined")
    assert load_refined(tmp_path / "refined") == rows
    lines = (tmp_path / "refined" / "refined.jsonl").read_bytes().splitlines()
    assert [json.loads(line) for line in lines] == [written(row) for row in rows]


def test_tfds_reads_the_same_rows(tmp_path):
    rows = make_rows(7)
    publish(rows, tmp_path)
    read = read_with_tfds(tmp_path)
    assert len(read) == 7
    for row, values in zip(rows, read, strict=True):
        expected = written(row)
        assert values.keys() == expected.keys()
        for name in (
            "id",
            "question",
            "context",
            "gold",
            "rewrite",
            "rewrite_status",
            "rewrite_note",
            "answer",
            "chosen",
            "reason",
        ):
            assert values[name].decode() == expected[name]
        for name in ("turns", "rounds", "gold_scores", "quality"):
            assert json.loads(values[name]) == expected[name]
        assert bool(values["accepted"]) is row.accepted
        assert values["chosen_round"] == (row.chosen_round or 0)
        if row.similarity is None:
            assert values["similarity"] != values["similarity"]
        else:
            assert values["similarity"] == pytest.approx(row.similarity, rel=1e-6)


def test_neither_jax_nor_tensorflow_is_needed(tmp_path):
    publish(make_rows(), tmp_path)
    program = (
        "import sys; sys.modules['jax'] = None\n"
        "import tensorflow_datasets as tfds; from raft_jax.data.refined import load_refined, publish\n"
        f"publish(load_refined({str(tmp_path)!r}), {str(tmp_path)!r})\n"
        f"print(len(tfds.builder_from_directory({str(tmp_path)!r}).as_data_source('train')))\n"
        "assert 'tensorflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3"


def test_the_published_folder_is_a_source_of_examples(tmp_path):
    publish(make_rows(2), tmp_path)
    assert load_examples(f"tfds://{tmp_path}", split="train") == [
        Example(id="q0", question="Question 0?\u2028", answer="Candidate first 0"),
        Example(
            id="q1",
            question="Question 1?\u2028",
            answer="Candidate first 1",
            context="Während der Fahrt",
            turns=(("system", "Be brief."),),
        ),
    ]
    assert load_examples(tmp_path / "refined.jsonl") == load_examples(f"tfds://{tmp_path}", split="train")


def test_equal_rows_give_equal_bytes(tmp_path):
    """Also from processes of their own, in which protobuf orders its maps otherwise."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_refined import make_rows, publish\n"
        "publish(make_rows(50), sys.argv[2])"
    )
    for folder in ("one", "two", "three"):
        subprocess.run([sys.executable, "-c", program, os.path.dirname(__file__), str(tmp_path / folder)], check=True)
    once = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    publish(make_rows(50), tmp_path / "one")
    for folder in ("one", "two", "three"):
        assert {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} == once
    assert len(once) == 5


def test_what_rows_were_made_with_comes_back(tmp_path):
    publish(make_rows(2), tmp_path, "these settings")
    assert refined_with(tmp_path) == "these settings" and load_refined(tmp_path) == make_rows(2)


def test_another_version_replaces_the_first_and_nothing_else(tmp_path):
    (tmp_path / "ledger.jsonl").write_text("kept")
    publish(make_rows(3), tmp_path)
    publish(make_rows(2, word="second"), tmp_path)
    assert load_refined(tmp_path) == make_rows(2, word="second")
    assert len(read_with_tfds(tmp_path)) == 2
    assert (tmp_path / "ledger.jsonl").read_text() == "kept"
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize(
    "rows",
    [
        [],
        make_rows(1) * 2,
        [dataclasses.replace(make_rows(1)[0], similarity=float("nan"))],
    ],
)
def test_bad_rows_are_refused(tmp_path, rows):
    publish(make_rows(2), tmp_path)
    with pytest.raises(ValueError):
        publish(rows, tmp_path)
    assert load_refined(tmp_path) == make_rows(2)


class Killed(BaseException):
    pass


def test_a_kill_at_any_moment_leaves_one_whole_version(tmp_path, monkeypatch):
    old, new, newest = make_rows(3), make_rows(3, word="second"), make_rows(4, word="third")
    views = set()
    outcomes = {tuple(map(str, old)): "old", tuple(map(str, new)): "new"}

    def publish_killed_at(call, rows, folder):
        calls = 0

        def dies(function):
            def counted(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == call:
                    raise Killed
                return function(*args, **kwargs)

            return counted

        with monkeypatch.context() as patch:
            patch.setattr(refined.os, "replace", dies(os.replace))
            patch.setattr(refined.os, "fsync", dies(lambda descriptor: None))
            patch.setattr(refined.shutil, "rmtree", dies(refined.shutil.rmtree))
            patch.setattr(refined.Path, "unlink", dies(refined.Path.unlink))
            try:
                publish(rows, folder)
            except Killed:
                return True
        return False

    publish(old, tmp_path / "old")
    for call in range(1, 100):
        folder = shutil.copytree(tmp_path / "old", tmp_path / str(call))
        killed = publish_killed_at(call, new, folder)
        whole = outcomes[tuple(map(str, load_refined(folder)))]
        by_tfds = [values["answer"].decode() for values in read_with_tfds(folder)]
        assert by_tfds in ([row.answer for row in old], [row.answer for row in new])
        in_jsonl = (folder / "refined.jsonl").read_text(encoding="utf-8")
        assert ("second" in in_jsonl) != ("first" in in_jsonl)
        views.add((whole, "second" in by_tfds[0], "second" in in_jsonl))
        # Killed once more while it publishes something else, then left in peace.
        assert publish_killed_at(call, newest, folder) == killed
        assert load_refined(folder) in (old, new, newest)
        publish_killed_at(None, newest, folder)
        assert load_refined(folder) == newest and len(read_with_tfds(folder)) == 4
        assert len(list(folder.iterdir())) == 5
        if not killed:
            break
    assert not killed and call > 10
    assert {("old", False, False), ("new", True, True)} <= views


@pytest.mark.parametrize("name", ["refined.jsonl", "records", "features.json", "dataset_info.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "empty"])
def test_damage_is_named(tmp_path, name, damage):
    publish(make_rows(3), tmp_path)
    path = next(tmp_path.glob("*.array_record*")) if name == "records" else tmp_path / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        at = data.index(b"sha256") + 12 if name == "manifest.json" else len(data) // 2
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "truncated" else b"")
    with pytest.raises(InputError) as caught:
        load_refined(tmp_path)
    message = str(caught.value)
    assert "\n" not in message and "refinement" in message
    if name != "manifest.json":
        assert str(path) in message and f"expected {len(data)} bytes" in message and "found " in message


def test_a_folder_without_a_data_set(tmp_path):
    with pytest.raises(InputError, match="no refined data set here"):
        load_refined(tmp_path)


def test_an_unknown_format_is_refused(tmp_path):
    publish(make_rows(1), tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 3'))
    with pytest.raises(InputError, match="format 3"):
        load_refined(tmp_path)
    path.write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"manifest\.json: damaged"):
        load_refined(tmp_path)
