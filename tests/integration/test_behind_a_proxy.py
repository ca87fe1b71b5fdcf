"""X-Forwarded-For counts from a trusted proxy, and from no other address."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import httpx
import pytest

from backend.adapters.http.connections import Connections
from backend.adapters.http.http_protocol import BoundedProtocol
from backend.models.access.sources import TrustedProxies
from tests.harness.patience import eventually
from tests.harness.raw_http import Client, Server
from tests.harness.requests import API, bearer, provision_body
from tests.harness.service import ServiceProcess, StartService


@pytest.fixture
def service(start_service: StartService, settings: dict[str, object]) -> ServiceProcess:
    """Return a hub that trusts 127.0.0.1, and no other address of this host."""
    return start_service(
        {name: value for name, value in settings.items() if name != "ENABLE_DBOS"}
        | {
            "WIREGUARD_IP_POOL": "10.0.0.0/24",
            "WIREGUARD_TRUSTED_PROXIES": "127.0.0.1",
            "WIREGUARD_RATE_LIMIT_FAILED_AUTHENTICATION": "3/minute",
        }
    )


def behind(source: str) -> dict[str, str]:
    # What comes before the last hop is the client's own invention.
    return {"X-Forwarded-For": f"192.0.2.99, {source}", "X-Real-IP": "192.0.2.98", "Forwarded": "for=1.1.1.1"}


def test_limits_audit_and_source_cidr_go_by_the_last_hop(service: ServiceProcess) -> None:
    token = service.credential("token", "create", "--max-uses", "5", "--source-cidr", "203.0.113.0/24")
    shown = bearer(token)
    provision = partial(service.client.post, f"{API}/provision")
    assert provision(json=provision_body("a"), headers=shown | behind("203.0.113.7")).status_code == 200
    statuses = [
        provision(json=provision_body("b"), headers=shown | behind("198.51.100.1")).status_code
        for _ in range(5)
    ]
    # One client's failures are not another's, nor the proxy's.
    assert statuses == [401] * 3 + [429] * 2
    assert provision(json=provision_body("b"), headers=shown | behind("203.0.113.8")).status_code == 200
    rows = service.client.get(f"{API}/audit").json()["entries"]
    assert {row["source"] for row in rows if row["action"] == "provision"} == {"203.0.113.7", "203.0.113.8"}
    assert {row["source"] for row in rows if row["outcome"] == "refused"} == {"198.51.100.1"}


def test_header_from_any_other_address_is_not_believed(service: ServiceProcess) -> None:
    token = service.credential("token", "create", "--source-cidr", "203.0.113.0/24")
    transport = httpx.HTTPTransport(local_address="127.0.0.2")
    with httpx.Client(base_url=service.url, transport=transport, timeout=30) as client:
        headers = bearer(token) | behind("203.0.113.7")
        answer = client.post(f"{API}/provision", json=provision_body("a"), headers=headers)
    assert answer.status_code == 401
    rows = service.client.get(f"{API}/audit").json()["entries"]
    assert {row["source"] for row in rows if row["outcome"] == "refused"} == {"127.0.0.2"}


@pytest.fixture
def server() -> Iterator[tuple[Server, Connections]]:
    counted = Connections(100, 2)
    proxies = TrustedProxies.parse("127.0.0.1")
    protocol = partial(BoundedProtocol, connections=counted, proxies=proxies)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        Server(listener, protocol) as running,
    ):
        yield running, counted


def ask(path: str, source: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: hub\r\nX-Forwarded-For: {source}\r\n\r\n".encode()


def test_proxys_connections_count_for_the_client_that_each_is_used_for(
    server: tuple[Server, Connections],
) -> None:
    running, counted = server
    with ExitStack() as stack:
        # More than one source may have, and it is the proxy's to keep them.
        connections: list[Client] = [stack.enter_context(running.connect()) for _ in range(6)]
        for number, connection in enumerate(connections):
            connection.send(ask("/who", f"203.0.113.{number}"))
            assert connection.status() == 200
        for connection in connections[:2]:
            connection.send(ask("/slow/1", "203.0.113.7"))
        eventually(lambda: running.app.state.seen.count("slow") == 2)
        connections[2].send(ask("/who", "203.0.113.7"))
        assert connections[2].status() == 429
        connections[3].send(ask("/who", "203.0.113.8"))
        assert connections[3].status() == 200
        for connection in connections[:2]:
            assert connection.status() == 200
        connections[4].send(ask("/who", "203.0.113.7"))
        assert connections[4].status() == 200
    eventually(lambda: len(counted) == 0)
    assert counted._of_source == {}


def test_invalid_trusted_proxy_refuses_the_start(
    start_service: StartService, settings: dict[str, object], tmp_path: Path
) -> None:
    service = start_service(settings | {"WIREGUARD_TRUSTED_PROXIES": "10.0.0.1/8"}, ready=None)
    assert service.wait_exit() == 1
    assert "WIREGUARD_TRUSTED_PROXIES has a network with host bits set" in service.log
