"""TLS: the certificate that is read again when its files change, and the server that accepts connections.

uvicorn reads a certificate once. And its event loop tells the protocol of a connection when its TLS handshake
is over, for which it allows 60 seconds: until then nothing limits how many there are. Where no descriptor is
left, it tries to accept again and again, with all of a core. Without TLS the limits keep it from that, and
the loop's own way to accept takes 30 microseconds less for a connection.
"""

import asyncio
import errno
import logging
import socket
import ssl
import stat
import time
from pathlib import Path
from typing import Final

import uvicorn

from backend.adapters.http.connections import Connections
from backend.adapters.http.http_protocol import REQUEST_SECONDS, BoundedProtocol
from backend.errors import StartRefusedError

log = logging.getLogger(__name__)

# Looks whether the files have changed at most that often, when a connection comes.
_LOOK_SECONDS: Final = 1.0
_AT_ONCE: Final = 64
_AGAIN_SECONDS: Final = 1.0
# accept(2): none of them is about the listening socket.
_EXHAUSTED: Final = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

_Identity = tuple[tuple[int, int, int, int], ...]


class Certificate:
    """The certificate with its chain and the private key, in PEM, as the files have them now."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Read the files; raise StartRefusedError where they can't be used."""
        self._files = (certificate, key)
        self._looked_at = time.monotonic()
        # Of the files that the context was made from, and what was logged last of others.
        self._identity: _Identity = ()
        self._logged: tuple[_Identity, str] = ((), "")
        try:
            self._identity = self._look()
            self._context = self._read()
        except OSError as exc:  # ssl.SSLError is one
            raise StartRefusedError(
                f"--tls-cert {certificate} and --tls-key {key} can't be used ({_reason(exc)}); they take a "
                "certificate with its chain and its private key, in PEM, that this user may read"
            ) from None

    def context(self) -> ssl.SSLContext:
        """Return what the next handshake uses. Files that can't be used change nothing, and the log says so.

        A new certificate and a new key come one after the other, and may be given to this user later still:
        they are read again until they fit.
        """
        now = time.monotonic()
        if now - self._looked_at < _LOOK_SECONDS:
            return self._context
        self._looked_at = now
        identity: _Identity = ()
        try:
            identity = self._look()
            if identity != self._identity:
                self._context = self._read()
                self._identity = identity
                log.info("certificate_read_again", extra={"file": self._files[0]})
        except OSError as exc:
            self._log_unusable(identity, _reason(exc))
        return self._context

    def _log_unusable(self, identity: _Identity, reason: str) -> None:
        if (identity, reason) != self._logged:
            self._logged = (identity, reason)
            log.error("certificate_unusable", extra={"file": self._files[0], "reason": reason})

    def _look(self) -> _Identity:
        stats = [path.stat() for path in self._files]
        if not all(stat.S_ISREG(found.st_mode) for found in stats):
            # A read from a named pipe blocks the event loop until another process writes to it.
            raise OSError(errno.EINVAL, "not a regular file")
        return tuple((found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size) for found in stats)

    def _read(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        certificate, key = self._files
        # Without a password, the library would ask for one at the terminal.
        context.load_cert_chain(certificate, key, password="")
        context.set_alpn_protocols(["http/1.1"])
        return context


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return error.reason or "no certificate and key in PEM"
    return error.strerror or type(error).__name__


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

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002 - uvicorn passes it
        """Start uvicorn without a socket of its own, and accept from the listener."""
        await super().startup(sockets=[])
        self._listener.setblocking(False)  # noqa: FBT003 - socket takes no keyword
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
