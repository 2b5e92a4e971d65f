"""A rewriting that is cut gets one second try with twice the limit: by models on this machine and on servers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from fake_chat import Answer, FakeChat, says
from test_refine import FakeEncoder, FakeGenerator, FakeJudge, examples, lines_of, settings
from test_strong_models import answer, digest_of

from raft_jax.cli import main
from raft_jax.config_file import load_config
from raft_jax.data.refined import load_refined
from raft_jax.refine.ledger import Ledger
from raft_jax.refine.plan import plan
from raft_jax.refine.roles import Roles
from raft_jax.refine.run import RefineModels, item_of, refine


class ShortGenerator(FakeGenerator):
    """Cuts what it writes for some rows; its second try finishes all but some of them."""

    def __init__(self, cut: dict[str, str], identity: str = "short"):
        super().__init__({(id, 1): f"truncated|wording of {id}" for id in cut})
        self.default = lambda id, round: f"wording of {id} ~0.9"
        self.cut, self.identity = cut, identity
        self.second: FakeGenerator | None = None

    def longer(self):
        if self.second is None:
            self.second = FakeGenerator({(id, 1): text for id, text in self.cut.items()})
            self.second.identity = f"{self.identity}, longer"
        return self.second


CUT = {"b": "whole wording of b ~0.95", "c": "truncated|wording of c, and again", "e": "empty|"}


def models_with(rewriter, **changes) -> RefineModels:
    return RefineModels(rewriter, FakeEncoder(), FakeGenerator(), [FakeJudge("one")], **changes)


def test_a_second_try_is_used_where_it_is_whole_and_recorded_as_such(tmp_path, capsys):
    ledger, rewriter = Ledger.open(tmp_path / "ledger.jsonl"), ShortGenerator(CUT)
    rows = refine(examples("a", "b", "c", "d", "e"), models_with(rewriter), settings(rounds=1), ledger)
    assert [(row.rewrite, row.rewrite_status) for row in rows] == [
        ("wording of a ~0.9", "ok"),
        ("whole wording of b ~0.95", "ok"),
        ("wording of c, and again", "truncated"),
        ("wording of d ~0.9", "ok"),
        ("", "empty"),
    ]
    assert [row.chosen for row in rows] == ["fusion", "fusion", "gold", "fusion", "gold"]
    assert rewriter.second.written == [("b", 1), ("c", 1), ("e", 1)]  # each once
    records = [record for record in lines_of(tmp_path / "ledger.jsonl") if record["stage"] == "rewrite"]
    assert [(record["key"][0], record["status"], record.get("try")) for record in records] == [
        ("a", "ok", None),
        ("b", "truncated", None),
        ("c", "truncated", None),
        ("d", "ok", None),
        ("e", "truncated", None),
        ("b", "ok", 2),
        ("c", "truncated", 2),
        ("e", "empty", 2),
    ]
    assert "rewrite: 3 cut at the limit, 2 of them finished within twice the limit" in capsys.readouterr().out
    kept = plan(examples("a", "b", "c", "d", "e"), models_with(rewriter), settings(rounds=1), ledger)
    assert kept == "kept 5 rewrites, 3 fusions, 3 scores"
    other = models_with(ShortGenerator(CUT, "another"))
    assert "redoing 5 rewrites" in plan(examples("a", "b", "c", "d", "e"), other, settings(rounds=1), ledger)


def test_killed_after_any_line_the_same_rows_and_ledger_come_out(tmp_path):
    data, config = examples("a", "b", "c", "d", "e"), settings(rounds=2)
    whole = tmp_path / "whole.jsonl"
    expected = refine(data, models_with(ShortGenerator(CUT)), config, Ledger.open(whole))
    written = whole.read_text().splitlines(keepends=True)
    for kept in range(len(written) + 1):
        path = tmp_path / f"{kept}.jsonl"
        path.write_text("".join(written[:kept]))
        rewriter = ShortGenerator(CUT)
        assert refine(data, models_with(rewriter), config, Ledger.open(path)) == expected
        assert path.read_text() == whole.read_text()
    assert rewriter.written == [] and rewriter.longer().written == []


def test_rows_without_room_get_no_second_try(tmp_path):
    rewriter = ShortGenerator(CUT)
    models = models_with(rewriter, has_room=lambda item: item.id != "b")
    rows = refine(examples("a", "b", "e"), models, settings(rounds=1), Ledger.open(tmp_path / "ledger.jsonl"))
    assert [(row.rewrite, row.rewrite_status) for row in rows[1:]] == [("wording of b", "truncated"), ("", "empty")]
    assert rewriter.second.written == [("e", 1)]


# --- a model on this machine ---

LIMIT = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("second")
    tiny.write_run(folder, refine={"max_new_tokens": LIMIT, "rounds": 1})
    return folder


def refined(folder: Path, name: str, *more: str):
    assert main(["refine", str(folder / "config.yaml"), f"run_dir={folder}/{name}", *more]) == 0
    return load_refined(folder / name / "refined")


def rewrites(folder: Path, name: str) -> list[dict]:
    return [record for record in lines_of(folder / name / "refined/ledger.jsonl") if record["stage"] == "rewrite"]


def test_the_student_s_second_try_is_what_twice_the_limit_would_have_given(run):
    rows = refined(run, "short")
    first = {record["key"].split("#")[0]: record for record in rewrites(run, "short") if "try" not in record}
    second = {record["key"].split("#")[0]: record for record in rewrites(run, "short") if "try" in record}
    assert {id for id, record in first.items() if record["status"] == "truncated"} == second.keys()
    assert {record["status"] for record in second.values()} == {"ok", "truncated"}
    assert all(record["num_tokens"] == LIMIT for id, record in first.items() if id in second)
    assert all(LIMIT < record["num_tokens"] <= 2 * LIMIT for record in second.values())
    assert all(record["text"].startswith(first[id]["text"]) for id, record in second.items())
    refined(run, "long", f"refine.max_new_tokens={2 * LIMIT}")
    long = {record["key"].split("#")[0]: record for record in rewrites(run, "long") if "try" not in record}
    assert {id: long[id]["text"] for id in second} == {id: record["text"] for id, record in second.items()}
    for row in rows:
        record = second.get(row.id, first[row.id])
        assert (row.rewrite_status == "truncated") is (record["status"] == "truncated")


KILLED = """
import os, sys
from raft_jax.cli import main
from raft_jax.refine.ledger import Ledger
write, left = Ledger._write, [int(sys.argv[1])]
def counted(self, lines):
    write(self, lines)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), 9)
Ledger._write = counted
sys.exit(main(sys.argv[2:]))
"""


def test_killed_between_its_tries_it_goes_on_to_the_same_bytes(run, program_environment):
    refined(run, "undisturbed")
    ledger = (run / "undisturbed/refined/ledger.jsonl").read_text()
    killed = ["refine", str(run / "config.yaml"), f"run_dir={run}/killed"]
    for appends in (4, 1):  # the first tries take three or so; then one more of the second tries
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(appends), *killed],
            env=program_environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == -9, done.stderr
    assert any("try" in record for record in rewrites(run, "killed"))
    assert main(killed) == 0
    # Each text once, and the same one.
    texts = [
        sorted((record["stage"], record["key"], record.get("text", "")) for record in map(json.loads, lines))
        for lines in (ledger.splitlines(), (run / "killed/refined/ledger.jsonl").read_text().splitlines())
    ]
    assert texts[0] == texts[1]
    for name in ("refined.jsonl", "manifest.json"):
        assert (run / "killed/refined" / name).read_bytes() == (run / "undisturbed/refined" / name).read_bytes()


def test_room_is_counted_in_the_positions_of_the_models(run):
    config = load_config(run / "config.yaml", ["refine.max_new_tokens=16"])
    model, example = tiny.make_model(), examples("a")[0]
    roles = Roles(config, model, "tiny", None)
    prompts, tokenizer = roles.prompts, model.tokenizer
    fusion = prompts.fuse(example.answer, "", example.question, example.context)  # a terse answer, with its question
    needed = len(tokenizer.chat_prompt(fusion)) + 3 * 16
    for positions, expected in ((needed, True), (needed - 1, False)):
        small = replace(model, config=replace(model.config, max_positions=positions))
        assert Roles(config, small, "tiny", None)._has_room(item_of(example)) is expected


# --- a model on a server ---


def server_run(server: FakeChat, folder: Path, name: str, *more: str) -> list[str]:
    return [
        "refine",
        str(folder / "config.yaml"),
        f"run_dir={folder}/{name}",
        "refine.rewriter=strong",
        "refine.fuser=strong",
        "refine.judges=[coverage,strong]",
        "refine.max_new_tokens=64",
        "data.max_answer_tokens=128",
        "data.max_train=8",
        f"endpoints.strong.base_url={server.base_url}",
        "endpoints.strong.model=big",
        "endpoints.strong.max_tokens=100",
        *more,
    ]


def cut_at(limit: int, body: dict, count: int) -> Answer:
    """Rewritings of rule 2 need more tokens than `limit`."""
    text = str(body["messages"]).lower()
    rewrites = "rule 2 " in text and "two versions" not in text and "you judge" not in text
    if rewrites and body["max_tokens"] <= limit:
        return says("It is cut in the mid", finish="length")
    return answer(body, count)


def test_a_server_is_asked_once_more_with_twice_the_limit(run, capsys):
    with FakeChat(lambda body, count: cut_at(150, body, count)) as server:
        assert main(server_run(server, run, "server")) == 0
        long = [body for body in server.asked if body["max_tokens"] == 200]
        assert len(long) == 1 and {body["max_tokens"] for body in server.asked} == {100, 200}
        rows = {row.id: row for row in load_refined(run / "server/refined")}
        assert rows["q02"].rewrite_status == "ok" and digest_of(long[0]) in rows["q02"].rewrite
        (record,) = [record for record in rewrites(run, "server") if "try" in record]
        assert record["key"].startswith("q02#1#") and record["try"] == 2
        # Both tries are in the account.
        works = json.loads((run / "server/refined/account.json").read_text())["works"]
        assert {work["role"]: work["calls"] for work in works}["rewriter"] == 9
        asked = len(server.asked)
        (run / "server/refined/refined.jsonl").unlink()
        assert main(server_run(server, run, "server")) == 0 and len(server.asked) == asked


def test_a_reply_that_stays_cut_falls_back_after_one_second_try(run):
    with FakeChat(lambda body, count: cut_at(10**6, body, count)) as server:
        assert main(server_run(server, run, "stays")) == 0
        rows = {row.id: row for row in load_refined(run / "stays/refined")}
        assert (rows["q02"].rewrite_status, rows["q02"].chosen) == ("truncated", "gold")
        assert sum(body["max_tokens"] == 200 for body in server.asked) == 1


@pytest.mark.parametrize("status", [400, 503])
def test_a_second_try_without_a_reply_falls_back_and_is_asked_again_unless_it_was_refused(
    run, capsys, monkeypatch, status
):
    monkeypatch.setattr("raft_jax.refine.endpoint.Patience.transient", 1)
    broken = [True]

    def reply(body, count):
        if broken[0] and body["max_tokens"] == 200:
            return Answer(b"too many tokens", status)
        return cut_at(150, body, count)

    with FakeChat(reply) as server:
        arguments = server_run(server, run, f"fails{status}")
        assert main(arguments) == 0
        rows = {row.id: row for row in load_refined(run / f"fails{status}/refined")}
        assert (rows["q02"].rewrite_status, rows["q02"].rewrite) == ("truncated", "It is cut in the mid")
        assert ("without a reply" in capsys.readouterr().out) is (status == 503)
        broken[0], asked = False, len(server.asked)
        assert main(arguments) == 0
        rows = {row.id: row for row in load_refined(run / f"fails{status}/refined")}
        assert (rows["q02"].rewrite_status == "ok", len(server.asked) > asked) == ((status == 503,) * 2)


def test_where_extra_body_sets_the_limit_there_is_no_second_try(run):
    def reply(body, count):
        return cut_at(150, {**body, "max_tokens": body["max_completion_tokens"]}, count)

    with FakeChat(reply) as server:
        limit = "endpoints.strong.extra_body={max_completion_tokens: 100, max_tokens: null}"
        assert main(server_run(server, run, "own limit", limit)) == 0
        rows = {row.id: row for row in load_refined(run / "own limit/refined")}
        assert rows["q02"].rewrite_status == "truncated"
        assert len(server.asked) == len(set(map(digest_of, server.asked)))
