"""How many requests a second the client of endpoints handles, beside what the same server gives a bare client.

    python benchmarks/endpoint_overhead.py [--seconds 0.05] [--concurrency 64] [--requests 6400]

The server is a process of its own on loopback that answers each request after a fixed time, so concurrency / seconds is
the most that any client can reach. The bare client sends the same bytes over as many connections and reads only the
length of each reply; then httpx2, which our client is made of, without anything of ours; then our client, whose results
are written to a ledger in a temporary folder, as the refinement does.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

TEXT = "A boat on port tack keeps clear of a boat on starboard tack. " * 8
REPLY = json.dumps(
    {
        "choices": [{"message": {"role": "assistant", "content": TEXT}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 200, "completion_tokens": 120},
    }
).encode()
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(REPLY) + REPLY


def serve(seconds: float, port) -> None:
    """Answers every request after some seconds; sends its port through the pipe."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
                await reader.readexactly(int(length.partition(b":")[2]))
                await asyncio.sleep(seconds)
                writer.write(ANSWER)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def main() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


def bare(port: int, bodies: list[bytes], concurrency: int) -> float:
    """Seconds that a client without any checks takes."""

    async def work(waiting) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for body in waiting:
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
            writer.write(head + body)
            await reader.readexactly(len(ANSWER))
        writer.close()

    async def main() -> None:
        waiting = iter(bodies)
        await asyncio.gather(*(work(waiting) for _ in range(concurrency)))

    began = time.perf_counter()
    asyncio.run(main())
    return time.perf_counter() - began


def httpx2_alone(port: int, bodies: list[bytes], concurrency: int) -> float:
    """Seconds that httpx2 takes, without limits, retries, reading or recording: what a client made of it can reach."""
    import httpx2

    async def main() -> None:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=8)
        clients = [
            httpx2.AsyncClient(trust_env=False, timeout=None, limits=limits) for _ in range(-(-concurrency // 8))
        ]
        turns, waiting = itertools.cycle(clients), iter(bodies)
        url, headers = httpx2.URL(f"http://127.0.0.1:{port}/v1/chat/completions"), httpx2.Headers({"Host": "x"})

        async def work() -> None:
            for body in waiting:
                await next(turns).send(httpx2.Request("POST", url, headers=headers, content=body))

        await asyncio.gather(*(work() for _ in range(concurrency)))

    began = time.perf_counter()
    asyncio.run(main())
    return time.perf_counter() - began


def ours(port: int, count: int, concurrency: int, folder: Path) -> float:
    """Seconds that the client of endpoints takes, with each reply in a ledger."""
    from raft_jax.config import EndpointConfig
    from raft_jax.refine.chat import Request
    from raft_jax.refine.endpoint import Endpoint
    from raft_jax.refine.ledger import Ledger

    endpoint = Endpoint("fake", EndpointConfig(f"http://127.0.0.1:{port}/v1", "fake", concurrency=concurrency))
    ledger = Ledger.open(folder / "ledger.jsonl")
    requests = [Request([{"role": "user", "content": f"{n} {TEXT}"}], str(n), n, 0.7) for n in range(count)]
    began, done = time.perf_counter(), 0
    for replies in endpoint.ask(requests):
        done += len(replies)
        ledger.append(
            [
                {"stage": "fuse", "key": str(index), "text": reply.text, **reply.record()}
                for index, reply in replies.items()
            ]
        )
    seconds = time.perf_counter() - began
    endpoint.close()
    assert done == count == len(ledger.records()) and endpoint.usage.retries == 0
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=0.05)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--requests", type=int, default=6400)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    server = context.Process(target=serve, args=(args.seconds, sender), daemon=True)
    server.start()
    port = receiver.recv()
    bodies = [
        json.dumps({"messages": [{"role": "user", "content": f"{n} {TEXT}"}]}).encode() for n in range(args.requests)
    ]
    try:
        with tempfile.TemporaryDirectory() as folder:
            for number in range(2):
                for name, client in (("bare", bare), ("httpx2 alone", httpx2_alone), ("ours", ours)):
                    given = (port, args.requests, args.concurrency, Path(folder) / str(number))
                    cpu = time.process_time()
                    seconds = client(*given) if client is ours else client(port, bodies, args.concurrency)
                    cpu = (time.process_time() - cpu) / args.requests
                    print(
                        f"{name:12} {args.requests / seconds:8.0f} requests/s, {1e3 * cpu:.2f} ms of CPU each",
                        flush=True,
                    )
        print(f"{'at most':12} {args.concurrency / args.seconds:8.0f} requests/s")
    finally:
        server.terminate()
        server.join()


if __name__ == "__main__":
    main()
