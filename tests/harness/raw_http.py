"""An app behind BoundedProtocol, a client that sends any bytes, and a hub that is a file only."""

import asyncio
import re
import socket
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self

import pytest
import uvicorn
from fastapi import APIRouter, FastAPI, Request

from backend.adapters.http.connections import Connections
from backend.adapters.http.http_protocol import BoundedProtocol
from backend.api.routes import DomainErrorRoute
from backend.models.wireguard.keys import WireGuardPrivateKey
from tests.harness.patience import eventually


class HastyProtocol(BoundedProtocol):
    request_seconds = 0.4
    stop_seconds = 0.2


def echoing_app() -> FastAPI:
    """Return an app with our kind of route; `app.state.seen` has the paths that were asked for."""
    router = APIRouter(route_class=DomainErrorRoute)
    app = FastAPI()
    app.state.seen = []
    app.state.blocked, app.state.unblock = threading.Event(), threading.Event()

    @router.post("/echo")
    async def echo(request: Request, body: dict[str, Any]) -> dict[str, Any]:
        app.state.seen.append(request.url.path)
        return {
            "keys": list(body),
            "headers": [name.decode() for name, _ in request.scope["headers"]],
            "request_id": request.state.request_id,
        }

    @router.get("/slow/{seconds}")
    async def slow(seconds: float) -> str:
        app.state.seen.append("slow")
        await asyncio.sleep(seconds)
        return "slow"

    @router.get("/who")
    async def who(request: Request) -> dict[str, Any]:
        app.state.seen.append("who")
        return {"client": request.scope["client"], "server": request.scope["server"]}

    @router.get("/block")
    async def block() -> str:
        # The server takes no new connection meanwhile.
        app.state.blocked.set()
        app.state.unblock.wait(20)
        return "blocked"

    app.include_router(router)
    return app


class Server:
    """An app behind our protocol, in a thread."""

    def __init__(self, listener: socket.socket, http: Any = None) -> None:
        http = http or partial(HastyProtocol, connections=Connections(1000, 1000))
        self.app = echoing_app()
        self.listener = listener
        config = uvicorn.Config(
            self.app, loop="uvloop", http=http, ws="none", log_config=None, server_header=False
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],))

    def __enter__(self) -> Self:
        self._thread.start()
        eventually(lambda: self._server.started)
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    def connect(self) -> "Client":
        connection = socket.socket(self.listener.family)
        connection.settimeout(10)
        connection.connect(self.listener.getsockname())
        return Client(connection)


class Client:
    """A connection to say anything on."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._connection.close()

    def send(self, data: bytes) -> None:
        self._connection.sendall(data)

    def send_slowly(self, pieces: Iterable[bytes]) -> None:
        for piece in pieces:
            self._connection.sendall(piece)
            time.sleep(0.005)

    def answer(self) -> tuple[int, bytes]:
        """Return the next answer's status and body; ConnectionError if there is none."""
        while b"\r\n\r\n" not in self._received:
            self._receive()
        head, _, rest = self._received.partition(b"\r\n\r\n")
        length = re.search(rb"\r\ncontent-length: (\d+)", head)
        assert length is not None
        size = int(length[1])
        self._received = rest
        while len(self._received) < size:
            self._receive()
        body, self._received = self._received[:size], self._received[size:]
        return int(head.split()[1]), body

    def status(self) -> int:
        return self.answer()[0]

    def is_closed(self) -> bool:
        """Wait for the end, and tell whether nothing more was said before it."""
        try:
            self._receive()
        except ConnectionError:
            return True
        return False

    def reset(self) -> None:
        """Go away as a client does that doesn't want to be asked who it was."""
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._connection.close()

    def _receive(self) -> None:
        data = self._connection.recv(65536)
        if not data:
            raise ConnectionError("closed")
        self._received += data


@pytest.fixture
def server() -> Iterator[Server]:
    with socket.create_server(("127.0.0.1", 0)) as listener, Server(listener) as running:
        yield running


def get(path: str) -> bytes:
    return b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % path.encode()


def post(body: bytes = b"{}", *headers: bytes) -> bytes:
    length = b"Content-Length: %d" % len(body)
    lines = [b"POST /echo HTTP/1.1", b"Host: localhost", b"Content-Type: application/json", length, *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


CHUNKED = (
    b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def connections(server: Server) -> list[BoundedProtocol]:
    found = list(server._server.server_state.connections)
    return [connection for connection in found if isinstance(connection, BoundedProtocol)]


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, object]:
    """Return the settings of a hub that is a file only, with one address to give."""
    path = tmp_path / "wg0.conf"
    path.write_text(f"[Interface]\nPrivateKey = {WireGuardPrivateKey.generate().reveal()}\n")
    return {
        "WIREGUARD_CONFIG_PATH": path,
        "WIREGUARD_RELOAD": "off",
        "WIREGUARD_IP_POOL": "10.0.0.0/30",
        "STATE_DIRECTORY": tmp_path / "state",
        "ENABLE_DBOS": "false",
    }
