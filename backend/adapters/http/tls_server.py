"""uvicorn's server for TLS, accepting connections by itself.

The event loop makes a connection by TLS known when its handshake is over, for which it gives it 60 seconds:
until then nothing bounds how many there are. And where no descriptor is left it asks for the connection
that waits again and again, with all of a core. Without TLS the caps keep it from coming to that, and the
loop's own way takes 30 microseconds less for a connection.
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
    """Accepts from one listening socket. A connection over the caps is closed before its handshake."""

    def __init__(
        self,
        config: uvicorn.Config,
        listener: socket.socket,
        connections: Connections,
        certificate: Certificate,
    ) -> None:
        """Listen already; nothing is accepted before `serve`."""
        super().__init__(config)
        self._listener = listener
        self._certificate = certificate
        self._connections = connections
        self._handshakes: set[asyncio.Task[None]] = set()
        self._paused: asyncio.TimerHandle | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002 - uvicorn's
        """Start without a listening socket of uvicorn's, and accept."""
        await super().startup(sockets=[])
        self._listener.setblocking(False)  # noqa: FBT003 - the library's
        self._listener.listen(self.config.backlog)
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002 - uvicorn's
        """Accept nothing more, drop handshakes, and end as uvicorn does."""
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
        """Leave what waits in its queue for a while; the loop would ask for it without an end."""
        loop = asyncio.get_running_loop()
        log.warning("accepting_paused", extra={"reason": error.strerror})
        loop.remove_reader(self._listener)
        self._paused = loop.call_later(_AGAIN_SECONDS, loop.add_reader, self._listener, self._accept)

    def _take(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        protocol: BoundedProtocol = self.config.http_protocol_class(  # type: ignore[call-arg, assignment] # uvicorn calls it like that
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state, _loop=loop
        )
        if self._is_refused(connection, protocol):
            connection.close()
            return
        task = loop.create_task(self._shake_hands(connection, protocol))
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    def _is_refused(self, connection: socket.socket, protocol: BoundedProtocol) -> bool:
        try:
            peer = connection.getpeername()[0]
        except OSError:  # gone already
            return True
        return self._connections.admit(protocol, protocol.counted_address(peer)) is not None

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
            self._connections.release(protocol)
            connection.close()
            if not isinstance(exc, OSError | TimeoutError | asyncio.CancelledError):
                raise
