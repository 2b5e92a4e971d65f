"""A model behind OpenAI's chat completions: sends requests, limits and repeats them, and reads the replies."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import json
import os
import queue
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from raft_jax import interrupt
from raft_jax.config import EndpointConfig
from raft_jax.errors import InputError, require_train
from raft_jax.refine.chat import FAILED, REFUSED, Reply, Request
from raft_jax.refine.limiter import LONGEST_PAUSE, Limiter, retry_after
from raft_jax.refine.wire import Unreadable, complaint_of, read_reply
from raft_jax.terminal import one_line

LARGEST_REPLY = 8 << 20  # bytes
GATHER = 0.01  # seconds in which further replies are recorded together: each record waits for the disk
POOL = 8  # connections of one of httpx2's clients, which looks at all of them before each request
STOP = (401, 403, 404)  # answers that mean that the settings are wrong, for every request alike


@dataclass(frozen=True)
class Patience:
    """How often a request is tried, and how long is waited.

    Attributes:
      limited: tries that end in 429.
      transient: tries that end in a connection error, 408, 409 or 5xx.
      timeout: tries that take longer than the endpoint's `timeout`.
      unreadable: tries that end in a reply that is none, such as JSON that is cut.
      first_delay: seconds before the second try, doubled with each further one.
      longest_delay: seconds.
      give_up_after: requests without a reply in a row that stop the run.
      grace: seconds that requests in flight have after Ctrl-C or SIGTERM.
    """

    limited: int = 24
    transient: int = 6
    timeout: int = 2
    unreadable: int = 2
    first_delay: float = 0.5
    longest_delay: float = 30.0
    give_up_after: int = 8
    grace: float = 5.0


class Failure(NamedTuple):
    """A try without a reply: a field of `Patience`, or "refused" for one that is not repeated; why; seconds to wait."""

    kind: str
    note: str
    retry_after: float | None = None


@dataclass
class Usage:
    """What an endpoint has been asked by this process."""

    replies: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    num_tokens: int = 0


class Stopped(Exception):
    """A signal asked the process to stop while a request was waiting for its next try."""


class Endpoint:
    """A model on a server; a `Chat`.

    Requests are sent by a thread of its own, so that a notebook's event loop is not in the way and writing a ledger
    does not hold them up. Every request ends: with a reply, or with one of status "failed" that says why.

    Raises:
      InputError: the environment variable of the key is not set.

    Example:
      >>> endpoint = Endpoint("strong", EndpointConfig(base_url="http://127.0.0.1:8000/v1", model="Qwen3-32B"))
      >>> endpoint.url
      'http://127.0.0.1:8000/v1/chat/completions'
    """

    def __init__(self, name: str, settings: EndpointConfig, patience: Patience | None = None):
        require_train("httpx2")
        self.name, self.settings, self.patience = name, settings, patience or Patience()
        self.model, self.temperature = settings.model, settings.temperature
        # Where extra_body sets limits of its own, it is not known which of them would have to be raised.
        limited = {"max_tokens", "max_completion_tokens"} & settings.extra_body.keys()
        self.max_tokens = None if limited else settings.max_tokens
        self.url = settings.base_url.rstrip("/") + "/chat/completions"
        kept = {"model": settings.model, "max_tokens": settings.max_tokens, "extra_body": settings.extra_body}
        self.identity = json.dumps(kept, sort_keys=True, ensure_ascii=False)
        self.usage = Usage()
        self._key = key_of(name, settings)
        self._limiter = Limiter(settings.concurrency)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._takes_schema: bool | None = None
        self._without_reply = 0  # requests in a row that got none

    @property
    def cost(self) -> float | None:
        """What the replies so far cost; None without prices."""
        return cost_of(self.settings, self.usage.prompt_tokens, self.usage.num_tokens)

    @property
    def in_flight(self) -> int:
        return self._limiter.in_flight

    @property
    def limit(self) -> int:
        """Requests that may be in flight now."""
        return self._limiter.limit

    def note(self) -> str:
        return f"{self.in_flight} in flight, {self.usage.retries} retries"

    # The side of the caller's thread.

    def ask(self, requests: Sequence[Request]) -> Iterator[dict[int, Reply]]:
        """Yields replies, keyed by the index of their request, as they come.

        After Ctrl-C or SIGTERM (inside `interrupt.handled`) nothing more is sent, the replies that come within
        `Patience.grace` seconds are yielded, and KeyboardInterrupt is raised.

        Raises:
          InputError: the server refuses the key or the model, redirects, or has given no reply several times in a row;
            names the setting. Replies that had come are yielded first.
        """
        if not requests:
            return
        replies: queue.SimpleQueue[tuple[int, Reply]] = queue.SimpleQueue()
        loop = self._started()
        stop = asyncio.Event()
        future = asyncio.run_coroutine_threadsafe(self._ask_all(requests, replies, stop), loop)
        stop_at = None
        with interrupt.deferred():
            try:
                while not (future.done() and replies.empty()):
                    if batch := _drain(replies):
                        yield batch
                    if stop_at is None and interrupt.requested():
                        stop_at = time.monotonic() + self.patience.grace
                        loop.call_soon_threadsafe(stop.set)
                    if stop_at is not None and time.monotonic() > stop_at:
                        break
            finally:
                future.cancel()
        interrupt.check()
        if not future.cancelled() and (error := future.exception()):
            raise error

    def _started(self) -> asyncio.AbstractEventLoop:
        """The running event loop of the thread that sends; starts both at the first call."""
        if self._loop is None:
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name=f"endpoint {self.name}", daemon=True).start()
            asyncio.run_coroutine_threadsafe(self._open(), loop).result()
            self._loop = loop
        return self._loop

    def close(self) -> None:
        """Ends the connections and the thread; a later `ask` starts them again."""
        if self._loop is not None:
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None

    def require_answer(self) -> None:
        """Asks the server for its list of models, which costs nothing.

        Raises:
          InputError: it cannot be reached, or refuses the key. A server without such a list passes.
        """
        asyncio.run_coroutine_threadsafe(self._require_answer(), self._started()).result()

    # The side of the thread that sends.

    async def _open(self) -> None:
        import httpx2

        try:
            self._address = httpx2.URL(self.url)
        except httpx2.InvalidURL as error:
            raise InputError(
                f"endpoints.{self.name}.base_url: {self.settings.base_url} is no address ({error})"
            ) from error
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        settings: dict[str, Any] = {
            "headers": {**headers, "User-Agent": "raft-jax"},
            "timeout": httpx2.Timeout(None, connect=10.0),
            "limits": httpx2.Limits(max_connections=None, max_keepalive_connections=POOL),
            # A proxy of the environment cannot reach this machine's own servers.
            "trust_env": not _is_loopback(self._address.host),
            "verify": httpx2.create_ssl_context(),
        }
        try:
            pools = range(-(-self.settings.concurrency // POOL))
            self._clients = [httpx2.AsyncClient(**settings) for _ in pools]
        except (ValueError, ImportError) as error:
            raise InputError(
                f"endpoints.{self.name}.base_url: the proxy of the environment cannot be used ({error}); "
                "change HTTPS_PROXY or HTTP_PROXY, or name the server's host in NO_PROXY"
            ) from error
        sent = {"Content-Type": "application/json", "Host": self._address.netloc.decode("ascii")}
        self._headers = httpx2.Headers({**self._clients[0].headers, **sent})
        self._turns = itertools.cycle(self._clients)
        self._asking_for_schema = asyncio.Lock()

    async def _close(self) -> None:
        for client in self._clients:
            await client.aclose()

    async def _require_answer(self) -> None:
        import httpx2

        url = self.settings.base_url.rstrip("/") + "/models"
        try:
            async with (
                asyncio.timeout(min(30.0, self.settings.timeout)),
                self._clients[0].stream("GET", url) as response,
            ):
                status = response.status_code
        except (httpx2.HTTPError, TimeoutError) as error:
            raise InputError(
                f"endpoints.{self.name}.base_url: no answer from {self.settings.base_url} "
                f"({self._redacted(_named(error))}); start the server, or change the address"
            ) from None
        if status in (401, 403):
            raise self._refusal(status, "")

    async def _ask_all(self, requests: Sequence[Request], replies: queue.SimpleQueue, stop: asyncio.Event) -> None:
        waiting = iter(enumerate(requests))

        async def work() -> None:
            with contextlib.suppress(Stopped):
                for index, request in waiting:
                    if stop.is_set():
                        return
                    replies.put((index, await self._reply_to(request, stop)))

        workers = [asyncio.ensure_future(work()) for _ in range(min(self.settings.concurrency, len(requests)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _reply_to(self, request: Request, stop: asyncio.Event) -> Reply:
        """Tries a request until there is a reply or no try is left."""
        began, tries = time.perf_counter(), 0
        left = {kind: getattr(self.patience, kind) for kind in ("limited", "transient", "timeout", "unreadable")}
        while True:
            reply = await self._try(request)
            if isinstance(reply, Reply):
                self._without_reply = 0
                self.usage.replies += 1
                self.usage.prompt_tokens += reply.prompt_tokens
                self.usage.num_tokens += reply.num_tokens
                return replace(reply, seconds=time.perf_counter() - began, retries=tries)
            tries += 1
            left[reply.kind] = left.get(reply.kind, 0) - 1
            if left[reply.kind] <= 0:
                return self._failed(request, reply, tries, time.perf_counter() - began)
            self.usage.retries += 1
            delay = min(self.patience.first_delay * 2 ** (tries - 1), self.patience.longest_delay)
            await _sleep(max(delay * random.uniform(0.5, 1.0), reply.retry_after or 0.0), stop)

    def _failed(self, request: Request, failure: Failure, tries: int, seconds: float) -> Reply:
        """The reply that says why there is none. Raises InputError if that is so again and again."""
        # A request that alone is refused, such as one that is too long, is no reason to stop others.
        refused = failure.kind == "refused"
        if not refused or not (self.usage.replies or request.max_tokens):
            self._without_reply += 1
        note = f"{failure.note}, {tries} {'try' if tries == 1 else 'tries'}"
        if self._without_reply >= self.patience.give_up_after:
            raise InputError(
                f"endpoints.{self.name}: {self._without_reply} requests in a row without a reply (the last: {note}); "
                "see to the server or these settings, then the same command goes on from here"
            )
        return Reply("", FAILED, note, seconds=seconds, finish=REFUSED if refused else "", retries=tries - 1)

    async def _try(self, request: Request) -> Reply | Failure:
        """One try; with a schema, as often as it takes to find out whether the server takes schemas."""
        if request.schema is None or self._takes_schema is False:
            return await self._send(request, False)
        if self._takes_schema:
            return await self._send(request, True)
        async with self._asking_for_schema:
            if self._takes_schema is None:
                reply = await self._send(request, True)
                if isinstance(reply, Reply):
                    self._takes_schema = True
                if not isinstance(reply, Failure) or reply.kind != "refused":
                    return reply
                reply = await self._send(request, False)
                if isinstance(reply, Reply):
                    self._takes_schema = False
                return reply
        return await self._try(request)

    async def _send(self, request: Request, with_schema: bool) -> Reply | Failure:
        import httpx2

        body = json.dumps(self._body(request, with_schema), ensure_ascii=False).encode()
        post = httpx2.Request("POST", self._address, headers=self._headers, content=body)
        async with self._limiter.slot() as burst:
            try:
                async with asyncio.timeout(self.settings.timeout):
                    response = await next(self._turns).send(post, stream=True)
                    try:
                        content = await _content(response)
                    finally:
                        await response.aclose()
            except TimeoutError:
                return Failure(
                    "timeout", f"no reply within {self.settings.timeout:g} s (endpoints.{self.name}.timeout)"
                )
            except httpx2.DecodingError as error:
                return Failure("unreadable", self._redacted(_named(error)))
            except httpx2.HTTPError as error:
                return Failure("transient", self._redacted(_named(error)))
            status, wait = response.status_code, retry_after(response.headers.get("retry-after"))
            if status == 429:
                self._limiter.limited(burst, wait)
            elif status >= 500:
                self._limiter.pause(wait)
            elif content is not None and 200 <= status < 300:
                self._limiter.succeeded()
        return self._read(status, content, wait and min(wait, LONGEST_PAUSE))

    def _read(self, status: int, content: bytes | None, wait: float | None) -> Reply | Failure:
        """The reply of an answer. Raises InputError if no request will get one with these settings."""
        if 200 <= status < 300:
            if content is None:
                return Failure("refused", f"a reply of more than {LARGEST_REPLY >> 20} MiB")
            try:
                reply = read_reply(content)
            except Unreadable as error:
                return Failure("unreadable", self._redacted(f"an unreadable reply: {error}"))
            # A server may repeat a request's headers.
            return replace(reply, text=self._without_key(reply.text), finish=self._redacted(reply.finish))
        complaint = self._redacted(complaint_of(content or b""))
        said = f"HTTP {status}{f' ({complaint})' if complaint else ''}"
        if status in STOP or 300 <= status < 400:
            raise self._refusal(status, complaint)
        if status == 429:
            return Failure("limited", said, wait)
        return Failure("transient" if status in (408, 409) or status >= 500 else "refused", said, wait)

    def _body(self, request: Request, with_schema: bool) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": request.messages,
            "temperature": request.temperature,
            "max_tokens": request.max_tokens or self.settings.max_tokens,
            "seed": request.seed,
        }
        if with_schema:
            schema = {"name": "reply", "strict": True, "schema": request.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return {key: value for key, value in (body | self.settings.extra_body).items() if value is not None}

    def _refusal(self, status: int, complaint: str) -> InputError:
        said = f"{self.settings.base_url} answers HTTP {status}{f' ({complaint})' if complaint else ''}"
        key = f"endpoints.{self.name}"
        if 300 <= status < 400:
            return InputError(f"{key}.base_url: {said}, a redirect; set the address that it leads to")
        if status == 404:
            return InputError(f"{key}.model: {said}; check {key}.model {self.model!r} and {key}.base_url")
        if not self._key:
            return InputError(f"{key}.api_key_env: {said}; set it to the name of the environment variable with the key")
        return InputError(f"{key}.api_key_env: {said}; check the key in {self.settings.api_key_env}")

    def _redacted(self, text: str) -> str:
        return one_line(self._without_key(text), 200)

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "[the key]") if self._key else text


def key_of(name: str, settings: EndpointConfig) -> str:
    """The key of an endpoint; "" if it has none.

    Raises:
      InputError: its environment variable is not set, or holds what cannot be sent in a header.
    """
    if settings.api_key_env is None:
        return ""
    key = os.environ.get(settings.api_key_env, "").strip()
    setting = f"endpoints.{name}.api_key_env"
    if not key:
        raise InputError(f"{setting}: the environment variable {settings.api_key_env} is not set; put the key into it")
    if not (key.isascii() and key.isprintable()):
        raise InputError(f"{setting}: the key in {settings.api_key_env} has characters that no header can carry")
    return key


def cost_of(settings: EndpointConfig, prompt_tokens: int, num_tokens: int) -> float | None:
    """The price of some tokens; None without prices.

    Example:
      >>> cost_of(EndpointConfig("http://h", "m", price_in=1.0, price_out=4.0), 500_000, 250_000)
      1.5
    """
    if settings.price_in is None and settings.price_out is None:
        return None
    return (prompt_tokens * (settings.price_in or 0) + num_tokens * (settings.price_out or 0)) / 1e6


def _drain(replies: queue.SimpleQueue[tuple[int, Reply]]) -> dict[int, Reply]:
    """All replies that there are; waits a moment for the first, and a shorter one for others to be recorded with it."""
    batch = {}
    with contextlib.suppress(queue.Empty):
        index, reply = replies.get(timeout=0.1)
        batch[index] = reply
        time.sleep(GATHER)
        while True:
            index, reply = replies.get_nowait()
            batch[index] = reply
    return batch


async def _content(response) -> bytes | None:
    """The body of a response; None if it is larger than `LARGEST_REPLY`."""
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > LARGEST_REPLY:
            return None
    return bytes(content)


async def _sleep(seconds: float, stop: asyncio.Event) -> None:
    """Waits; raises Stopped if the process is asked to stop meanwhile."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)
    if stop.is_set():
        raise Stopped


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _is_loopback(host: str) -> bool:
    """Whether a host is this machine, by its name or address."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
