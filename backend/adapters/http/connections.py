"""Limits how many connections are open, in total and from one source, and closes those that aren't read.

uvicorn limits none of it. A client that sends requests and never reads the answers keeps a descriptor, and
the memory of what was written for it, without an end: to close its connection waits until that is read.

Each connection takes a file descriptor. A process starts with a soft limit of 1024 on most systems.
"""

import array
import asyncio
import fcntl
import logging
import resource
import socket
import struct
import termios
from collections import Counter
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, Protocol, Self

from backend.models.access.sources import network_of

log = logging.getLogger(__name__)

# File descriptors: for 4096 connections, as many that were accepted at once and aren't counted yet, and the
# reserve.
_WANTED: Final = 8192
# For `wg`, the database, the config and other files: some 60 are in use at a time.
_RESERVE: Final = 256
_MOST_BACKLOG: Final = 1024
STALLED_SECONDS: Final = 10.0
# All connections are checked so many times in STALLED_SECONDS.
_LOOKS: Final = 10
# Refused connections are logged at most that often.
_LOG_SECONDS: Final = 60.0
# Linger for zero seconds: drop what is unsent. The kernel would keep it for minutes.
_NO_LINGER: Final = struct.pack("ii", 1, 0)


class Connection(Protocol):
    """A connection, whose transport knows what it couldn't write yet; None until TLS's handshake is over."""

    transport: asyncio.Transport


@dataclass(slots=True)
class _Open:
    source: str | None = None
    # How many bytes the client had not read at the last check, and since when that has not become less.
    unread: int = 0
    since: float = 0.0


class Connections:
    """Counts connections, and aborts those whose client hasn't read anything for `stalled_seconds`.

    IPv6 sources count by their /64, as for the rate limits. A connection without an address counts for the
    total alone: through a UNIX socket, or from a trusted proxy. To be used from one event loop.
    """

    def __init__(
        self,
        most: int,
        most_of_one_source: int,
        *,
        stalled_seconds: float = STALLED_SECONDS,
    ) -> None:
        self._most = most
        self._most_of_one_source = most_of_one_source
        self._stalled_seconds = stalled_seconds
        self._open: dict[Connection, _Open] = {}
        self._of_source: Counter[str] = Counter()
        self._looking: asyncio.TimerHandle | None = None
        self._refused = 0
        self._log_again_at = float("-inf")

    @classmethod
    def within(cls, descriptors: int, most: int, most_of_one_source: int) -> Self:
        """Return the counts with `most` lowered to the number of descriptors that connections may have."""
        if most > descriptors:
            log.warning(
                "connections_limited_by_descriptors",
                extra={"wanted": most, "connections": descriptors, "remedy": "raise LimitNOFILE="},
            )
            most = descriptors
        return cls(most, min(most_of_one_source, max(1, most // 2)))

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: Connection, address: str | None) -> HTTPStatus | None:
        """Count a new connection; or return the status to refuse it with, and don't count it.

        One that is counted already stays so.
        """
        if connection in self._open:
            return None
        if len(self._open) >= self._most:
            return self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, address)
        self._open[connection] = _Open()
        refusal = self.move(connection, address)
        if refusal is not None:
            del self._open[connection]
        elif self._looking is None:
            self._look_later()
        return refusal

    def move(self, connection: Connection, address: str | None) -> HTTPStatus | None:
        """Count a connection for another source from now on; or return the status to refuse it with.

        A trusted proxy's connection counts for the client whose request is being answered.
        """
        known = self._open.get(connection)
        source = None if address is None else network_of(address)
        if known is None or known.source == source:
            return None
        self._forget_source(known)
        if source is not None:
            if self._of_source[source] >= self._most_of_one_source:
                return self._refuse(HTTPStatus.TOO_MANY_REQUESTS, address)
            self._of_source[source] += 1
            known.source = source
        return None

    def remove(self, connection: Connection) -> None:
        """Stop counting a connection, if it is counted."""
        known = self._open.pop(connection, None)
        if known is not None:
            self._forget_source(known)

    def _forget_source(self, known: _Open) -> None:
        if known.source is not None:
            self._of_source[known.source] -= 1
            if not self._of_source[known.source]:
                del self._of_source[known.source]
            known.source = None

    def _refuse(self, status: HTTPStatus, address: str | None) -> HTTPStatus:
        self._refused += 1
        now = asyncio.get_running_loop().time()
        if now >= self._log_again_at:
            self._log_again_at = now + _LOG_SECONDS
            log.warning(
                "connections_refused",
                extra={"refused": self._refused, "open": len(self._open), "last_source": address},
            )
        return status

    def _look_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._looking = loop.call_later(self._stalled_seconds / _LOOKS, self._look)

    def _look(self) -> None:
        """Abort the connections whose client has read nothing of what waits for it for too long."""
        self._looking = None
        now = asyncio.get_running_loop().time()
        for connection, known in list(self._open.items()):
            transport: asyncio.Transport | None = connection.transport
            waiting = 0 if transport is None else transport.get_write_buffer_size()
            if transport is None or not waiting:
                known.unread = 0
                continue
            handle = transport.get_extra_info("socket")
            # Together with what the kernel has not delivered yet: a client that reads slowly makes that less
            # long before the kernel takes any more from the transport.
            unread = waiting + _undelivered(handle)
            if unread < known.unread or not known.unread:
                known.since = now
            elif now - known.since >= self._stalled_seconds:
                log.debug("stalled_connection_ended", extra={"source": known.source, "unread": unread})
                handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
                transport.abort()
            known.unread = unread
        if self._open:
            self._look_later()


def raise_descriptor_limit() -> int:
    """Raise the soft limit (getrlimit(2)) as far as it is of use and allowed; return what it is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED if hard == resource.RLIM_INFINITY else min(_WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (OSError, ValueError):  # a system call filter may refuse it
            return soft
    return wanted


def divide_descriptors(limit: int) -> tuple[int, int]:
    """Return how many connections may wait to be accepted, and how many may be open.

    The kernel completes those that wait, and all of them may be accepted at once. What neither takes is the
    reserve.
    """
    backlog = min(_MOST_BACKLOG, limit // 8)
    return backlog, limit - backlog - min(_RESERVE, limit // 4)


def _undelivered(handle: Any) -> int:
    """Return how much of what was written to a socket its other end has not acknowledged (tcp(7))."""
    size = array.array("i", [0])
    fcntl.ioctl(handle.fileno(), termios.TIOCOUTQ, size)
    return size[0]
