"""What a client may send, how long it may take, and what comes with every answer: over real sockets."""

import asyncio
import json
import logging
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import Message

from backend.adapters.http.http_protocol import MAX_HEAD_BYTES
from backend.adapters.http.unix_socket import listening_at
from backend.api.errors import MAX_BODY_BYTES
from backend.errors import StartRefusedError
from tests.harness.raw_http import (
    CHUNKED,
    Client,
    HastyProtocol,
    Server,
    chunk,
    echoing_app,
    get,
    post,
)
from tests.harness.requests import PEERS, PROVISION, provision_body
from tests.harness.service import ServiceProcess

JSON = {"Content-Type": "application/json"}

StartService = Callable[..., ServiceProcess]


@pytest.mark.parametrize(
    ("pieces", "statuses"),
    [
        pytest.param([], [], id="nothing"),
        pytest.param([b"\r\n"] * 30, [], id="empty lines"),
        pytest.param([b"GET /who HT"], [408], id="half a line"),
        pytest.param([get("/who")[index : index + 1] for index in range(20)], [408], id="byte by byte"),
        pytest.param([post(b" " * 100)[:-1]], [408], id="all but a byte of the body"),
        pytest.param([post(b" " * 100)[:-100], *[b" "] * 30], [408], id="a dribbling body"),
        pytest.param([CHUNKED, *[chunk(b" ")] * 30], [408], id="dribbling chunks"),
        pytest.param([get("/who"), b"G"], [200, 408], id="half a second request"),
        pytest.param([get("/who"), b"", *[b"\r\n"] * 30], [200], id="empty lines behind a request"),
        pytest.param([post(b"{}") + post(b"{}")[:-1]], [200, 408], id="half of what was sent ahead"),
    ],
)
def test_a_request_that_dribbles_in_is_cut_off(
    server: Server, caplog: pytest.LogCaptureFixture, pieces: list[bytes], statuses: list[int]
) -> None:
    began = time.monotonic()
    with server.connect() as client:
        try:
            for piece in pieces:
                client.send(piece)
                time.sleep(0.03)
        except ConnectionError:
            pass  # cut off while it was still dribbling
        for status in statuses:
            assert client.status() == status
        assert client.is_closed()
    assert time.monotonic() - began > 0.35
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_incomplete_request_gets_408_with_a_reason(server: Server) -> None:
    with server.connect() as client:
        client.send(b"GET")
        status, body = client.answer()
    assert status == 408
    assert "send it again" in json.loads(body)["detail"]


def test_an_answer_may_take_longer_than_a_request(server: Server) -> None:
    with server.connect() as client:
        client.send(get("/slow/1"))
        assert client.status() == 200
        client.send(get("/who"))
        assert client.status() == 200


def test_a_connection_may_rest_between_two_requests(server: Server) -> None:
    with server.connect() as client:
        for _ in range(3):
            client.send(post())
            assert client.status() == 200
            time.sleep(0.7)


def test_pipelined_request_waits_for_the_earlier_answer(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Long enough for a busy machine, and shorter than an answer takes.
    monkeypatch.setattr(HastyProtocol, "request_seconds", 1.5)
    whole = post(b'{"a": 1}')
    with server.connect() as client:
        client.send(get("/slow/2") + whole[:20])
        assert client.answer() == (200, b'"slow"')
        # It has its time from now on.
        client.send(whole[20:])
        assert client.status() == 200
        client.send(get("/slow/2") + whole[:-1])
        assert client.answer() == (200, b'"slow"')
        client.send(whole[-1:])
        assert client.status() == 200


def test_requests_in_one_piece_are_all_answered(server: Server) -> None:
    with server.connect() as client:
        client.send((get("/who") + post()) * 500)
        assert [client.status() for _ in range(1000)] == [200] * 1000


def test_a_request_in_two_pieces_is_answered(server: Server) -> None:
    whole = post(b'{"a": 1}')
    with server.connect() as client:
        for index in range(1, len(whole), 7):
            client.send(whole[:index])
            time.sleep(0.001)
            client.send(whole[index:])
            assert client.status() == 200


def test_a_chunked_body_is_refused_as_soon_as_it_is_too_large(server: Server) -> None:
    with server.connect() as client:
        client.send(CHUNKED + chunk(b" " * 1024) * 64)
        client.send(chunk(b" "))
        # The body isn't over, and never will be.
        status, body = client.answer()
        assert status == 413
        assert json.loads(body) == {"detail": "The body is larger than 64 KiB; send less metadata"}
        # Who goes on sending hears it too, and is cut off after a time.
        with pytest.raises(ConnectionError):
            client.send_slowly(chunk(b" " * 1024) for _ in range(1000))
    assert server.app.state.seen == []


def test_a_body_that_says_how_large_it_is_is_refused_before_it_comes(server: Server) -> None:
    with server.connect() as client:
        client.send(post(b" " * (MAX_BODY_BYTES + 1))[: -MAX_BODY_BYTES - 1])
        assert client.status() == 413
    with server.connect() as client:
        client.send(
            post(b" " * (MAX_BODY_BYTES + 1), b"Expect: 100-continue")[: -MAX_BODY_BYTES - 1],
        )
        assert client.status() == 413
    with server.connect() as client:
        client.send(post(b'{"a": "' + b"x" * (MAX_BODY_BYTES - 9) + b'"}'))
        assert client.status() == 200


def test_no_more_of_a_body_is_taken_than_it_needs_to_be_refused() -> None:
    taken = 0

    async def endless() -> Message:
        nonlocal taken
        taken += 16 * 1024
        return {"type": "http.request", "body": b" " * 16 * 1024, "more_body": True}

    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json"), (b"transfer-encoding", b"chunked")]
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/echo", "headers": headers}
    scope |= {"query_string": b"", "root_path": "", "scheme": "http", "server": None, "client": None}
    asyncio.run(echoing_app()(scope, endless, send))
    assert sent[0]["status"] == 413
    assert taken == MAX_BODY_BYTES + 16 * 1024


@pytest.mark.parametrize("digits", [20, 5000])
def test_a_length_that_is_no_length_is_refused(server: Server, digits: int) -> None:
    with server.connect() as client:
        client.send(b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: %b\r\n\r\n" % (b"9" * digits))
        assert client.status() in {400, 413}


def lines(size: int) -> list[bytes]:
    return [b"X-%d: %b" % (number, b"x" * 80) for number in range(size // 90)]


HUGE: dict[str, list[bytes]] = {
    "one header": [post(b"{}", b"X: " + b"x" * MAX_HEAD_BYTES)],
    "one header that doesn't end": [post()[:-6], b"\r\nX: " + b"x" * MAX_HEAD_BYTES, b"x" * 100],
    "many headers": [post(b"{}", *lines(40_000))],
    "many headers in many pieces": [post()[:-6], *[b"\r\n" + line for line in lines(40_000)]],
    "the line": [get("/" + "x" * MAX_HEAD_BYTES)],
    "far too much at once": [post(b"{}", b"X: " + b"x" * 2**20)],
    "the second of two": [post() + post(b"{}", b"X: " + b"x" * 3 * MAX_HEAD_BYTES)],
}


@pytest.mark.parametrize("pieces", HUGE.values(), ids=HUGE)
def test_a_head_that_is_too_large_is_refused(server: Server, pieces: list[bytes]) -> None:
    with server.connect() as client:
        try:
            for piece in pieces:
                client.send(piece)
        except ConnectionError:
            pass  # refused before it was over
        try:
            statuses = {client.status()}
        except ConnectionError:
            statuses = set()  # the refusal was lost, because there was more to come
        assert statuses <= {431, 200 if pieces is HUGE["the second of two"] else 431}
        if statuses == {431}:
            assert client.is_closed()
    assert len(server.app.state.seen) <= (1 if pieces is HUGE["the second of two"] else 0)


def test_too_large_head_gets_431_with_a_reason(server: Server) -> None:
    with server.connect() as client:
        client.send(b"GET /" + b"x" * MAX_HEAD_BYTES)
        status, body = client.answer()
    assert (status, json.loads(body)) == (
        431,
        {"detail": "The request's head is larger than 32 KiB; send less of it"},
    )


def test_a_large_head_and_a_large_body_come_through(server: Server) -> None:
    body = b'{"a": "' + b"x" * 60_000 + b'"}'
    with server.connect() as client:
        for _ in range(3):
            client.send(post(body, *lines(31_000)))
            assert client.status() == 200
            client.send(post(body, *lines(20_000)) * 3)
            assert [client.status() for _ in range(3)] == [200] * 3


def test_trailers_are_no_headers(server: Server) -> None:
    with server.connect() as client:
        client.send(CHUNKED + chunk(b"{}") + b"0\r\nAuthorization: Bearer x\r\nX-Forwarded-For: ::1\r\n\r\n")
        status, body = client.answer()
        assert (status, json.loads(body)["headers"]) == (
            200,
            ["host", "content-type", "transfer-encoding"],
        )
        client.send(get("/who"))
        assert client.status() == 200


@pytest.mark.parametrize("noise", [b"X-%d: %b\r\n", b"1;%d=%b"])
def test_bytes_outside_head_and_body_are_bounded(server: Server, noise: bytes) -> None:
    with server.connect() as client:
        client.send(CHUNKED + chunk(b"{}") + (b"0\r\n" if noise.startswith(b"X") else b""))
        with pytest.raises(ConnectionError):
            client.send_slowly(noise % (number, b"x" * 1000) for number in range(1000))


def test_request_of_a_client_that_disconnected_before_accept_is_dropped(server: Server) -> None:
    """After a reset the kernel gives no address any more, so the request would look like a UNIX socket's."""
    with server.connect() as first:
        first.send(get("/block"))
        assert server.app.state.blocked.wait(20)
        for _ in range(3):
            gone = server.connect()
            gone.send(get("/who"))
            gone.reset()
        server.app.state.unblock.set()
        assert first.status() == 200
        first.send(get("/who"))
        status, body = first.answer()
    assert status == 200
    assert json.loads(body)["client"][0] == "127.0.0.1"
    assert server.app.state.seen == ["who"]


def test_a_unix_socket_has_a_path_and_no_client(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with listening_at(path) as listener, Server(listener) as server, server.connect() as client:
        client.send(get("/who"))
        assert json.loads(client.answer()[1]) == {"client": None, "server": [str(path), None]}
        client.send(b"G")
        assert client.status() == 408


@pytest.mark.parametrize("given", ["a", "A-b_c.9", "x" * 64])
def test_a_request_id_is_passed_on(server: Server, given: str) -> None:
    with server.connect() as client:
        client.send(post(b"{}", b"X-Request-ID: " + given.encode()))
        assert json.loads(client.answer()[1])["request_id"] == given


@pytest.mark.parametrize("given", [b"", b"x" * 65, b"a b", b"a;b", b"a/b", b"\xc3\xa9", b"a\tb", b"%0a"])
def test_a_request_id_of_another_form_is_replaced(server: Server, given: bytes) -> None:
    with server.connect() as client:
        client.send(post(b"{}", b"X-Request-ID: " + given))
        assert re.fullmatch("[0-9a-f]{32}", json.loads(client.answer()[1])["request_id"])


def test_every_answer_has_an_id_and_is_not_to_be_kept(
    start_service: StartService, settings: dict[str, object]
) -> None:
    client = start_service(settings).client
    body = provision_body("node-1")
    twice = json.dumps(body).replace("{", '{"node_id": "node-0", ', 1)
    answers = [
        (200, client.post(PROVISION, json=body)),
        (409, client.post(PROVISION, json=body)),
        (503, client.post(PROVISION, json=provision_body("node-2"))),
        (422, client.post(PROVISION, json={})),
        (422, client.post(PROVISION, content=twice, headers=JSON)),
        (422, client.post(PROVISION, content=b"\xff", headers=JSON)),
        (413, client.post(PROVISION, content=b" " * (MAX_BODY_BYTES + 1), headers=JSON)),
        (200, client.get(PEERS)),
        (404, client.get(f"{PEERS}/nobody")),
        (404, client.delete(f"{PEERS}/nobody")),
        (200, client.get("/healthz")),
        (503, client.get("/readyz")),
    ]
    assert [answer.status_code for _, answer in answers] == [status for status, _ in answers]
    ids = {answer.headers["X-Request-ID"] for _, answer in answers}
    assert len(ids) == len(answers)
    assert all(re.fullmatch("[0-9a-f]{32}", request_id) for request_id in ids)
    assert {answer.headers["Cache-Control"] for _, answer in answers} == {"no-store"}
    named = client.get("/healthz", headers={"X-Request-ID": "my-own.id_1"})
    assert named.headers.get_list("X-Request-ID") == ["my-own.id_1"]
    assert answers[4][1].json() == {
        "detail": [{"type": "json_invalid", "loc": ["body"], "msg": "An object has the same key twice"}]
    }
    assert answers[5][1].json() == {
        "detail": [{"type": "json_invalid", "loc": ["body"], "msg": "The body is not UTF-8"}]
    }


def test_garbage_is_logged_once_not_each_time(
    start_service: StartService, settings: dict[str, object]
) -> None:
    service = start_service(settings)
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", service.port), 10) as connection:
            connection.sendall(b"GARBAGE\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 400 ")
    assert service.log.count("Invalid HTTP request received.") == 1


def test_the_service_bounds_the_head(start_service: StartService, settings: dict[str, object]) -> None:
    service = start_service(settings)
    with socket.create_connection(("127.0.0.1", service.port), 10) as connection:
        client = Client(connection)
        client.send(b"GET /" + b"x" * MAX_HEAD_BYTES)
        assert client.status() == 431


def test_the_service_listens_on_a_unix_socket(
    start_service: StartService, settings: dict[str, object], tmp_path: Path
) -> None:
    path = tmp_path / "hub.sock"
    service = start_service(settings | {"WIREGUARD_IP_POOL": "10.0.0.0/24"}, unix_socket=path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert service.client.post(PROVISION, json=provision_body("node-1")).status_code == 200
    assert f"socket={path}" in service.log
    # What a dead one has left is replaced.
    service.kill()
    assert path.is_socket()
    service.start()
    assert list(service.client.get(PEERS).json()) == ["node-1"]
    # A second one doesn't take it away.
    other = settings | {"WIREGUARD_CONFIG_PATH": tmp_path / "wg1.conf"}
    second = start_service(other, unix_socket=path, ready=None)
    assert second.wait_exit() == 1
    assert f"error: The socket {path} is already managed by another process" in second.log
    assert service.client.get("/healthz").status_code == 200
    assert service.terminate() == 0
    assert not path.exists()


def test_a_path_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(StartRefusedError, match="is no socket"), listening_at(path):
        pass
    assert path.read_text() == "mine"
    with pytest.raises(StartRefusedError, match="choose another"), listening_at(tmp_path / ("x" * 120)):
        pass


def test_a_socket_that_others_listen_on_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as holder:
        holder.bind(str(path))
        holder.listen(0)
        for _ in range(3):  # until its queue is full, too
            with pytest.raises(StartRefusedError, match="listened on by another process"), listening_at(path):
                pass
        assert path.is_socket()
    # Nobody holds it any more.
    with listening_at(path):
        assert path.is_socket()
    assert not path.exists()


def test_a_unix_socket_takes_the_place_of_a_port(tmp_path: Path, settings: dict[str, object]) -> None:
    service = ServiceProcess(tmp_path, settings, unix_socket=tmp_path / "socket", ready=None)
    service._listening = lambda: ["--port", "8001", "--unix-socket", "socket"]  # type: ignore[method-assign] # this one only
    service.start()
    assert service.wait_exit() == 1
    assert service.log == "error: --unix-socket takes the place of --host and --port; leave those out\n"
    service.close()
    with pytest.raises(httpx.TransportError):
        httpx.get("http://127.0.0.1:8001/healthz", trust_env=False)
