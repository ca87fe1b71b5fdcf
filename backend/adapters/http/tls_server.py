"""uvicorn's server for TLS, which accepts connections by itself.

The event loop tells the protocol of a connection when its TLS handshake is over, for which it allows 60
seconds: until then nothing limits how many there are. And where no descriptor is left, it tries to accept
again and again, with all of a core. Without TLS the limits keep it from that, and the loop's own way to
accept takes 30 microseconds less for a connection.
"""

import asyncio
import errno
import logging
import socket
from typing import Final

import uvicorn

from backend.adapters.http.certificate import Certificate
from backend.adapters.http.connections import Connections
from backend.adapters.http.http_protocol import REQUEST_SECONDS, BoundedProtocol

log = logging.getLogger(__name__)

_AT_ONCE: Final = 64
_AGAIN_SECONDS: Final = 1.0
# accept(2): none of them is about the listening socket.
_EXHAUSTED: Final = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class TlsServer(uvicorn.Server):
    """Accepts from one listening socket. A connection over the limits is closed before its handshake."""

    def __init__(
        self,
        config: uvicorn.Config,
        listener: socket.socket,
        connections: Connections,
        certificate: Certificate,
    ) -> None:
        """Take a socket that listens. `serve` accepts from it."""
        super().__init__(config)
        self._listener = listener
        self._certificate = certificate
        self._connections = connections
        self._handshakes: set[asyncio.Task[None]] = set()
        self._paused: asyncio.TimerHandle | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002 - uvicorn's
        """Start uvicorn without a socket of its own, and accept from the listener."""
        await super().startup(sockets=[])
        self._listener.setblocking(False)  # noqa: FBT003 - the library's
        self._listener.listen(self.config.backlog)
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002 - uvicorn's
        """Accept nothing more, cancel the handshakes, and shut uvicorn down."""
        if self._paused is not None:
            self._paused.cancel()
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()
        for task in self._handshakes:
            task.cancel()
        await super().shutdown(sockets=[])

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as exc:
                if exc.errno in _EXHAUSTED:
                    self._pause(exc)
                    return
                continue  # it is gone already
            self._take(connection)

    def _pause(self, error: OSError) -> None:
        """Leave the waiting connections in the kernel's queue for a while."""
        loop = asyncio.get_running_loop()
        log.warning("accepting_paused", extra={"reason": error.strerror})
        loop.remove_reader(self._listener)
        self._paused = loop.call_later(_AGAIN_SECONDS, loop.add_reader, self._listener, self._accept)

    def _take(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        protocol: BoundedProtocol = self.config.http_protocol_class(  # type: ignore[call-arg, assignment] # uvicorn calls it like that
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state, _loop=loop
        )
        try:
            address = protocol.counted_address(connection.getpeername()[0])
        except OSError:  # gone already
            connection.close()
            return
        if self._connections.add(protocol, address) is not None:
            connection.close()
            return
        task = loop.create_task(self._shake_hands(connection, protocol))
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    async def _shake_hands(self, connection: socket.socket, protocol: BoundedProtocol) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(
                lambda: protocol,
                connection,
                ssl=self._certificate.context(),
                ssl_handshake_timeout=REQUEST_SECONDS,
                ssl_shutdown_timeout=REQUEST_SECONDS,
            )
        except BaseException as exc:
            self._connections.remove(protocol)
            connection.close()
            if not isinstance(exc, OSError | TimeoutError | asyncio.CancelledError):
                raise
