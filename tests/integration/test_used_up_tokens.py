"""A used-up token repeats its answers, a limited number of times, and nothing else."""

import json
import socket
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, Final

import httpx
import pytest

from tests.harness.credentials import audit_entries, new_token, refusals, token_id, uses, with_admin_key
from tests.harness.hosts import LocalHost
from tests.harness.patience import eventually
from tests.harness.requests import API, NO_TLS, PROVISION, bearer, provision_body
from tests.harness.service import ServiceProcess
from tests.harness.three_places import settings_for
from tests.harness.wireguard import HubInterface

# Failures in a minute, for each test an address and a token of its own.
LIMIT: Final = 16
# Requests with one token in a minute.
RATE: Final = 30
_NUMBERS: Final = count(1)


@pytest.fixture(scope="module")
def service(needs_wireguard: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """Give the module a hub without an interface, where one may fail a few times."""
    directory = tmp_path_factory.mktemp("used-up")
    settings = settings_for(
        HubInterface(LocalHost(), "wgusedup", directory),
        directory,
        WIREGUARD_RELOAD="off",
        WIREGUARD_RATE_LIMIT_TOKEN=f"{RATE}/minute",
        WIREGUARD_RATE_LIMIT_FAILED_AUTHENTICATION=f"{LIMIT}/minute",
    )
    with ServiceProcess(directory, settings) as service:
        yield with_admin_key(service)


class Source:
    """A client at an address of its own on this host."""

    def __init__(self, service: ServiceProcess, address: str) -> None:
        self.client = httpx.Client(
            base_url=service.url,
            transport=httpx.HTTPTransport(local_address=address, verify=NO_TLS),
            timeout=20.0,
        )

    def provision(self, token: str, body: dict[str, Any], **headers: str) -> httpx.Response:
        return self.client.post(PROVISION, json=body, headers={**bearer(token), **headers})


@pytest.fixture
def source(service: ServiceProcess) -> Iterator[Callable[[], Source]]:
    """Make sources, each at an address that no other test has."""
    made: list[Source] = []

    def make() -> Source:
        made.append(Source(service, f"127.0.7.{next(_NUMBERS)}"))
        return made[-1]

    yield make
    for each in made:
        each.client.close()


def used_token(service: ServiceProcess, node_id: str) -> tuple[str, dict[str, Any]]:
    """Return a token that is used up, and the body of the request that it was used for."""
    token, body = new_token(service), provision_body(node_id)
    service.client.post(PROVISION, json=body, headers=bearer(token)).raise_for_status()
    return token, body


def test_flood_with_a_used_up_token_is_refused_before_its_bodies_are_read(
    service: ServiceProcess, source: Callable[[], Source]
) -> None:
    """Otherwise a few connections are enough to make honest nodes wait for seconds."""
    token, body = used_token(service, "flooded")
    flooder = source()
    answers = [
        flooder.provision(token, provision_body(f"flood-{number}"), **{"Idempotency-Key": f"key-{number}"})
        for number in range(LIMIT + 5)
    ]
    assert [answer.status_code for answer in answers] == [401] * LIMIT + [429] * 5
    assert 1 <= int(answers[-1].headers["Retry-After"]) <= 60
    # The repeat, too, has to wait: nothing is read of what is turned away.
    assert flooder.provision(token, body).status_code == 429
    assert uses(service)[token_id(token)] == 1


def test_refused_request_gets_no_100_continue(service: ServiceProcess, source: Callable[[], Source]) -> None:
    token, _ = used_token(service, "unread")
    flooder = source()
    for _ in range(LIMIT):
        flooder.provision(token, {})
    head = [f"POST {PROVISION} HTTP/1.1", "Host: hub", f"Authorization: Bearer {token}"]
    head += ["Content-Type: application/json", "Content-Length: 60000", "Expect: 100-continue"]
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as connection:
        connection.sendall("\r\n".join([*head, "", ""]).encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 429 ")


def test_failures_count_for_the_token_and_for_the_source(
    service: ServiceProcess, source: Callable[[], Source]
) -> None:
    spent, other = (used_token(service, name) for name in ("counted-1", "counted-2"))
    fresh = new_token(service)
    here, there = source(), source()
    for _ in range(LIMIT):
        assert here.provision(spent[0], {}).status_code == 401
    # A token that is known to many isn't tried from one address after the other.
    assert there.provision(*spent).status_code == 429
    # Nor are many tokens tried from one address.
    assert here.provision(*other).status_code == 429
    # Each request has counted once, for each of the two.
    assert there.provision(*other).status_code == 409
    # Others may share the address, and come in with what is good.
    assert here.provision(fresh, provision_body("counted-3")).status_code == 200


def test_used_up_token_gets_the_common_401_for_anything_but_a_repeat(
    service: ServiceProcess, source: Callable[[], Source]
) -> None:
    """What is wrong with a request is for callers whose credential is good."""
    token, body = used_token(service, "repeated")
    own = body["wireguard_public_key"]
    anothers = used_token(service, "not-repeated")[1]["wireguard_public_key"]
    bodies: list[bytes] = [
        json.dumps(each).encode()
        for each in (
            provision_body("another"),
            provision_body("repeated"),
            provision_body("another", own),
            {**body, "public_key": "another"},
            {**body, "wireguard_public_key": anothers},
            {**body, "node_id": ["repeated"]},
            {**body, "wireguard_public_key": {"key": own}},
            [body],
            {"wireguard_public_key": own},
        )
    ]
    bodies += [b"", b"{", b"[" * 1000, b'{"node_id": "repeated"}' + b" " * 70_000]
    client, headers = source().client, {**bearer(token), "Content-Type": "application/json"}
    # In chunks: what says beforehand that it is too long is refused to everybody.
    answers = [client.post(PROVISION, content=iter([content]), headers=headers) for content in bodies]
    assert [answer.status_code for answer in answers] == [401] * len(bodies)
    assert len({answer.content for answer in answers}) == 1
    assert client.post(PROVISION, json=body, headers=bearer(token)).status_code == 409
    assert {answer.headers["WWW-Authenticate"] for answer in answers} == {"Bearer"}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "peers"),
        ("GET", "peers/elsewhere"),
        ("DELETE", "peers/elsewhere"),
        ("GET", "pool/stats"),
        ("POST", "tokens"),
        ("POST", "challenge"),
    ],
)
def test_used_up_token_gets_the_common_401_at_other_endpoints(
    service: ServiceProcess, source: Callable[[], Source], method: str, path: str
) -> None:
    token, _ = used_token(service, f"elsewhere-{method}-{path.replace('/', '-')}")
    stranger = source().client
    answer = stranger.request(method, f"{API}/{path}", headers=bearer(token))
    nobody = stranger.request(method, f"{API}/{path}")
    assert (answer.status_code, answer.content) == (nobody.status_code, nobody.content)
    assert answer.status_code == 401


def test_a_node_that_lost_its_answer_gets_it_again(
    service: ServiceProcess, source: Callable[[], Source]
) -> None:
    token, body = new_token(service), provision_body("lost")
    node, once = source(), {"Idempotency-Key": "lost"}
    first = node.provision(token, body, **once)
    assert first.status_code == 200
    again = node.provision(token, body, **once)
    assert (again.status_code, again.content) == (200, first.content)
    retry = node.provision(token, {**body, "version": "1.0.1"})
    assert retry.status_code == 409
    assert retry.json()["detail"]["existing_config"] == first.json()["config"]
    service.restart()
    assert node.provision(token, body).status_code == 409
    assert uses(service)[token_id(token)] == 1


def test_a_client_that_goes_away_in_the_middle_of_its_body_is_only_refused(
    service: ServiceProcess, source: Callable[[], Source]
) -> None:
    token, _ = used_token(service, "cut-off")
    before = refusals(service, "used_up")
    head = [f"POST {PROVISION} HTTP/1.1", "Host: hub", f"Authorization: Bearer {token}"]
    head += ["Content-Type: application/json", "Content-Length: 100", "Expect: 100-continue"]
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as connection:
        connection.sendall("\r\n".join([*head, "", ""]).encode())
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"{")
    eventually(lambda: refusals(service, "used_up") == before + 1)
    assert "Traceback" not in service.log


def test_a_409_counts_against_the_tokens_rate_and_not_against_its_uses(service: ServiceProcess) -> None:
    """Otherwise a token asks for as many names as it likes."""
    token, body = new_token(service, max_uses=2), provision_body("counted")
    statuses = [
        service.client.post(PROVISION, json=body, headers=bearer(token)).status_code for _ in range(RATE + 1)
    ]
    assert statuses == [200] + [409] * (RATE - 1) + [429]
    assert uses(service)[token_id(token)] == 1
    assert audit_entries(service, subject=body["node_id"], action="provision")[-1]["outcome"] == "accepted"
