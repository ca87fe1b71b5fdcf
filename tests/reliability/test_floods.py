"""Many connections, and clients that never read: over real sockets, and with few file descriptors."""

import asyncio
import json
import logging
import re
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from backend.adapters.http.connections import Connections, divide_descriptors
from backend.adapters.http.http_protocol import MAX_AHEAD, BoundedProtocol
from backend.adapters.http.unix_socket import listening_at
from backend.adapters.wireguard.host_link import HostLinks, interface_exists
from backend.errors import HubUpdateError
from tests.harness.patience import eventually
from tests.harness.raw_http import Client, HastyProtocol, Server, connections, get, post
from tests.harness.requests import PROVISION, provision_body
from tests.harness.service import StartService
from tests.harness.three_places import settings_for
from tests.harness.wireguard import HubInterface

STALLED_SECONDS = 0.5
LARGE = 4 * 1024 * 1024


@contextmanager
def serving(most: int = 100, most_of_one_source: int = 100) -> Iterator[tuple[Server, Connections]]:
    counted = Connections(most, most_of_one_source, stalled_seconds=STALLED_SECONDS)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # So that the kernel takes little of what the client doesn't read.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 * 1024)
        with Server(listener, partial(HastyProtocol, connections=counted)) as server:

            @server.app.get("/large")
            async def large() -> str:
                return "x" * LARGE

            yield server, counted


def receive_all(client: Client) -> None:
    while client._connection.recv(65536):
        pass


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(get("/who") * 3000, id="sent ahead"),
        pytest.param(get("/large"), id="one large answer"),
        pytest.param(get("/large").replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), id="to be closed"),
        pytest.param(post() * 3000 + b"GET /wh", id="sent ahead, and half a request"),
    ],
)
def test_client_that_never_reads_is_cut_off(sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with serving() as (server, counted), server.connect() as client:
        client.send(sent)
        eventually(lambda: len(connections(server)) == 1)
        eventually(lambda: connections(server) == [])
        assert len(counted) == 0
        # What it had not read by then is lost.
        with pytest.raises(ConnectionResetError):
            receive_all(client)
    # One for each connection would fill the log.
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_client_that_reads_slowly_gets_all_of_its_answer() -> None:
    with serving() as (server, _), server.connect() as client:
        client._connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 * 1024)
        client.send(get("/large"))
        began = time.monotonic()
        received = 0
        while received < LARGE:
            # Until it has lasted long enough.
            if time.monotonic() - began < 3 * STALLED_SECONDS:
                time.sleep(STALLED_SECONDS / 20)
            data = client._connection.recv(16 * 1024)
            assert data, "cut off"
            received += len(data)


def test_requests_that_are_sent_ahead_are_not_all_parsed_at_once() -> None:
    with serving() as (server, _), server.connect() as client:
        client.send(get("/slow/0.3") + get("/who") * 3000)
        eventually(lambda: len(connections(server)) == 1)
        (connection,) = connections(server)
        eventually(lambda: len(connection.pipeline) > 0)
        # A piece may hold some more than that.
        assert len(connection.pipeline) <= MAX_AHEAD + 2048 // len(get("/who"))
        assert client.answer() == (200, b'"slow"')
        assert [client.status() for _ in range(3000)] == [200] * 3000


def test_half_closed_connection_gets_the_answers_to_all_that_was_sent_ahead() -> None:
    with serving() as (server, _), server.connect() as client:
        client.send(get("/slow/0.1") + get("/who") * 1000)
        client._connection.shutdown(socket.SHUT_WR)
        assert [client.status() for _ in range(1001)] == [200] * 1001
        assert client.is_closed()


def test_connections_over_the_limit_of_a_source_get_a_429(caplog: pytest.LogCaptureFixture) -> None:
    with serving(most_of_one_source=2) as (server, counted), ExitStack() as stack:
        for _ in range(2):
            client = stack.enter_context(server.connect())
            client.send(get("/who"))
            assert client.status() == 200
        with server.connect() as third:
            status, body = third.answer()
            assert (status, third.is_closed()) == (429, True)
        assert "Too many connections from this address" in json.loads(body)["detail"]
        assert "connections_refused" in caplog.messages
        stack.close()
        eventually(lambda: len(counted) == 0)
        with server.connect() as again:
            again.send(get("/who"))
            assert again.status() == 200


def test_connections_over_the_limit_get_a_503_and_those_by_unix_socket_count_too(tmp_path: Path) -> None:
    counted = Connections(2, 1)
    protocol = partial(BoundedProtocol, connections=counted)
    with listening_at(tmp_path / "socket") as listener, Server(listener, protocol) as server:
        with server.connect() as first, server.connect() as second:
            for client in (first, second):
                client.send(get("/who"))
                assert client.status() == 200
            with server.connect() as third:
                status, body = third.answer()
                assert (status, third.is_closed()) == (503, True)
        assert json.loads(body)["detail"] == "Too many connections; ask again later"
        eventually(lambda: len(counted) == 0)


def test_ipv6_sources_count_by_their_64_and_mapped_ones_as_ipv4() -> None:
    counted = Connections(10, 1)

    class Made:
        transport = asyncio.Transport()

    def status(address: str) -> object:
        async def add() -> object:
            return counted.add(Made(), address)

        return asyncio.run(add())

    assert [status("2001:db8::1"), status("2001:db8::2"), status("2001:db8:0:1::1")] == [None, 429, None]
    assert [status("::ffff:192.0.2.1"), status("192.0.2.1")] == [None, 429]


def test_limit_on_descriptors_is_divided() -> None:
    assert divide_descriptors(8192) == (1024, 6912)
    assert divide_descriptors(1024) == (128, 640)


def test_service_raises_its_limit_on_descriptors(
    start_service: StartService, settings: dict[str, object]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        service = start_service(settings)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert resource.prlimit(service.pid, resource.RLIMIT_NOFILE) == (min(hard, 8192), hard)


def test_flood_of_connections_leaves_descriptors_for_a_provision(
    start_service: StartService, hub_interface: HubInterface, tmp_path: Path
) -> None:
    configured = settings_for(hub_interface, tmp_path) | {
        "DESCRIPTORS": 256,
        "WIREGUARD_MAX_CONNECTIONS_PER_SOURCE": 100,
    }
    service = start_service(configured, module=("tests.harness.few_descriptors",))
    with ExitStack() as stack:
        for number in range(300):
            if number % 20 == 0:  # an honest client keeps its connection
                assert service.client.get("/healthz").status_code == 200
            source = (f"127.0.0.{2 + number % 3}", 0)
            connection = socket.create_connection(("127.0.0.1", service.port), 10, source)
            with suppress(ConnectionError):  # refused
                stack.enter_context(Client(connection)).send(get("/healthz") * 5)
        assert "connections_refused" in service.log
        for number in range(5):
            answer = service.client.post(PROVISION, json=provision_body(f"node-{number}"))
            assert answer.status_code == 200, answer.text
        assert service.open_descriptors < 256
    assert "connections_limited_by_descriptors" in service.log


def test_too_many_open_files_is_never_taken_for_no_interface(
    start_service: StartService, hub_interface: HubInterface, tmp_path: Path
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path))
    assert service.client.post(PROVISION, json=provision_body("node-0")).status_code == 200
    limit = resource.prlimit(service.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(service.pid, resource.RLIMIT_NOFILE, (3, limit[1]))
    answer = service.client.post(PROVISION, json=provision_body("node-1"))
    ready = service.client.get("/readyz")
    resource.prlimit(service.pid, resource.RLIMIT_NOFILE, limit)
    assert (answer.status_code, ready.status_code) == (503, 503)
    for said in (answer.text, ready.text, service.log):
        assert "does not exist" not in said
    eventually(lambda: service.client.get("/readyz").status_code == 200)
    assert service.client.post(PROVISION, json=provision_body("node-1")).status_code == 200


@contextmanager
def no_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_interface_is_looked_up_without_a_new_descriptor() -> None:
    links = HostLinks()
    index = socket.if_nametoindex("lo")
    assert links.index("lo") == index
    with no_descriptors():
        assert links.index("lo") == index
        assert links.index("nothing0") is None
        with pytest.raises(HubUpdateError, match=re.escape("interface lo can't be looked at (Too many open")):
            HostLinks().index("lo")
        with pytest.raises(HubUpdateError, match="Too many open files"):
            interface_exists("lo")
    links.close()
    assert interface_exists("lo")
    assert not interface_exists("nothing0")
