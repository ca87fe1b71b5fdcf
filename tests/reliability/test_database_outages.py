"""A PostgreSQL that hangs, dies or can't be reached under load: answers, delays, and the state afterwards."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import httpx
import psycopg
import pytest

from backend.adapters.records.database import Database
from backend.adapters.records.postgresql import ImpatientConnection, NoAnswerError
from backend.adapters.records.unit_of_work import SqlRecords
from backend.services.hub.removal_guard import RemovalGuard
from backend.services.hub.writer import Writer
from tests.harness.failing_wg import FailingWg
from tests.harness.outages import Server, lossy_network
from tests.harness.patience import eventually
from tests.harness.postgres import fresh_database, postgres_cluster
from tests.harness.records import adding
from tests.harness.requests import PEERS, PROVISION, TOKENS, bearer, new_key, provision_body
from tests.harness.service import ServiceProcess, StartService
from tests.harness.three_places import assert_in_step, listed, settings_for
from tests.harness.wireguard import HubInterface

CLIENTS: Final = 8
# What was promised is 5 s for an answer and 2 s for coming back; twice that on a busy machine.
ANSWERED_SECONDS: Final = 10.0
BACK_SECONDS: Final = 4.0


@pytest.fixture(scope="module")
def cluster_url() -> Iterator[str]:
    """Run a cluster that may be broken: the session's is the other tests', too."""
    with postgres_cluster() as url:
        yield url


@pytest.fixture(scope="module")
def server(cluster_url: str) -> Iterator[Server]:
    server = Server(cluster_url)
    yield server
    server.close()


@pytest.fixture
def database_url(cluster_url: str, server: Server) -> Iterator[str]:
    yield fresh_database(cluster_url)
    server.go_on()


@dataclass
class Load:
    """Clients that provision one node after the other, and what they were told, when."""

    service: ServiceProcess
    answers: list[tuple[float, float, str, httpx.Response]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def work(self, number: int) -> None:
        with httpx.Client(
            base_url=self.service.url, auth=self.service.local_admin, timeout=60.0, trust_env=False
        ) as client:
            count = 0
            while not self.ended.is_set():
                name = f"node-{number}-{count}"
                count += 1
                began = time.monotonic()
                answer = client.post(PROVISION, json=provision_body(name, new_key()))
                self.answers.append((began, time.monotonic(), name, answer))
                if answer.status_code != httpx.codes.OK:
                    self.ended.wait(0.1)

    def slowest(self) -> float:
        return max(end - began for began, end, *_ in self.answers)

    def names(self, status: int, said: str = "") -> set[str]:
        return {
            name for *_, name, answer in self.answers if answer.status_code == status and said in answer.text
        }

    def first_after(self, moment: float) -> float:
        """Return how long after that moment the first one succeeded that was begun later."""
        return (
            min(
                end for began, end, _, answer in self.answers if began >= moment and answer.status_code == 200
            )
            - moment
        )


@contextmanager
def load(service: ServiceProcess) -> Iterator[Load]:
    running = Load(service)
    threads = [threading.Thread(target=running.work, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        eventually(lambda: len(running.names(200)) > CLIENTS)
        yield running
    finally:
        running.ended.set()
        for thread in threads:
            thread.join()


def assert_told_the_truth(load: Load, service: ServiceProcess, hub: HubInterface) -> None:
    eventually(lambda: service.client.get("/readyz").status_code == 200)
    there = set(assert_in_step(service, hub))
    assert {answer.status_code for *_, answer in load.answers} == {200, 503}
    assert load.names(200) <= there
    assert not load.names(503, "nothing was changed") & there
    assert there <= load.names(200) | load.names(503, "ask again")
    assert load.slowest() < ANSWERED_SECONDS
    # One line when it goes, one when it is back, and no traceback.
    for event in ("database_away", "database_back"):
        assert len([line for line in service.log.splitlines() if f" {event} " in line]) == 1
    assert "Traceback" not in service.log
    errors = [line for line in service.log.splitlines() if " ERROR " in line or " dbos " in line]
    assert len(errors) == 1, errors


def report(hazard: str, load: Load, back: float) -> None:
    unknown = len(load.names(503, "ask again"))
    print(  # noqa: T201 - the figures are what one runs this for, with -s
        f"\n{hazard}: slowest answer {load.slowest():.1f} s, {unknown} in doubt, back after {back:.2f} s"
    )


def is_back(running: Load, moment: float) -> bool:
    return any(began > moment and answer.status_code == 200 for began, _, _, answer in running.answers)


def test_hanging_server_leaves_no_request_waiting_under_load(
    hub_interface: HubInterface,
    start_service: StartService,
    tmp_path: Path,
    server: Server,
    database_url: str,
) -> None:
    service = start_service(
        settings_for(hub_interface, tmp_path, DATABASE_URL=database_url, WIREGUARD_IP_POOL="10.0.0.0/16")
    )
    with load(service) as running:
        server.hang()
        eventually(lambda: len(running.names(503)) > 2 * CLIENTS)
        # What memory knows is answered.
        assert running.names(200) <= set(listed(service))
        assert service.client.get("/readyz").status_code == 503
        server.go_on()
        back_at = time.monotonic()
        eventually(lambda: is_back(running, back_at))
    report("hang", running, running.first_after(back_at))
    assert running.names(503, "ask again")
    assert_told_the_truth(running, service, hub_interface)
    assert running.first_after(back_at) < BACK_SECONDS


def test_restarted_server_is_used_again_under_load(
    hub_interface: HubInterface,
    start_service: StartService,
    tmp_path: Path,
    server: Server,
    database_url: str,
) -> None:
    service = start_service(
        settings_for(hub_interface, tmp_path, DATABASE_URL=database_url, WIREGUARD_IP_POOL="10.0.0.0/16")
    )
    with load(service) as running:
        server.die()
        eventually(lambda: len(running.names(503)) > 2 * CLIENTS)
        server.come_back()
        back_at = time.monotonic()
        eventually(lambda: is_back(running, back_at))
    report("death", running, running.first_after(back_at))
    assert_told_the_truth(running, service, hub_interface)
    assert running.first_after(back_at) < BACK_SECONDS


def test_network_that_drops_every_packet_leaves_no_lock_and_no_late_commit(
    hub_interface: HubInterface,
    start_service: StartService,
    tmp_path: Path,
    database_url: str,
) -> None:
    with lossy_network(database_url) as (network, url):
        service = start_service(
            settings_for(hub_interface, tmp_path, DATABASE_URL=url, WIREGUARD_IP_POOL="10.0.0.0/16")
        )
        with load(service) as running:
            network.lose_everything()
            eventually(lambda: len(running.names(503)) > 2 * CLIENTS)
            # The server doesn't know yet that the old sessions are dead, and one of them has the lock.
            network.carry_new_connections()
            back_at = time.monotonic()
            eventually(lambda: is_back(running, back_at))
        report("lost network", running, running.first_after(back_at))
        assert_told_the_truth(running, service, hub_interface)
        assert running.first_after(back_at) < BACK_SECONDS
        assert service.terminate() == 0


def test_request_with_a_key_is_told_that_its_change_may_yet_happen(  # noqa: PLR0913, PLR0917 - fixtures
    hub_interface: HubInterface,
    start_service: StartService,
    tmp_path: Path,
    wg: FailingWg,
    server: Server,
    database_url: str,
) -> None:
    settings = settings_for(hub_interface, tmp_path, DATABASE_URL=database_url)
    service = start_service(settings, path_prefix=wg.directory)
    body, key = provision_body("node-1"), {"Idempotency-Key": "key"}
    wg.be("held")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(service.client.post, PROVISION, json=body, headers=key)
        eventually(lambda: "node-1" in hub_interface.config_path.read_text())
        server.hang()
        wg.be("fails")
        answer = waiting.result()
    # The records, which don't answer, are not asked once more.
    assert "the change may yet happen; ask again" in answer.text
    server.go_on()
    wg.be("works")
    eventually(lambda: service.client.post(PROVISION, json=body, headers=key).status_code == 200)
    assert_in_step(service, hub_interface)


def test_hanging_server_does_not_delay_authentication(
    hub_interface: HubInterface,
    start_service: StartService,
    tmp_path: Path,
    server: Server,
    database_url: str,
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path, DATABASE_URL=database_url))
    service.become_admin()
    assert service.client.post(PROVISION, json=provision_body("node-1")).status_code == 200
    known_at = time.monotonic()
    stranger = bearer(f"ocw_{'0' * 16}_{'a' * 64}")
    # Until the look at the records that found the key is too old to stand for another one.
    eventually(lambda: time.monotonic() - known_at > 0.6)
    server.hang()
    requests: list[Callable[[], httpx.Response]] = []
    for number in range(20):
        body, key = provision_body(f"late-{number}"), {"Idempotency-Key": f"key-{number}"}
        requests += [
            partial(service.client.get, PEERS, headers=stranger),
            partial(service.client.post, PROVISION, json=body, headers=key),
            partial(service.client.get, TOKENS),
            partial(service.client.get, "/readyz"),
        ]
    with ThreadPoolExecutor(len(requests)) as threads:
        began = time.monotonic()
        waiting = [threads.submit(request) for request in requests]
        # The event loop is free meanwhile.
        assert service.client.get("/healthz", timeout=2.0).status_code == 200
        assert set(listed(service)) == {"node-1"}
        answers = [answer.result() for answer in waiting]
    took = time.monotonic() - began
    print(f"\nhang, without load: {len(answers)} requests answered within {took:.1f} s")  # noqa: T201 - as above
    # A credential that can't be looked up may be a good one: that is no 401.
    assert {(answer.status_code, answer.url.path) for answer in answers if answer.status_code != 503} == set()
    assert took < ANSWERED_SECONDS
    assert service.terminate() == 0
    assert "Traceback" not in service.log


def test_silent_server_is_given_up_after_the_timeout_and_not_before(
    server: Server, database_url: str
) -> None:
    connection = ImpatientConnection.connect(database_url.replace("+psycopg", ""))
    connection.silence_seconds = 0.5
    try:
        # Rows that come one after the other, for longer than that: it isn't silent.
        rows = connection.execute(
            "SELECT pg_sleep(0.2), repeat('x', 9000) FROM generate_series(1, 5)"
        ).fetchall()
        assert len(rows) == 5
        connection.commit()
        connection.autocommit = True
        assert list(connection.notifies(timeout=1.0)) == []
        server.hang()
        with pytest.raises(NoAnswerError, match=r"no answer within 0.5 s"):
            connection.execute("SELECT 1")
        assert connection.closed
    finally:
        server.go_on()
        connection.close()


def test_unanswered_commit_is_resolved_before_the_request_is_answered(database_url: str) -> None:
    database = Database(database_url)
    records = SqlRecords(database)
    writer = Writer(records, RemovalGuard(records.removed_keys))
    try:
        database.migrate()
        with (
            psycopg.connect(database_url.replace("+psycopg", "")) as pending,
            ThreadPoolExecutor(1) as threads,
        ):
            # What a session that we gave up on may yet be doing.
            pending.execute("UPDATE hubs SET generation = 1")
            writer.doubtful = [adding("node-1", "10.0.0.2")]
            found = threads.submit(writer.look_up)
            waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            with psycopg.connect(database_url.replace("+psycopg", ""), autocommit=True) as looking:
                eventually(lambda: looking.execute(waits).fetchone() == (1,))
            pending.commit()
            assert found.result().generation == 1
    finally:
        database.close()


def test_commits_are_durable_even_where_the_server_sets_synchronous_commit_off(database_url: str) -> None:
    with psycopg.connect(database_url.replace("+psycopg", "")) as connection:
        assert connection.execute("SHOW synchronous_commit").fetchone() == ("off",)
    database = Database(database_url)
    try:
        with database.engine.connect() as ours:
            assert ours.exec_driver_sql("SHOW synchronous_commit").scalar_one() == "on"
    finally:
        database.close()
