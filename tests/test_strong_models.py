"""The refinement with a server: killed and gone on with, its key, its preview, its prompts, and bad input."""

from __future__ import annotations

import hashlib
import json
import logging
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import tiny
from fake_chat import Answer, FakeChat, says

from raft_jax.cli import main
from raft_jax.data.refined import load_refined
from raft_jax.report.refinement import counts

SECRET = "sk-canary-51d0e2"


def digest_of(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:12]


def answer(body: dict, count: int) -> Answer:
    """A text or a judgement with the request's hash in it, the same whenever it is asked."""
    system, user = body["messages"][0]["content"], body["messages"][-1]["content"]
    if system.startswith("You judge"):
        value = 0.6 + int(digest_of(body)[:2], 16) / 1000
        return says(json.dumps({"score": value, "reason": f"reason {digest_of(body)}"}), delay=0.01)
    return says(f"{user.splitlines()[0]} Noted {digest_of(body)} ~0.9", delay=0.01)


# --- kill -9 ---

PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_refine import FakeEncoder, examples, settings
from raft_jax.config import EndpointConfig
from raft_jax.data.prompts import load_prompts
from raft_jax.data.refined import publish
from raft_jax.refine.endpoint import Endpoint
from raft_jax.refine.ledger import Ledger
from raft_jax.refine.llm_judge import LLMJudge
from raft_jax.refine.remote import ChatGenerator
from raft_jax.refine.run import RefineModels, refine

folder, prompts = Path({folder!r}), load_prompts()
endpoint = Endpoint("strong", EndpointConfig({url!r}, "big", concurrency=4))
def generator(purpose, prompt):
    return ChatGenerator(endpoint, prompt, purpose=purpose, seed=3, temperature=0.7)
models = RefineModels(
    generator("rewrite", lambda item: prompts.rewrite(f"{{item.gold}} of {{item.id}}")),
    FakeEncoder(),
    generator("fuse", lambda item: prompts.fuse(item.gold, item.rewrite)),
    [LLMJudge(endpoint, prompts.judge, seed=3, prompt_hash="")],
)
ids = [f"row {{n}}" for n in range(24)]
ledger = Ledger.open(folder / "ledger.jsonl")
publish(refine(examples(*ids), models, settings(rounds=2, accept=0.75), ledger), folder)
assert not ledger.num_failures
"""


def start(folder: Path, server: FakeChat) -> subprocess.Popen:
    program = PROGRAM.format(tests=str(Path(__file__).parent), folder=str(folder), url=server.base_url)
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def recorded(folder: Path) -> set[str]:
    """The hashes of the requests whose replies the ledger has, in its complete lines."""
    path = folder / "ledger.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    records = [json.loads(line) for line in lines]
    return {
        record.get("reason", record.get("text", "")).removesuffix(" ~0.9")[-12:]
        for record in records
        if record["stage"] != "similarity"
    }


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_goes_on_and_nothing_finished_is_asked_again(tmp_path, kills):
    with FakeChat(answer) as server:
        process = start(tmp_path / "undisturbed", server)
        assert process.wait() == 0, process.stderr.read().decode()
        needed = Counter(map(digest_of, server.answered))
        assert set(needed.values()) == {1} and len(needed) > 24 * 3
    draw = random.Random(0)
    with FakeChat(answer) as server:
        finished, before = set(), Counter()
        for until in sorted(draw.sample(range(1, len(needed) - 4), kills)):
            process = start(tmp_path / "killed", server)
            while len(server.answered) < until and process.poll() is None:
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
            process.wait()
            asked = Counter(map(digest_of, server.asked))
            assert all(asked[name] == before[name] for name in finished)
            finished, before = recorded(tmp_path / "killed"), asked
            assert finished <= needed.keys()
        process = start(tmp_path / "killed", server)
        assert process.wait() == 0, process.stderr.read().decode()
        asked = Counter(map(digest_of, server.asked))
    assert finished and all(asked[name] == before[name] for name in finished)
    assert asked.keys() == needed.keys() == recorded(tmp_path / "killed")
    rows = load_refined(tmp_path / "killed")
    assert [row.id for row in rows] == [f"row {n}" for n in range(24)]
    for name in ("refined.jsonl", "manifest.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


# --- the command line ---


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a tiny model and its data."""
    folder = tmp_path_factory.mktemp("strong")
    tiny.write_run(folder)
    return folder


def with_server(server: FakeChat, folder: Path, *more: str) -> list[str]:
    return [
        str(folder / "config.yaml"),
        "refine.rewriter=strong",
        "refine.fuser=strong",
        "refine.judges=[coverage,strong]",
        "refine.accept_floor=0.5",
        "data.max_answer_tokens=200",
        "refine.max_new_tokens=100",
        "data.max_train=8",
        f"endpoints.strong.base_url={server.base_url}",
        "endpoints.strong.model=big",
        "endpoints.strong.api_key_env=STRONG_KEY",
        "endpoints.strong.price_in=1",
        "endpoints.strong.price_out=4",
        *more,
    ]


def test_preview_refinement_and_changes_with_a_key_that_shows_nowhere(run, monkeypatch, capsys, caplog):
    """One story, because each part goes on from the one before."""
    monkeypatch.setenv("STRONG_KEY", SECRET)
    caplog.set_level(logging.DEBUG)
    printed = []

    def command(*arguments: str) -> str:
        assert main(list(arguments)) == 0
        printed.append("".join(capsys.readouterr()))
        return printed[-1]

    with FakeChat(answer) as server:
        arguments = with_server(server, run, f"run_dir={run}/story")
        checked = command("check", *arguments)
        assert "endpoint strong: big at" in checked and not server.asked and not (run / "story").exists()

        preview = command("refine", *arguments, "--preview", "2")
        asked = len(server.asked)
        rows = [row["id"] for row in tiny.ROWS if row["split"] == "train"][:2]
        assert [line for line in preview.splitlines() if line.startswith("── ")] == [f"── {name}" for name in rows]
        assert preview.count("reason ") == sum("response_format" in body for body in server.asked) > 0
        tokens, cost = 5 * asked, asked * (10 * 1 + 5 * 4) / 1e6
        assert f"2 of 8 rows: {tokens:,} tokens written" in preview and f"cost {cost:.4g}" in preview
        assert f"about {tokens * 4:,} tokens" in preview and f"cost {cost * 4:.4g}" in preview
        assert not (run / "story/refined/refined.jsonl").exists()

        whole = command("refine", *arguments)
        assert "kept 2 rewrites" in whole and "in flight, 0 retries, cost" in whole
        refined = load_refined(run / "story/refined")
        assert len(refined) == 8 and {row.chosen for row in refined} == {"fusion"}
        counted = Counter(map(digest_of, server.asked))
        assert set(counted.values()) == {1}  # nothing of the preview was asked again
        calls = {stage: sum(f" {stage}" in line for line in whole.splitlines()) for stage in ("rewriter", "fuser")}
        assert calls == {"rewriter": 1, "fuser": 1} and f"cost: {len(counted) * 30 / 1e6:.4g}" in whole
        assert dict(counts(refined, 0.8))["target is a fusion"] == "8"

        # The server moves: nothing is asked again.
        moved = command("refine", *arguments, "endpoints.strong.base_url=http://127.0.0.1:1/v1")
        assert "rewrite" not in moved

        # Another fuser: the rewrites stay.
        before = len(server.asked)
        changed = command(
            "refine",
            *arguments,
            "endpoints.other.model=other",
            f"endpoints.other.base_url={server.base_url}",
            "refine.fuser=other",
        )
        assert "kept 8 rewrites, redoing" in changed and "fusions (fuser changed)" in changed
        assert all(
            "two versions" in str(body["messages"]) or "judge" in str(body["messages"])
            for body in server.asked[before:]
        )

        # An edited prompt: what depends on it.
        command("prompts", "--copy", str(run / "prompts"))
        judge = run / "prompts/judge.txt"
        judge.write_text(judge.read_text().replace("Do not reward length.", "Do not reward length!"))
        before = len(server.asked)
        edited = command("refine", *arguments, f"refine.prompts={run}/prompts")
        assert "scores (judge.txt changed)" in edited
        fresh = server.asked[before:]
        assert fresh and all(body["messages"][0]["content"].startswith("You judge") for body in fresh)
        assert {
            headers["authorization"]
            for headers, body in zip(server.headers, server.asked, strict=True)
            if body["model"] == "big"
        } == {f"Bearer {SECRET}"}

    command("report", *arguments)
    page = (run / "story/report.html").read_text("utf-8")
    assert "judge strong" in page and "tokens written" in page and "reason " in page
    for path in (run / "story").rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in "".join(printed) + caplog.text


def test_what_had_no_reply_is_named_and_asked_again_by_refine_alone(run, monkeypatch, capsys):
    monkeypatch.setenv("STRONG_KEY", SECRET)
    broken = [True]

    def reply(body, count):
        return Answer(b"", 422) if broken[0] and "rule 2 " in str(body).lower() else answer(body, count)

    with FakeChat(reply) as server:
        arguments = with_server(server, run, f"run_dir={run}/unfinished")
        assert main(["refine", *arguments]) == 0
        printed = capsys.readouterr().out
        assert "1 request(s) without a reply; `raft-jax refine` asks again" in printed
        rows = {row.id: row for row in load_refined(run / "unfinished/refined")}
        assert (rows["q02"].rewrite_status, rows["q02"].chosen) == ("failed", "gold")
        assert rows["q02"].rewrite_note == "HTTP 422, 1 try" and "HTTP 422" in rows["q02"].reason
        assert "no reply from the model" in printed
        broken[0], asked = False, len(server.asked)
        assert main(["refine", *arguments]) == 0
        assert "asking again for what had no reply" in capsys.readouterr().out
        rows = {row.id: row for row in load_refined(run / "unfinished/refined")}
        assert rows["q02"].chosen == "fusion" and len(server.asked) > asked
        assert all("rule 2 " in str(body).lower() for body in server.asked[asked:])
        asked = len(server.asked)
        assert main(["refine", *arguments]) == 0 and len(server.asked) == asked


def test_other_models_on_this_machine_fuse_and_judge(run, monkeypatch, capsys):
    """The student judges, and another folder with a model fuses; both are random, and no judgement is JSON."""
    monkeypatch.setattr("raft_jax.refine.roles.LOCAL_JUDGEMENT", 16)
    prompts = run / "short"
    prompts.mkdir()
    (prompts / "judge.txt").write_text("{{ texts }}")
    arguments = [str(run / "config.yaml"), f"run_dir={run}/local", f"refine.fuser={run}/model"]
    arguments += ["refine.judges=[likelihood,student]", f"refine.prompts={prompts}", "refine.max_new_tokens=48"]
    assert main(["refine", *arguments]) == 0
    rows = load_refined(run / "local/refined")
    candidates = [candidate for row in rows for candidate in row.rounds if candidate.scores]
    assert candidates
    for candidate in candidates:
        assert candidate.scores["likelihood"] is not None and candidate.scores["student"] is None
        assert candidate.reasons["student"].startswith("no score after 3 asks")
    printed = capsys.readouterr().out
    fuser = next(line.split() for line in printed.splitlines() if line.startswith("  fuser "))
    assert fuser[1] == f"{run}/model"
    ledger = (run / "local/refined/ledger.jsonl").read_bytes()
    (run / "local/refined/refined.jsonl").unlink()
    assert main(["refine", *arguments]) == 0 and (run / "local/refined/ledger.jsonl").read_bytes() == ledger
    assert load_refined(run / "local/refined") == rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["refine.fuser=strnog"], "refine.fuser is 'strnog'; allowed: student, a name of endpoints (strong)"),
        (["refine.judges=[strong,strong]"], "each once"),
        (["refine.fuser=models/none"], "refine.fuser: models/none: no such file or folder"),
        (["endpoints.bare.base_url=http://127.0.0.1:1/v1"], "no value for endpoints.bare.model"),
        (["endpoints.strong.base_url=http://me:pw123@127.0.0.1:1/v1"], "endpoints.strong.base_url is not shown"),
        (["endpoints.strong.base_url=http://127.0.0.1:1/v1"], "endpoints.strong.base_url: no answer from"),
        (["endpoints.strong.api_key_env=NOT_SET_HERE"], "the environment variable NOT_SET_HERE is not set"),
        ([f"endpoints.strong.api_key_env={SECRET}"], "endpoints.strong.api_key_env is not shown here"),
        (["endpoints.strong.concurrency=0"], "endpoints.strong.concurrency is 0; allowed: 1 or more"),
        (["refine.prompts=nowhere"], "refine.prompts: nowhere has none of rewrite.txt, fuse.txt"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_computed(run, monkeypatch, capsys, changes, message):
    monkeypatch.setenv("STRONG_KEY", SECRET)
    with FakeChat(answer) as server:
        for verb in ("check", "refine"):
            assert main([verb, *with_server(server, run, f"run_dir={run}/bad"), *changes]) == 2
            out, err = capsys.readouterr()
            assert message in err and err.count("\n") == 1 and "pw123" not in out + err and SECRET not in out + err
            assert not (run / "bad").exists() and not server.asked


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("fuse.txt", "Merge {{ answer }}.", "fuse.txt: has no {{ rewrite }}; put it where that text belongs"),
        (
            "judge.txt",
            "Judge {{ texts }} {{ candidate }}",
            "judge.txt: {{ candidate }} is not known; there are texts, question",
        ),
        ("rewrite.txt", "{% if %}", "rewrite.txt: not a template"),
        ("teacher.txt", b"\xff{{ answer }}{{ question }}", "teacher.txt: not UTF-8"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_one_line(run, tmp_path, capsys, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["refine", str(run / "config.yaml"), f"run_dir={run}/bad", f"refine.prompts={tmp_path}"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (run / "bad").exists()


def test_copied_prompts_are_not_replaced(tmp_path, capsys):
    assert main(["prompts", "--copy", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "fuse.txt",
        "judge.txt",
        "judge_open.txt",
        "rewrite.txt",
        "teacher.txt",
    ]
    assert main(["prompts", "--copy", str(tmp_path)]) == 2 and "is there already" in capsys.readouterr().err
    assert main(["prompts"]) == 0 and "Rewrite the input text" in capsys.readouterr().out
    assert main(["prompts", str(tmp_path)]) == 2


def test_user_prompts_are_used_and_a_row_s_own_system_turn_is_kept(tmp_path):
    from raft_jax.data.prompts import load_prompts

    (tmp_path / "rewrite.txt").write_text("Say it anew:\n---\n{{ answer }}!")
    (tmp_path / "teacher.txt").write_text("{{ question }} ({{ answer }})")
    prompts, turns = load_prompts(str(tmp_path)), [("system", "Be brief."), ("user", "Hello."), ("assistant", "Hi.")]
    system, *earlier, user = prompts.rewrite("So {{ it }}.", turns=turns)
    assert system["content"] == "Be brief.\n\nSay it anew:" and user["content"] == "So {{ it }}.!"
    assert [turn["content"] for turn in earlier] == ["Hello.", "Hi."]
    assert prompts.teacher("Why?", "So.") == [{"role": "user", "content": "Why? (So.)"}]
    assert prompts.fuse("a", "b") == load_prompts().fuse("a", "b") and prompts.digest("fuse") == load_prompts().digest(
        "fuse"
    )
