"""What becomes of a request when the client has said all that it will, or when the service stops."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from starlette.types import Message, Receive, Scope, Send

from backend.adapters.http.http_protocol import BoundedProtocol, answering_when_cancelled
from backend.adapters.http.unix_socket import listening_at
from tests.harness.patience import eventually
from tests.harness.raw_http import CHUNKED, Client, Server, chunk, connections, get, post
from tests.harness.requests import PROVISION, provision_body
from tests.harness.service import StartService


def half_close(client: Client) -> None:
    client._connection.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        pytest.param(get("/slow/0.1"), [200], id="one request"),
        pytest.param(post(), [200], id="one with a body"),
        pytest.param(post() + get("/slow/0.1") + post(), [200, 200, 200], id="several at once"),
        pytest.param(get("/slow/0.1") + b"GET /wh", [200], id="one, and half a head"),
        pytest.param(b"GET /wh", [], id="half a head"),
        pytest.param(post()[:-1], [], id="half a body"),
        pytest.param(b"", [], id="nothing"),
    ],
)
def test_half_closed_connection_gets_the_answers_to_its_complete_requests(
    server: Server, sent: bytes, statuses: list[int]
) -> None:
    with server.connect() as client:
        client.send(sent)
        half_close(client)
        assert [client.status() for _ in statuses] == statuses
        assert client.is_closed()


def test_half_closed_connection_that_asked_nothing_more_is_closed(server: Server) -> None:
    with server.connect() as client:
        client.send(get("/who"))
        assert client.status() == 200
        half_close(client)
        assert client.is_closed()


def test_half_closed_unix_socket_gets_its_answer(tmp_path: Path) -> None:
    with (
        listening_at(tmp_path / "socket") as listener,
        Server(listener) as running,
        running.connect() as client,
    ):
        client.send(get("/slow/0.1"))
        half_close(client)
        assert client.answer() == (200, b'"slow"')


HALVES = {
    "half a body": post(b'{"a": 1}')[:-1],
    "a chunk too few": CHUNKED + chunk(b"{}"),
    "half a head": post()[:30],
    "no body yet": post(b'{"a": 1}')[:-8],
}


@pytest.fixture
def stopping() -> Iterator[Callable[[bytes], Client]]:
    """Give the test a function that sends something and tells the server to stop as soon as that came in."""
    with ExitStack() as stack:

        def stop_after(sent: bytes) -> Client:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            server = stack.enter_context(Server(listener))
            client = server.connect()
            client.send(sent)
            eventually(lambda: any(map(has_received, connections(server))))
            server._server.should_exit = True
            return client

        yield stop_after


def has_received(connection: BoundedProtocol) -> bool:
    return connection._overhead > 0 or connection.scope is not None


@pytest.mark.parametrize("sent", HALVES.values(), ids=HALVES)
def test_stop_refuses_a_request_that_is_half_sent(
    stopping: Callable[[bytes], Client], sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with stopping(sent) as client:
        status, body = client.answer()
        assert (status, "Send it again" in json.loads(body)["detail"]) == (503, True)
        assert client.is_closed()
    assert "Exception in ASGI application" not in caplog.text


def test_stop_waits_a_moment_for_the_rest_of_a_request(stopping: Callable[[bytes], Client]) -> None:
    with stopping(post(b'{"a": 1}')[:-1]) as client:
        client.send(b"}")
        assert client.status() == 200
        assert client.is_closed()


def test_stop_answers_what_is_under_way_and_no_half_sent_one_behind_it(
    stopping: Callable[[bytes], Client],
) -> None:
    with stopping(get("/slow/0.8") + post()[:30]) as client:
        assert client.answer() == (200, b'"slow"')
        assert client.is_closed()


def test_sigterm_gives_clients_with_half_sent_bodies_a_503(
    start_service: StartService, settings: dict[str, object]
) -> None:
    service = start_service(settings)
    body = json.dumps(provision_body("node-1")).encode()
    head = (
        f"POST {PROVISION} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nAuthorization: {service.local_admin.authorization}\r\n\r\n"
    ).encode()
    with ExitStack() as stack:
        clients = [
            stack.enter_context(Client(socket.create_connection(("127.0.0.1", service.port), 10)))
            for _ in range(3)
        ]
        for client in clients:
            client.send(head + body[:-10])
        # When this is answered, the same loop has read what came before it.
        assert service.client.get("/healthz").status_code == 200
        stopped = threading.Thread(target=service.terminate)
        stopped.start()
        try:
            heads = [read_head(client) for client in clients]
        finally:
            stopped.join()
    assert [head.split(b" ")[1] for head in heads] == [b"503"] * 3
    assert all(b"\r\nretry-after: 5\r\n" in head for head in heads)
    assert "Traceback" not in service.log


def read_head(client: Client) -> bytes:
    while b"\r\n\r\n" not in client._received:
        client._receive()
    return client._received.partition(b"\r\n\r\n")[0] + b"\r\n"


def test_request_that_the_stop_cancels_gets_a_503_too() -> None:
    sent: list[Message] = []

    async def hang(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.Event().wait()

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    async def cancel() -> None:
        task = asyncio.ensure_future(answering_when_cancelled(hang)({"type": "http"}, receive, send))
        await asyncio.sleep(0)
        task.cancel()
        await task

    asyncio.run(cancel())
    start, body = sent
    assert start["status"] == 503
    assert (b"retry-after", b"5") in start["headers"]
    assert "ask again" in json.loads(body["body"])["detail"]


def test_cancelled_request_whose_answer_has_begun_is_left_as_it_is() -> None:
    sent: list[Message] = []

    async def begin(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise asyncio.CancelledError

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    async def run() -> None:
        await answering_when_cancelled(begin)({"type": "http"}, receive, send)

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run())
    assert [message["type"] for message in sent] == ["http.response.start"]
