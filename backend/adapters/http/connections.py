"""Which connections may be open: so many in total, so many of one source, none whose client doesn't read.

uvicorn bounds none of it. A client that sends requests and never reads the answers keeps a descriptor, and
what was written for it, for as long as it likes: also after the connection was closed, which waits for that.
"""

import array
import asyncio
import fcntl
import logging
import socket
import struct
import termios
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final, Protocol, Self

from backend.models.access.sources import network_of

log = logging.getLogger(__name__)

STALLED_SECONDS: Final = 10.0
# Looks at all connections in that part of the time.
_LOOKS: Final = 10
# The log says at most that often that connections were refused.
_LOG_SECONDS: Final = 60.0
# Zero seconds: what is unsent goes with the connection. The kernel would keep it for minutes.
_NO_LINGER: Final = struct.pack("ii", 1, 0)


class Connection(Protocol):
    """What is kept of a connection: its transport is asked what it couldn't write yet.

    There is none until the handshake of TLS is over.
    """

    transport: asyncio.Transport


@dataclass(slots=True)
class _Open:
    source: str | None = None
    # What had not been read by the client at the last look, in bytes, and since when that is no less.
    unread: int = 0
    since: float = 0.0


class Connections:
    """Counts them, and ends those whose client hasn't read anything for `stalled_seconds`.

    IPv6 sources count by their /64, as for the rate limits. A connection without a source, by a UNIX socket,
    counts for the total alone. To be used from one event loop.
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
        self._of_source: dict[str, int] = {}
        self._looking: asyncio.TimerHandle | None = None
        self._refused = 0
        self._log_again_at = float("-inf")

    @classmethod
    def within(cls, descriptors: int, most: int, most_of_one_source: int) -> Self:
        """Return the counts for no more connections than there are descriptors for."""
        if most > descriptors:
            log.warning(
                "connections_limited_by_descriptors",
                extra={"wanted": most, "connections": descriptors, "remedy": "raise LimitNOFILE="},
            )
            most = descriptors
        return cls(most, min(most_of_one_source, max(1, most // 2)))

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, connection: Connection, address: str | None) -> HTTPStatus | None:
        """Count a new one; return None, or the status to refuse it with, and then it isn't counted.

        One that is counted already stays so.
        """
        if connection in self._open:
            return None
        if len(self._open) >= self._most:
            return self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, address)
        self._open[connection] = _Open()
        refusal = self.attribute(connection, address)
        if refusal is not None:
            del self._open[connection]
        elif self._looking is None:
            self._look_later()
        return refusal

    def attribute(self, connection: Connection, address: str | None) -> HTTPStatus | None:
        """Count one for another source from now on, None for no one's; return what `admit` does.

        A trusted proxy's connections are each that of the client whose request is under way.
        """
        known = self._open.get(connection)
        source = None if address is None else network_of(address)
        if known is None or known.source == source:
            return None
        self._forget_source(known)
        if source is not None:
            count = self._of_source.get(source, 0)
            if count >= self._most_of_one_source:
                return self._refuse(HTTPStatus.TOO_MANY_REQUESTS, address)
            self._of_source[source] = count + 1
            known.source = source
        return None

    def release(self, connection: Connection) -> None:
        """Count it no longer. One that was refused was never counted."""
        known = self._open.pop(connection, None)
        if known is not None:
            self._forget_source(known)

    def _forget_source(self, known: _Open) -> None:
        source, known.source = known.source, None
        if source is None:
            return
        count = self._of_source[source] - 1
        if count:
            self._of_source[source] = count
        else:
            del self._of_source[source]

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
            # With what the kernel has taken but not delivered: a client that reads slowly makes that less
            # long before there is room for more of what waits.
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


def _undelivered(handle: Any) -> int:
    """Return how much of what was written to a socket its other end has not acknowledged (tcp(7))."""
    size = array.array("i", [0])
    fcntl.ioctl(handle.fileno(), termios.TIOCOUTQ, size)
    return size[0]
