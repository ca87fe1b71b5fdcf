"""A token admits as many nodes as it has uses, with concurrent clients, failures and kills."""

import asyncio
import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from tests.benchmarks.load import encode
from tests.harness.credentials import audit_entries, new_token, refusals, token_id, uses, with_admin_key
from tests.harness.failing_wg import FailingWg
from tests.harness.patience import eventually
from tests.harness.requests import API, NO_TLS, PEERS, PROVISION, bearer, new_key, provision_body
from tests.harness.service import ServiceProcess, StartService
from tests.harness.three_places import assert_in_step, in_file, listed, settings_for
from tests.harness.torture import TORTURE
from tests.harness.wireguard import HubInterface

Answers = Sequence[tuple[int, bytes]]

CLIENTS: Final = 64
RACES: Final = pytest.mark.parametrize(
    "races", [15, pytest.param(200, marks=pytest.mark.torture(only=True))], ids=["few", "many"]
)


def enrolment(service: ServiceProcess, token: str, body: dict[str, Any]) -> bytes:
    """Return a request to provision, as it goes over the wire."""
    request = encode({"method": "POST", "path": PROVISION, "body": body}, service.port)
    return request.replace(b"\r\n\r\n", f"\r\nAuthorization: Bearer {token}\r\n\r\n".encode(), 1)


class Crowd:
    """Keep-alive connections that all send at the same moment."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connections: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def race(self, requests: Sequence[bytes]) -> Answers:
        """Send each request over a connection of its own and return all answers: status, body."""
        while len(self._connections) < len(requests):
            self._connections.append(await asyncio.open_connection("127.0.0.1", self._port))
        for (_, writer), request in zip(self._connections, requests, strict=False):
            writer.write(request)
        readers = [reader for reader, _ in self._connections[: len(requests)]]
        return await asyncio.gather(*(self._answer(reader) for reader in readers))

    async def close(self) -> None:
        for _, writer in self._connections:
            writer.close()
            await writer.wait_closed()

    @staticmethod
    async def _answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
        status = int((await reader.readline()).split()[1])
        length = 0
        while (line := await reader.readline()) != b"\r\n":
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        return status, await reader.readexactly(length)


def run_races(service: ServiceProcess, races: Sequence[Sequence[bytes]]) -> list[Answers]:
    """Run one race after the other over the same connections."""

    async def run() -> list[Answers]:
        crowd = Crowd(service.port)
        try:
            return [await crowd.race(requests) for requests in races]
        finally:
            await crowd.close()

    return asyncio.run(run())


def assert_single_use_tokens_let_one_in_each(service: ServiceProcess, rounds: int) -> None:
    """Have a crowd race for one token after the other."""
    tokens = [new_token(service) for _ in range(rounds)]
    races = [
        [enrolment(service, token, provision_body(f"node-{number}-{client}")) for client in range(CLIENTS)]
        for number, token in enumerate(tokens)
    ]
    results = run_races(service, races)
    for answers in results:
        assert Counter(status for status, _ in answers) == {200: 1, 401: CLIENTS - 1}
    assert len({body for answers in results for status, body in answers if status == 401}) == 1
    assert uses(service) == {token_id(token): 1 for token in tokens}
    peers = listed(service)
    assert Counter(int(node.split("-")[1]) for node in peers) == dict.fromkeys(range(rounds), 1)
    stats = service.client.get(f"{API}/pool/stats").json()
    assert stats["allocated_addresses"] == rounds
    assert stats["available_addresses"] == stats["total_addresses"] - stats["reserved_addresses"] - rounds
    assert refusals(service, "used_up") == rounds * (CLIENTS - 1)
    provisioned = audit_entries(service, action="provision")
    assert {entry["outcome"] for entry in provisioned} == {"accepted"}
    assert Counter(entry["actor"] for entry in provisioned) == {f"token:{token_id(t)}": 1 for t in tokens}


@RACES
def test_single_use_token_admits_one_of_64_clients(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path, races: int
) -> None:
    # Each request under way holds an address.
    settings = settings_for(hub_interface, tmp_path, WIREGUARD_IP_POOL="10.0.0.0/22")
    service = with_admin_key(start_service(settings))
    assert_single_use_tokens_let_one_in_each(service, races)
    before = assert_in_step(service, hub_interface)
    assert len(before) == races
    service.restart()
    assert assert_in_step(service, hub_interface) == before
    assert set(uses(service).values()) == {1}


@RACES
def test_single_use_token_admits_one_of_64_clients_on_postgresql(
    hub_interface: HubInterface,
    start_service: StartService,
    tmp_path: Path,
    postgres_database: str,
    races: int,
) -> None:
    settings = settings_for(
        hub_interface,
        tmp_path,
        DATABASE_URL=postgres_database,
        WIREGUARD_IP_POOL="10.0.0.0/22",
        WIREGUARD_RELOAD="off",
    )
    service = with_admin_key(start_service(settings))
    assert_single_use_tokens_let_one_in_each(service, races)
    peers = {node: peer["assigned_ip"] for node, peer in listed(service).items()}
    assert {node: address for node, (_, address) in in_file(hub_interface.config_path).items()} == peers


@pytest.fixture(params=["sqlite", "postgresql"])
def service(
    request: pytest.FixtureRequest, hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> ServiceProcess:
    """Give the test a service with an interface, its records in either database, and an admin's key."""
    over = {}
    if request.param == "postgresql":
        over = {"DATABASE_URL": request.getfixturevalue("postgres_database")}
    return with_admin_key(start_service(settings_for(hub_interface, tmp_path, **over)))


def test_token_with_five_uses_admits_five_of_many_clients(
    service: ServiceProcess, hub_interface: HubInterface
) -> None:
    tokens = [new_token(service, max_uses=5) for _ in range(10)]
    races = [
        [enrolment(service, token, provision_body(f"node-{n}-{client}")) for client in range(CLIENTS)]
        for n, token in enumerate(tokens)
    ]
    for answers in run_races(service, races):
        assert Counter(status for status, _ in answers) == {200: 5, 401: CLIENTS - 5}
    assert uses(service) == {token_id(token): 5 for token in tokens}
    assert len(assert_in_step(service, hub_interface)) == 50


def test_listing_tokens_during_a_race_loses_no_use(
    service: ServiceProcess, hub_interface: HubInterface
) -> None:
    token = new_token(service, max_uses=150)
    enough = threading.Event()

    def look() -> None:
        while not enough.is_set():
            uses(service)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        races = [
            [enrolment(service, token, provision_body(f"node-{n}-{client}")) for client in range(8)]
            for n in range(20)
        ]
        answers = [status for answers in run_races(service, races) for status, _ in answers]
    finally:
        enough.set()
        for thread in threads:
            thread.join()
    assert Counter(answers) == {200: 150, 401: 10}
    assert uses(service) == {token_id(token): 150}
    assert len(assert_in_step(service, hub_interface)) == 150


def test_used_up_token_repeats_the_answer_for_its_own_node_only(
    service: ServiceProcess, hub_interface: HubInterface
) -> None:
    token = new_token(service)
    body = provision_body("node-1")
    config = service.client.post(PROVISION, json=body, headers=bearer(token)).json()["config"]
    retry = service.client.post(PROVISION, json=body, headers=bearer(token))
    assert retry.status_code == 409
    assert retry.json()["detail"]["existing_config"] == config
    key = body["wireguard_public_key"]
    others = (
        provision_body("node-2"),
        provision_body("node-2", key),
        provision_body("node-1"),
        provision_body("node-1", key, public_key="another"),
    )
    answers = [service.client.post(PROVISION, json=other, headers=bearer(token)) for other in others]
    assert [answer.status_code for answer in answers] == [401] * len(others)
    assert {answer.headers["WWW-Authenticate"] for answer in answers} == {"Bearer"}
    assert len({answer.text for answer in answers}) == 1
    assert uses(service) == {token_id(token): 1}
    assert set(assert_in_step(service, hub_interface)) == {"node-1"}
    # Also where all that is left of it is what the records have.
    service.restart()
    assert service.client.post(PROVISION, json=body, headers=bearer(token)).status_code == 409
    assert service.client.post(PROVISION, json=others[2], headers=bearer(token)).status_code == 401
    assert uses(service) == {token_id(token): 1}


def test_removing_a_node_does_not_return_its_tokens_use(
    service: ServiceProcess, hub_interface: HubInterface
) -> None:
    token = new_token(service)
    body = provision_body("node-1")
    service.client.post(PROVISION, json=body, headers=bearer(token)).raise_for_status()
    service.client.delete(f"{PEERS}/node-1").raise_for_status()
    assert service.client.post(PROVISION, json=body, headers=bearer(token)).status_code == 401
    service.restart()
    assert service.client.post(PROVISION, json=body, headers=bearer(token)).status_code == 401
    assert uses(service) == {token_id(token): 1}
    assert assert_in_step(service, hub_interface) == {}


def test_failed_change_returns_its_tokens_use(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    wg = FailingWg(tmp_path / "bin")
    service = with_admin_key(start_service(settings_for(hub_interface, tmp_path), path_prefix=wg.directory))
    token = new_token(service)
    wg.be("fails")
    answer = service.client.post(PROVISION, json=provision_body("node-1"), headers=bearer(token))
    assert answer.status_code == 503
    assert uses(service) == {token_id(token): 0}
    (revert,) = audit_entries(service, action="revert")
    assert (revert["subject"], revert["actor"], revert["outcome"]) == ("node-1", "service", "noted")
    assert "wg" in revert["reason"]
    wg.be("works")
    eventually(lambda: service.client.get("/readyz").status_code == 200)
    # Another node may have it now: nothing is bound to who was told that it isn't in.
    service.client.post(PROVISION, json=provision_body("node-2"), headers=bearer(token)).raise_for_status()
    assert uses(service) == {token_id(token): 1}
    assert set(assert_in_step(service, hub_interface)) == {"node-2"}


def test_missing_interface_costs_a_token_no_use(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    service = with_admin_key(start_service(settings_for(hub_interface, tmp_path)))
    token = new_token(service)
    hub_interface.down()
    answer = service.client.post(PROVISION, json=provision_body("node-1"), headers=bearer(token))
    assert answer.status_code == 503
    assert uses(service) == {token_id(token): 0}
    hub_interface.start()
    eventually(lambda: service.client.get("/readyz").status_code == 200)
    service.client.post(PROVISION, json=provision_body("node-1"), headers=bearer(token)).raise_for_status()
    assert uses(service) == {token_id(token): 1}
    assert set(assert_in_step(service, hub_interface)) == {"node-1"}


def test_returned_use_is_usable_even_if_it_was_listed_as_used(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    wg = FailingWg(tmp_path / "bin")
    service = with_admin_key(start_service(settings_for(hub_interface, tmp_path), path_prefix=wg.directory))
    token = new_token(service)
    wg.be("held")
    answers: list[httpx.Response] = []

    def ask() -> None:
        body = provision_body("node-1")
        answers.append(service.client.post(PROVISION, json=body, headers=bearer(token), timeout=60.0))

    waiting = threading.Thread(target=ask)
    waiting.start()
    eventually(lambda: uses(service) == {token_id(token): 1})
    wg.be("fails")
    waiting.join()
    assert [answer.status_code for answer in answers] == [503]
    wg.be("works")
    eventually(lambda: service.client.get("/readyz").status_code == 200)
    answer = service.client.post(PROVISION, json=provision_body("node-1"), headers=bearer(token))
    assert answer.status_code == 200, answer.text
    assert uses(service) == {token_id(token): 1}


@dataclass
class Enroller:
    """Provisions nodes with a token until the service is dead; keeps the answers."""

    url: str
    token: str
    names: Iterator[str]
    acknowledged: dict[str, str] = field(default_factory=dict)
    statuses: Counter[int] = field(default_factory=Counter)

    def work(self) -> None:
        with (
            httpx.Client(
                base_url=self.url, timeout=20.0, trust_env=False, verify=NO_TLS, headers=bearer(self.token)
            ) as client,
            contextlib.suppress(httpx.TransportError),
        ):
            for name in self.names:
                answer = client.post(PROVISION, json=provision_body(name, new_key()))
                self.statuses[answer.status_code] += 1
                if answer.status_code == 200:
                    self.acknowledged[name] = answer.json()["config"]["assigned_ip"]


def any_refused(enrollers: Sequence[Enroller]) -> bool:
    return any(enroller.statuses[401] for enroller in enrollers)


@pytest.mark.torture
def test_kill_under_load_admits_no_more_nodes_than_the_token_counts(
    hub_interface: HubInterface,
    start_service: StartService,
    tmp_path: Path,
    chance: random.Random,
) -> None:
    settings = settings_for(hub_interface, tmp_path, WIREGUARD_IP_POOL="10.0.0.0/16")
    service = with_admin_key(start_service(settings))
    # The first is used up in the middle of it.
    tokens = [new_token(service, max_uses) for max_uses in (20, 100_000, 100_000)]
    acknowledged: dict[str, str] = {}
    statuses: Counter[int] = Counter()
    for kill in TORTURE.rounds(3):
        enrollers = [
            Enroller(service.url, token, iter([f"node-{t}-{kill}-{client}-{n}" for n in range(10_000)]))
            for t, token in enumerate(tokens)
            for client in range(5)
        ]
        threads = [threading.Thread(target=enroller.work) for enroller in enrollers]
        for thread in threads:
            thread.start()
        if kill == 0:
            eventually(partial(any_refused, enrollers))
        time.sleep(chance.uniform(0, 0.8))
        service.kill()
        for thread in threads:
            thread.join()
        service.start()
        for enroller in enrollers:
            acknowledged |= enroller.acknowledged
            statuses += enroller.statuses
        found = assert_in_step(service, hub_interface)
        assert acknowledged.items() <= found.items()
        # No peer was deleted and no change was compensated, so both counts are equal.
        let_in = Counter(int(node.split("-")[1]) for node in found)
        assert uses(service) == {token_id(token): let_in[t] for t, token in enumerate(tokens)}
    assert let_in[0] == 20
    assert statuses.keys() == {200, 401}
    assert statuses[200] > 20
