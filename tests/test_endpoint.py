"""The client of a chat server, against a server that fails in every way that servers do."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import threading
import traceback
from collections import Counter
from dataclasses import replace

import pytest
from fake_chat import Answer, FakeChat, says

from raft_jax import interrupt
from raft_jax.config import EndpointConfig
from raft_jax.errors import InputError
from raft_jax.refine.chat import Request
from raft_jax.refine.endpoint import Endpoint, Patience
from raft_jax.refine.limiter import SUCCESSES, Limiter, retry_after

SECRET = "sk-canary-7f3a9c"
QUICK = Patience(limited=6, transient=4, timeout=2, unreadable=2, first_delay=0.001, longest_delay=0.002, grace=2.0)
SCHEMA = {"type": "object"}


def requests(count: int, schema=None) -> list[Request]:
    return [Request([{"role": "user", "content": str(n)}], f"row {n}", n, 0.5, schema) for n in range(count)]


def ask(server: FakeChat, count=1, schema=None, patience=QUICK, name="strong", **settings):
    """The replies to `count` requests, in their order."""
    given = EndpointConfig(**{"base_url": server.base_url, "model": "big", "concurrency": 4, "timeout": 5.0} | settings)
    endpoint = Endpoint(name, given, patience)
    try:
        replies = {}
        for batch in endpoint.ask(requests(count, schema)):
            assert not replies.keys() & batch.keys()
            replies |= batch
        return [replies[index] for index in range(count)], endpoint
    finally:
        endpoint.close()


def number_of(body: dict) -> int:
    return int(body["messages"][-1]["content"])


def test_every_request_has_its_own_reply_and_says_what_it_took():
    with FakeChat(lambda body, count: says(f"reply {number_of(body)}")) as server:
        replies, endpoint = ask(server, 50, extra_body={"top_p": 0.9, "seed": None}, price_in=1.0, price_out=10.0)
        assert [reply.text for reply in replies] == [f"reply {n}" for n in range(50)]
        assert {reply.status for reply in replies} == {"ok"} and len(server.asked) == 50 and server.most <= 4
        body = next(body for body in server.asked if number_of(body) == 7)
        assert body == {
            "model": "big",
            "messages": [{"role": "user", "content": "7"}],
            "temperature": 0.5,
            "max_tokens": 4096,
            "top_p": 0.9,
        }
        first = replies[0]
        assert (first.prompt_tokens, first.num_tokens, first.finish, first.retries) == (10, 5, "stop", 0)
        assert first.seconds > 0 and endpoint.cost == pytest.approx(50 * (10 * 1 + 5 * 10) / 1e6)
        assert "authorization" not in server.headers[0]


HTML = b"<html><body><h1>502 Bad Gateway</h1></body></html>"
# The fault of the first answers, how often the same request comes at most, and what the failed reply says.
FAULTS = {
    "500": (Answer(b'{"error": {"message": "out of memory"}}', 500), 4, "HTTP 500 (out of memory), 4 tries"),
    "502": (Answer(HTML, 502), 4, "HTTP 502, 4 tries"),
    "408": (Answer(b"", 408), 4, "HTTP 408"),
    "409": (Answer(b"", 409), 4, "HTTP 409"),
    "429": (Answer(b"", 429), 6, "HTTP 429"),
    "429 with a number": (Answer(b"", 429, {"Retry-After": "0.01"}), 6, "HTTP 429"),
    "429 with a date": (Answer(b"", 429, {"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"}), 6, "HTTP 429"),
    "400": (Answer(b'{"error": {"message": "too long"}}', 400), 1, "HTTP 400 (too long), 1 try"),
    "422": (Answer(b'{"detail": "no"}', 422), 1, "HTTP 422"),
    "hang": (Answer(hang=True), 2, "no reply within 0.2 s (endpoints.strong.timeout)"),
    "cut in the body": (Answer(says("a text that is long enough").body, cut=30), 4, "RemoteProtocolError"),
    "cut before the body": (Answer(says("text").body, cut=0), 4, "RemoteProtocolError"),
    "JSON that ends early": (Answer(says("text").body[:-20]), 2, "not JSON"),
    "{}": (Answer(b"{}"), 2, "no choices[0].message in it"),
    "no choices": (Answer(b'{"choices": []}'), 2, "no choices[0].message in it"),
    "a list": (Answer(b"[]"), 2, "no choices[0].message in it"),
    "an error with 200": (Answer(b'{"error": {"message": "overloaded"}}'), 2, "overloaded"),
    "nothing": (Answer(b""), 2, "nothing in it"),
    "not UTF-8": (Answer(says("Ärger").body.replace(b"\\u00c4", b"\xc4")), 2, "not UTF-8"),
    "half a character": (Answer(says("\ud800").body), 2, "half a character"),
    "nested too deeply": (Answer(b"[" * 100_000), 2, "nested too deeply"),
    "10 MB": (Answer(says("x" * 10_000_000).body), 1, "a reply of more than 8 MiB"),
    "not gzip": (Answer(b"plain", headers={"Content-Encoding": "gzip"}), 2, "DecodingError"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("lasts", [False, True])
def test_a_fault_is_tried_again_so_often_and_then_named(fault, lasts):
    """One of five rows meets the fault: once, or for ever. The others never notice."""
    answer, tries, note = FAULTS[fault]

    def reply(body, count):
        return answer if number_of(body) == 2 and (lasts or count == 1) else says(f"reply {number_of(body)}")

    with FakeChat(reply) as server:
        replies, _ = ask(server, 5, timeout=0.2 if answer.hang else 5.0)
        counts = Counter(map(number_of, server.asked))
    assert [reply.text for reply in replies[:2] + replies[3:]] == ["reply 0", "reply 1", "reply 3", "reply 4"]
    assert all(counts[n] == 1 for n in (0, 1, 3, 4))
    if lasts or tries == 1:
        assert (replies[2].status, replies[2].text) == ("failed", "") and note in replies[2].note
        assert counts[2] == tries
    else:
        assert (replies[2].status, replies[2].text, replies[2].retries) == ("ok", "reply 2", 1)
        assert counts[2] == 2


UNUSABLE = {
    "empty": (says(""), "empty", ""),
    "blank": (says(" \n "), "empty", ""),
    "null": (says(None), "empty", ""),
    "cut": (says("A text that is", "length"), "truncated", "A text that is"),
    "filtered": (says("", "content_filter"), "refusal", ""),
    "thoughts that do not end": (says("<think>Well, I"), "truncated", ""),
    "thoughts and no answer": (says("<think>Well.</think>\n"), "empty", ""),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_reply_without_an_answer_is_none_and_is_not_asked_for_again(case):
    answer, status, text = UNUSABLE[case]
    with FakeChat(lambda body, count: answer) as server:
        (reply,), _ = ask(server)
        assert (reply.status, reply.text) == (status, text) and reply.note and len(server.asked) == 1


def test_thoughts_and_parts_are_read_as_their_answer():
    texts = ["<think>Hm. No.</think>\n\nYes.", "no start</think>Yes.", [{"type": "text", "text": "Yes."}]]
    with FakeChat(lambda body, count: says(texts[number_of(body)], None)) as server:
        replies, _ = ask(server, 3)
        assert [(reply.text, reply.status) for reply in replies] == [("Yes.", "ok")] * 3


@pytest.mark.parametrize(
    ("answer", "key", "message"),
    [
        (
            Answer(f'{{"error": {{"message": "bad key {SECRET}"}}}}'.encode(), 401),
            True,
            "api_key_env: .*HTTP 401 .bad key",
        ),
        (Answer(b"", 403), True, "api_key_env: .*HTTP 403; check the key in TEST_KEY"),
        (Answer(b"", 401), False, "api_key_env: .*set it to the name of the environment variable"),
        (Answer(b'{"error": {"message": "no model big"}}', 404), False, r"strong\.model: .*no model big.*'big'"),
        (Answer(b"", 307, {"Location": "http://192.0.2.1/"}), True, r"strong\.base_url: .*a redirect; set the address"),
    ],
)
def test_settings_that_no_request_survives_stop_the_run_at_once(answer, key, message, monkeypatch):
    monkeypatch.setenv("TEST_KEY", SECRET)
    with FakeChat(lambda body, count: answer) as server:
        with pytest.raises(InputError, match=message) as caught:
            ask(server, 40, api_key_env="TEST_KEY" if key else None)
        assert len(server.asked) <= 4  # those in flight
        assert "\n" not in str(caught.value) and SECRET not in "".join(traceback.format_exception(caught.value))
        assert SECRET not in repr(caught.value)


def test_a_server_that_dies_stops_the_run_after_some_requests_and_what_came_is_kept():
    with FakeChat(lambda body, count: says("so") if number_of(body) < 10 else Answer(b"", 503)) as server:
        endpoint = Endpoint("strong", EndpointConfig(server.base_url, "big", concurrency=4), QUICK)
        got = {}
        with pytest.raises(
            InputError, match=r"endpoints\.strong: 8 requests in a row without a reply .*HTTP 503, 4 tries"
        ):
            for batch in endpoint.ask(requests(500)):
                got |= batch
        endpoint.close()
        assert {index for index, reply in got.items() if reply.status == "ok"} == set(range(10))
        assert len(server.asked) <= 10 + (8 + 4) * 4


def test_rows_that_are_refused_one_by_one_do_not_stop_the_others():
    with FakeChat(lambda body, count: says("so") if number_of(body) % 20 == 0 else Answer(b"", 400)) as server:
        replies, _ = ask(server, 100, concurrency=1)
        assert [reply.status for reply in replies].count("ok") == 5 and len(server.asked) == 100


def test_bursts_of_429_lower_the_concurrency_and_every_row_is_answered():
    """A server that takes three requests at a time, and says so to the others."""

    def reply(body, count):
        return says(str(number_of(body)), delay=0.005) if server.in_flight <= 3 else Answer(b"", 429)

    with FakeChat(reply) as server:
        patience = replace(QUICK, limited=24, first_delay=0.005, longest_delay=0.05)
        replies, endpoint = ask(server, 200, concurrency=32, patience=patience)
        assert [reply.text for reply in replies] == [str(n) for n in range(200)]
        assert endpoint.limit < 32
        assert Counter(map(number_of, server.answered)) == Counter(range(200))


def test_the_limit_falls_once_per_burst_rises_with_successes_and_retry_after_pauses():
    now = [0.0]

    async def play():
        limiter = Limiter(8, clock=lambda: now[0])
        async with limiter.slot() as first, limiter.slot() as second:
            limiter.limited(first, None)
            limiter.limited(second, None)
        assert limiter.limit == 6
        async with limiter.slot() as third:
            limiter.limited(third, None)
        assert limiter.limit == 4
        for _ in range(SUCCESSES - 1):
            limiter.succeeded()
        assert limiter.limit == 4
        limiter.succeeded()
        assert limiter.limit == 5
        for _ in range(SUCCESSES * 20):
            limiter.succeeded()
        assert limiter.limit == 8
        limiter.limited(-1, 1000.0)  # of an old burst: a pause alone
        assert limiter.limit == 8
        waiting = asyncio.ensure_future(limiter.slot().__aenter__())
        await asyncio.sleep(0)
        assert not waiting.done() and limiter.in_flight == 0
        waiting.cancel()
        now[0] = 120.5  # no longer than two minutes
        async with limiter.slot():
            assert limiter.in_flight == 1
        for _ in range(20):
            async with limiter.slot() as burst:
                limiter.limited(burst, None)
        assert limiter.limit == 1

    asyncio.run(play())


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("3", 3.0),
        ("-1", None),
        ("nan", None),
        ("inf", None),
        ("", None),
        ("soon", None),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 90.0),
    ],
)
def test_retry_after(value, seconds):
    assert retry_after(value, now=10.0) == seconds


def test_retry_after_holds_up_the_requests_of_everyone():
    """The second request waits, too: nothing comes within the pause after a 429."""
    times = []

    def reply(body, count):
        times.append(asyncio.get_running_loop().time())
        return Answer(b"", 429, {"Retry-After": "0.3"}) if len(times) == 1 else says("so")

    with FakeChat(reply) as server:
        replies, _ = ask(server, 3, concurrency=1)
        assert all(reply.status == "ok" for reply in replies) and len(times) == 4
        assert times[1] - times[0] >= 0.28


@pytest.mark.parametrize("refusal", [Answer(b'{"error": "response_format is not supported"}', 400), None])
def test_whether_a_server_takes_a_schema_is_found_out_once(refusal):
    def reply(body, count):
        return refusal if refusal and "response_format" in body else says(str(number_of(body)))

    with FakeChat(reply) as server:
        replies, _ = ask(server, 20, SCHEMA)
        assert [reply.text for reply in replies] == [str(n) for n in range(20)]
        with_schema = [body for body in server.asked if "response_format" in body]
        assert (len(with_schema), len(server.asked)) == ((1, 21) if refusal else (20, 20))
        assert with_schema[0]["response_format"]["json_schema"]["schema"] == SCHEMA


def test_a_request_that_is_refused_anyway_says_nothing_about_schemas():
    with FakeChat(lambda body, count: Answer(b"", 400) if number_of(body) == 0 else says("so")) as server:
        replies, _ = ask(server, 6, SCHEMA, concurrency=1)
        assert [reply.status for reply in replies] == ["failed"] + ["ok"] * 5
        assert sum("response_format" in body for body in server.asked) == 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_what_is_in_flight_finish(number):
    """Three requests are answered late, a fourth never; nothing is sent after the signal."""
    sent = threading.Event()

    def reply(body, count):
        if number_of(body) == 3:
            sent.set()
        return Answer(hang=True) if number_of(body) == 3 else says("so", delay=0.5)

    with FakeChat(reply) as server:
        endpoint = Endpoint("strong", EndpointConfig(server.base_url, "big", concurrency=4), replace(QUICK, grace=1.5))
        got = {}
        with interrupt.handled():
            kill = threading.Thread(target=lambda: sent.wait(10) and os.kill(os.getpid(), number))
            kill.start()
            with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
                for batch in endpoint.ask(requests(100)):
                    interrupt.check()  # as a progress bar does: not yet
                    got |= batch
            kill.join()
        endpoint.close()
        assert sorted(got) == [0, 1, 2] and len(server.asked) == 4


def test_the_key_is_sent_and_is_in_no_log_and_no_error(monkeypatch, caplog, capsys):
    monkeypatch.setenv("TEST_KEY", f" {SECRET}\n")
    caplog.set_level(logging.DEBUG)

    def reply(body, count):
        if number_of(body) == 0:
            return says(f"Your key is {SECRET}.")
        return Answer(json.dumps({"error": {"message": f"{SECRET} is too poor"}}).encode(), 400)

    with FakeChat(reply) as server:
        replies, endpoint = ask(server, 2, api_key_env="TEST_KEY", concurrency=1)
        assert {headers["authorization"] for headers in server.headers} == {f"Bearer {SECRET}"}
    assert replies[0].text == "Your key is [the key]." and "[the key] is too poor" in replies[1].note
    shown = repr((replies, endpoint, endpoint.identity, endpoint.settings)) + caplog.text + str(capsys.readouterr())
    assert SECRET not in shown


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(monkeypatch):
    with FakeChat(lambda body, count: Answer(b"", 502)) as proxy, FakeChat(lambda body, count: says("so")) as server:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        (reply,), _ = ask(server)
        assert reply.text == "so" and not proxy.paths
        # Elsewhere it is.
        (reply,), _ = ask(proxy, base_url="http://server.invalid/v1")
        assert reply.status == "failed" and "HTTP 502" in reply.note and proxy.paths


@pytest.mark.parametrize("proxy", ["ftp://127.0.0.1:1", "socks5://127.0.0.1:1"])
def test_a_proxy_that_cannot_be_used_is_one_line(monkeypatch, proxy):
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.setenv("HTTP_PROXY", proxy)
    endpoint = Endpoint("strong", EndpointConfig("http://server.invalid/v1", "big"), QUICK)
    with pytest.raises(InputError, match="the proxy of the environment cannot be used"):
        list(endpoint.ask(requests(1)))


def test_a_missing_key_and_a_silent_server_are_named_before_anything_is_asked(monkeypatch):
    monkeypatch.delenv("TEST_KEY", raising=False)
    with pytest.raises(
        InputError, match=r"endpoints\.strong\.api_key_env: the environment variable TEST_KEY is not set"
    ):
        Endpoint("strong", EndpointConfig("http://127.0.0.1:1/v1", "big", api_key_env="TEST_KEY"))
    silent = Endpoint("strong", EndpointConfig("http://127.0.0.1:1/v1", "big"), QUICK)
    with pytest.raises(
        InputError, match=r"endpoints\.strong\.base_url: no answer from http://127.0.0.1:1/v1 \(ConnectError"
    ):
        silent.require_answer()
    monkeypatch.setenv("TEST_KEY", SECRET)
    for status, refused in ((401, True), (404, False), (500, False)):
        with FakeChat(lambda body, count: says("so"), models=Answer(b"", status)) as server:
            endpoint = Endpoint("strong", EndpointConfig(server.base_url, "big", api_key_env="TEST_KEY"), QUICK)
            if refused:
                with pytest.raises(InputError, match="api_key_env"):
                    endpoint.require_answer()
            else:
                endpoint.require_answer()
            endpoint.close()
            assert server.paths == {"/v1/models": 1} and not server.asked
