"""uvicorn's HTTP protocol with limits on what a client can make it wait for and keep in memory.

uvicorn limits the time between two requests and the body that it keeps unread, and nothing else. It has no
limit for a connection that sends nothing, for a request that comes in byte by byte, for the size of a head
(its option h11_max_incomplete_event_size is for h11 alone, and neither httptools nor llhttp has one), nor for
the number of requests that are sent ahead of the answers to earlier ones: all of them are parsed and kept.

pyproject.toml pins uvicorn's minor version, and tests/test_http_protocol.py lists what is overridden here.
"""

import json
import logging
from asyncio import AbstractEventLoop, CancelledError, TimerHandle, Transport
from collections import deque
from http import HTTPStatus
from typing import Any, ClassVar, Final, cast

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn._types import ASGI3Application
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from backend.adapters.http.connections import Connections
from backend.models.access.sources import TrustedProxies

log = logging.getLogger(__name__)

REQUEST_SECONDS: Final = 10.0
# Shorter than uvicorn waits before it cancels what still runs (timeout_graceful_shutdown).
STOP_SECONDS: Final = 1.0
RETRY_AFTER_SECONDS: Final = 5
MAX_HEAD_BYTES: Final = 32 * 1024
# How many requests may wait for the answer to an earlier one. What comes behind them isn't parsed yet:
# parsed, a request takes a hundred times as much memory.
MAX_AHEAD: Final = 8
# What is parsed at once: most requests, or some that were sent ahead.
_PIECE_BYTES: Final = 2 * 1024

_REASONS: Final = {
    HTTPStatus.REQUEST_TIMEOUT: "The request did not come in completely in time; send it again",
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: (
        f"The request's head is larger than {MAX_HEAD_BYTES // 1024} KiB; send less of it"
    ),
    HTTPStatus.SERVICE_UNAVAILABLE: (
        "The service is stopping; the request had not come in completely, and nothing was done. Send it again"
    ),
    HTTPStatus.TOO_MANY_REQUESTS: "Too many connections from this address; close some, or ask again later",
}
_FULL: Final = "Too many connections; ask again later"

_CANCELLED: Final = "The service is stopping; ask again to learn what became of the request"

# Drops what is appended. Trailers go here: among the headers they could pass for what a proxy has checked.
_NOWHERE: Final = cast(list[tuple[bytes, bytes]], deque[tuple[bytes, bytes]](maxlen=0))


class _HeadRefusedError(Exception):
    """Stops the parser; `_refusal` has the status of the answer."""


class _Flow(FlowControl):
    """Keeps reading paused for as long as something that has come in waits to be parsed."""

    holding = False

    def resume_reading(self) -> None:
        """Read on, unless something is held."""
        if not self.holding:
            super().resume_reading()


class BoundedProtocol(HttpToolsProtocol):
    """Closes a connection whose request isn't complete in time, or whose head is too large.

    `request_seconds` count from a request's first byte to its last, for the first one from the connection's
    start. How long its answer takes doesn't count, and a request that had to wait for the answer to an
    earlier one has its time afterwards. A connection between two requests is left to uvicorn's own timeout.

    `max_head_bytes` are for a request's line and headers; where several requests come at once, one of them
    may pass with up to twice as much. What is neither a head nor a body has the same limit: extensions of
    chunks, and trailers, which are dropped.

    A request that isn't complete `stop_seconds` after the service was told to stop gets a 503: uvicorn would
    cancel it later, which ends in a 500. A client that shuts down its side of the connection after a complete
    request, as HTTP allows (RFC 9112, 9.6), gets its answer.

    A request that comes in one piece costs no timer: one is set for the connection, and again only for a
    piece that leaves a request incomplete.

    `connections` limits how many are open, and closes those whose client doesn't read its answers. A
    connection from one of the `proxies` counts for the client whose request is being answered.
    """

    flow: _Flow

    request_seconds: ClassVar[float] = REQUEST_SECONDS
    stop_seconds: ClassVar[float] = STOP_SECONDS
    max_head_bytes: ClassVar[int] = MAX_HEAD_BYTES

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: AbstractEventLoop | None = None,
        *,
        connections: Connections,
        proxies: TrustedProxies | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._counted = connections
        self._proxies = proxies or TrustedProxies()
        # The other end's address; None for a UNIX socket. A proxy says which client each request is from.
        self._peer: str | None = None
        self._is_proxied = False
        # When the wait for a request began, by the loop's clock; None while no more has to come.
        self._since: float | None = None
        self._watch: TimerHandle | None = None
        # The scope of the last complete request. While `self.scope` is another, that one is incomplete.
        self._complete: object = None
        # How many bytes have come in since the last complete head or piece of a body.
        self._overhead = 0
        # The last request that was given to the app.
        self._running: RequestResponseCycle | None = None
        # The status that refuses the request whose head has just come in.
        self._refusal: HTTPStatus | None = None
        # Set when the service was told to stop while a request was coming in.
        self._stop: TimerHandle | None = None
        # The bytes behind MAX_AHEAD waiting requests, and whether the client sends no more after them.
        self._held = b""
        self._held_is_all = False

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override] # uvicorn says Transport, asyncio BaseTransport
        """Count the connection, and start waiting for the first request; refuse one connection too many."""
        super().connection_made(transport)
        self.flow = _Flow(transport)
        if self.client is None and (self.server is None or self.server[1] is not None):
            # A TCP connection that is gone already, so that the kernel doesn't know its address any more.
            # What such a client has sent would be handled as if it came through a UNIX socket.
            transport.abort()
            return
        self._peer = None if self.client is None else self.client[0]
        self._is_proxied = self._proxies.trust(self._peer)
        refusal = self._counted.add(self, self.counted_address(self._peer))
        if refusal is not None:
            self._answer(refusal, _FULL if refusal is HTTPStatus.SERVICE_UNAVAILABLE else None)
            transport.close()
            return
        self._await_request()

    def counted_address(self, peer: str | None) -> str | None:
        """Return the address that a new connection counts for: None for a proxy, which has many clients."""
        return None if self._proxies.trust(peer) else peer

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timers, and tell the app that the client is gone."""
        for timer in (self._watch, self._stop):
            if timer is not None:
                timer.cancel()
        self._watch = None
        self._counted.remove(self)
        super().connection_lost(exc)
        if self._running is not None and not self._running.response_complete:
            # uvicorn tells it to the last request that has come in. Where requests wait, the running one is
            # an earlier one: it would go on writing, and end in a traceback.
            self._running.disconnected = True
            self._running.message_event.set()

    def eof_received(self) -> bool:  # type: ignore[override] # uvicorn's says None, which closes at once
        """Tell whether the connection stays open: until each complete request has been answered."""
        if self._held:
            self._held_is_all = True
            return True
        if not self._is_answering() or (self.cycle.more_body and not self.pipeline):
            return False
        self.cycle.keep_alive = False
        return True

    def shutdown(self) -> None:
        """Close the connection as soon as no request is on it; called once, when the service stops."""
        self._held = b""
        if not self._is_coming_in():
            super().shutdown()
            return
        if self._is_answering():
            self.cycle.keep_alive = False
        self._stop = self.loop.call_later(self.stop_seconds, self._refuse_the_incomplete)

    def data_received(self, data: bytes) -> None:
        """Parse what has come in, unless MAX_AHEAD requests wait already: then hold it."""
        if len(data) <= _PIECE_BYTES and not self._held and len(self.pipeline) < MAX_AHEAD:
            self._take(data)
        else:
            self._held += data
            self._take_held()

    def _take_held(self) -> None:
        """Parse what is held, until nothing is left or MAX_AHEAD requests wait for their answers."""
        held, start = self._held, 0
        while start < len(held) and len(self.pipeline) < MAX_AHEAD and not self.transport.is_closing():
            # A whole head of any size could come in at once.
            self._take(held[start : start + _PIECE_BYTES])
            start += _PIECE_BYTES
        self._held = b"" if self.transport.is_closing() else held[start:]
        self.flow.holding = bool(self._held)
        if self._held:
            self.flow.pause_reading()
        elif self._held_is_all:
            if not self.eof_received():
                self.transport.close()
        elif not self._is_answering():
            # No answer is under way that would resume it.
            self.flow.resume_reading()

    def _take(self, data: bytes) -> None:
        """Parse a piece, and wait for the rest of its request where that is incomplete."""
        self._overhead += len(data)
        super().data_received(data)
        if self._overhead > self.max_head_bytes:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        # Where nothing is being answered these were empty lines, which have ended uvicorn's own timeout.
        elif (
            self._is_coming_in()
            and self._since is None
            and (self.scope is not self._complete or not self._is_answering())
        ):
            self._await_request()

    def on_headers_complete(self) -> None:
        """Refuse a head that is too large, and a client with too many connections; drop all trailers."""
        if self._overhead > self.max_head_bytes:
            # More than the head may be counted there.
            fields = sum(len(name) + len(value) + len(b": \r\n") for name, value in self.headers)
            if len(self.url) + fields > self.max_head_bytes:
                self._refusal = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
                raise _HeadRefusedError
        self._overhead = 0
        if self._is_proxied:
            source = self._proxies.source(self._peer, self.headers)
            if source != self._peer:
                self._refusal = self._counted.move(self, source)
            if self._refusal is not None:
                raise _HeadRefusedError
        super().on_headers_complete()
        if self._stop is not None:
            self.cycle.keep_alive = False
        self.headers = _NOWHERE

    def on_body(self, body: bytes) -> None:
        """Pass a piece of the body on."""
        self._overhead = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Stop waiting: the request is complete."""
        self._complete = self.scope
        self._since = None
        self._overhead = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Parse more of what is held, now that a request less waits."""
        super().on_response_complete()
        if self._is_proxied and not self.pipeline:
            self._counted.move(self, None)
        if self._held:
            self._take_held()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def send_400_response(self, msg: str) -> None:
        """Refuse a request at which the parser has stopped."""
        if self._refusal is not None:
            self._refuse(self._refusal)
        else:
            super().send_400_response(msg)

    def _await_request(self) -> None:
        self._since = self.loop.time()
        if self._watch is None:
            self._watch = self.loop.call_later(self.request_seconds, self._look)

    def _look(self) -> None:
        self._watch = None
        if self._since is None or self.transport.is_closing():
            return
        left = self._since + self.request_seconds - self.loop.time()
        if left <= 0:
            if not self._is_held_up():
                self._refuse(HTTPStatus.REQUEST_TIMEOUT)
                return
            left = self.request_seconds
            self._since = self.loop.time()
        self._watch = self.loop.call_later(left, self._look)

    def _is_held_up(self) -> bool:
        """Tell whether the client waits for us: reading is paused, or an earlier request isn't answered."""
        return self.flow.read_paused or (self._is_in_head() and self._is_answering())

    def _is_coming_in(self) -> bool:
        """Tell whether a part of a request has come in, and not all of it."""
        return bool(self._overhead) or self.scope is not self._complete

    def _refuse_the_incomplete(self) -> None:
        # While an earlier request is being answered, its answer closes the connection.
        if self._is_coming_in() and not self.pipeline and not (self._is_in_head() and self._is_answering()):
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE)

    def _is_in_head(self) -> bool:
        return self.cycle is None or self.scope is not self.cycle.scope

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, status: HTTPStatus) -> None:
        """Close the connection, with an answer if one can be given to the request that is coming in."""
        if self.transport.is_closing():
            return
        log.debug("request_refused", extra={"status": status.value, "client": self.client})
        if self.scope is not self._complete and not self.pipeline:
            if self._is_in_head():
                if not self._is_answering():
                    self._answer(status)
            elif not self.cycle.response_started:
                self._answer(status)
                # The app is told that the client is gone, and what it sends is dropped.
                self.cycle.disconnected = True
                self.cycle.message_event.set()
        self.transport.close()

    def _answer(self, status: HTTPStatus, reason: str | None = None) -> None:
        body = json.dumps({"detail": reason or _REASONS[status]}).encode()
        headers = [*self.server_state.default_headers, *_headers(status, body)]
        lines = [b"%b: %b\r\n" % header for header in headers]
        self.transport.write(b"".join([STATUS_LINE[status], *lines, b"\r\n", body]))


def answering_when_cancelled(app: ASGIApp) -> ASGIApp:
    """Return the app with a 503 for requests that uvicorn cancels when it stops, in place of its own 500."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def note(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await app(scope, receive, note)
        except CancelledError:
            if started or scope["type"] != "http":
                raise
            body = json.dumps({"detail": _CANCELLED}).encode()
            headers = _headers(HTTPStatus.SERVICE_UNAVAILABLE, body)
            await send({"type": "http.response.start", "status": 503, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    return answer


def _headers(status: HTTPStatus, body: bytes) -> list[tuple[bytes, bytes]]:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
        (b"connection", b"close"),
    ]
    if status in {HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS}:
        headers.append((b"retry-after", b"%d" % RETRY_AFTER_SECONDS))
    return headers
