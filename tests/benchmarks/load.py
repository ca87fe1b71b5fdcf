"""A load generator in a process of its own: keep-alive clients that send requests that are ready-made bytes.

Reads one JSON line from stdin, writes one to stdout.
"""

import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, cast

import uvloop


@dataclass
class Job:
    """What to send. Each request is sent once, unless `repeat_seconds` says to go around until then."""

    port: int
    requests: list[dict[str, Any]]
    clients: int = 64
    repeat_seconds: float = 0.0


@dataclass
class Result:
    """What came of it. `cpu` is the generator's own share of one core: near 1.0 it was the limit itself."""

    seconds: float
    answers: int
    statuses: dict[str, int]
    latencies_ms: list[float] = field(repr=False)
    cpu: float = 0.0

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.answers / self.seconds


def encode(request: dict[str, Any], port: int) -> bytes:
    """Return a request as HTTP/1.1."""
    body = request.get("body")
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{request['method']} {request['path']} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
    if request.get("authorization"):
        head += f"Authorization: {request['authorization']}\r\n"
    if content:
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    return head.encode() + b"\r\n" + content


class _Connection(asyncio.Protocol):
    """One client: sends its next request when the last one's answer is complete."""

    def __init__(self, source: "_Source", done: asyncio.Future[None]) -> None:
        self._source = source
        self._done = done
        self._buffer = bytearray()
        self._sent_at = 0.0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's own is one in all but name.
        self._transport = cast("asyncio.Transport", transport)
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._done.set_exception(exc or ConnectionError("closed"))

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        end = buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(buffer[:end]).lower()
        start = head.index(b"content-length:") + 15
        length = int(head[start : head.find(b"\r", start) if b"\r" in head[start:] else len(head)])
        if len(buffer) < end + 4 + length:
            return
        self._source.answered(bytes(buffer[9:12]), time.perf_counter() - self._sent_at)
        del buffer[: end + 4 + length]
        self._send()

    def _send(self) -> None:
        request = self._source.take()
        assert self._transport is not None
        if request is None:
            self._done.set_result(None)
            self._transport.close()
            return
        self._sent_at = time.perf_counter()
        self._transport.write(request)


class _Source:
    def __init__(self, requests: list[bytes], repeat_seconds: float) -> None:
        self._requests = requests
        self._next = 0
        self._until = time.perf_counter() + repeat_seconds if repeat_seconds else 0.0
        self.statuses: dict[bytes, int] = {}
        self.latencies: list[float] = []

    def take(self) -> bytes | None:
        if self._until:
            if time.perf_counter() > self._until:
                return None
            self._next = (self._next + 1) % len(self._requests)
            return self._requests[self._next]
        if self._next >= len(self._requests):
            return None
        self._next += 1
        return self._requests[self._next - 1]

    def answered(self, status: bytes, latency: float) -> None:
        self.statuses[status] = self.statuses.get(status, 0) + 1
        self.latencies.append(latency)


async def _run(job: Job) -> Result:
    requests = [encode(request, job.port) for request in job.requests]
    source = _Source(requests, job.repeat_seconds)
    loop = asyncio.get_running_loop()
    cpu, start = time.process_time(), time.perf_counter()
    ends = []
    for _ in range(job.clients):
        done: asyncio.Future[None] = loop.create_future()
        ends.append(done)
        await loop.create_connection(partial(_Connection, source, done), "127.0.0.1", job.port)
    await asyncio.gather(*ends)
    seconds = time.perf_counter() - start
    return Result(
        seconds=seconds,
        answers=len(source.latencies),
        statuses={status.decode(): count for status, count in source.statuses.items()},
        latencies_ms=[latency * 1000 for latency in source.latencies],
        cpu=(time.process_time() - cpu) / seconds,
    )


def generate(job: Job) -> Result:
    """Run a load in the calling process."""
    return uvloop.run(_run(job))


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(generate(Job(**json.loads(sys.stdin.readline()))))))
