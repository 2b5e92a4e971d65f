"""A server with OpenAI's chat completions on loopback that counts what it is asked and fails as it is told to."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """What the server does with one request; `cut` closes the connection after so many bytes of the body."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: int | None = None
    hang: bool = False


def says(text: Any, finish: str | None = "stop", **answer) -> Answer:
    """A chat completion with a text."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    return Answer(json.dumps({"choices": [choice], "usage": usage}).encode(), **answer)


class FakeChat:
    """Runs in a thread of its own; `with FakeChat(reply) as server` stops it.

    `reply(body, count)` is called with each request's body and how often an equal one has come, counted from 1.

    Attributes:
      asked: the bodies of the chat requests in the order of their coming.
      headers: the headers of each of them.
      paths: how often each path was asked for.
      answered: the bodies of requests whose answer was sent whole, with status 200.
      most: the most requests that were in flight at once.
    """

    def __init__(self, reply: Callable[[dict, int], Answer], models: Answer | None = None):
        self.reply, self.models = reply, models or Answer(b'{"data": []}')
        self.asked: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.paths: Counter[str] = Counter()
        self.answered: list[dict] = []
        self.in_flight = self.most = 0
        self._counts: Counter[str] = Counter()
        self._loop = asyncio.new_event_loop()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> FakeChat:
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        start = asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 24)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result()
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _stop(self) -> None:
        self._server.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._answer(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answers one request; returns whether the connection stays open."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        self.paths[path] += 1
        if method == "GET":
            return await self._send(writer, self.models)
        body = json.loads(content)
        self.asked.append(body)
        self.headers.append(headers)
        self._counts[key := json.dumps(body, sort_keys=True)] += 1
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            answer = self.reply(body, self._counts[key])
            await asyncio.sleep(answer.delay)
            if answer.hang:
                await reader.read()  # until the client goes away
                return False
            kept = await self._send(writer, answer)
            if kept and answer.status == 200:
                self.answered.append(body)
            return kept
        finally:
            self.in_flight -= 1

    async def _send(self, writer: asyncio.StreamWriter, answer: Answer) -> bool:
        headers = {"Content-Type": "application/json", "Content-Length": str(len(answer.body)), **answer.headers}
        lines = [f"HTTP/1.1 {answer.status} Whatever", *(f"{name}: {value}" for name, value in headers.items())]
        writer.write("\r\n".join([*lines, "", ""]).encode() + answer.body[: answer.cut])
        await writer.drain()
        return answer.cut is None
