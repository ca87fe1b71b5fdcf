"""Endpoints: kept in the records, and given back to an interface that has lost them."""

import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from backend.adapters.records.database import Database
from backend.adapters.records.unit_of_work import SqlRecords
from backend.errors import HubUpdateError
from backend.models.wireguard.health import LostEndpoint, RecordedEndpoint
from backend.models.wireguard.interface import InterfacePeer
from backend.services.hub import endpoint_keeper, interface_sync
from backend.services.hub.endpoint_keeper import EndpointKeeper
from tests.harness.core import NEVER, World, Worlds
from tests.harness.fakes import FakeHub, FlakyRecords
from tests.harness.peers import NOON
from tests.harness.requests import new_key

HOME, AWAY = "198.51.100.7:51820", "[2001:db8::1]:7"


def talk(world: World, hub: FakeHub, key: str, endpoint: str, keepalive: int = 0) -> None:
    """Have a peer make a handshake from an endpoint, and the hub notice it."""
    seen = InterfacePeer((), None, keepalive, endpoint, int(time.time()), 180, 92)
    hub.seen[key] = seen
    world.observer.look()


def lose_endpoint(world: World, hub: FakeHub) -> str:
    """Have a peer make a handshake, and the interface made anew; return the peer's key."""
    key = new_key()
    world.provision("node-1", key)
    talk(world, hub, key, HOME)
    hub.vanish()
    hub.come_back()
    return key


@pytest.fixture
def quiet(make_world: Worlds) -> World:
    """Start a service that looks where a test says so."""
    return make_world(look_every=NEVER)


def test_a_new_interface_gets_the_endpoints_back_and_nudges_each_peer_once(
    quiet: World, fake_hub: FakeHub
) -> None:
    keys = [new_key() for _ in range(3)]
    for number, key in enumerate(keys):
        quiet.provision(f"node-{number}", key)
    talk(quiet, fake_hub, keys[0], HOME)
    talk(quiet, fake_hub, keys[1], AWAY)
    fake_hub.vanish()
    fake_hub.come_back()
    for _ in range(3):
        quiet.look()
    # The third was never there.
    assert fake_hub.restored == [LostEndpoint(keys[0], HOME, 0), LostEndpoint(keys[1], AWAY, 0)]


def test_an_endpoint_that_is_newer_than_ours_stays(quiet: World, fake_hub: FakeHub) -> None:
    key = lose_endpoint(quiet, fake_hub)
    fake_hub.seen[key] = InterfacePeer((), endpoint=AWAY)
    quiet.look()
    assert fake_hub.restored == []


def test_a_start_gives_endpoints_back_that_an_earlier_process_has_kept(
    make_world: Worlds, fake_hub: FakeHub
) -> None:
    first = make_world(records := FlakyRecords(is_durable=True), look_every=NEVER)
    key = new_key()
    first.provision("node-1", key)
    talk(first, fake_hub, key, HOME)
    first.stop()
    fake_hub.vanish()
    fake_hub.come_back()
    second = make_world(records, look_every=NEVER)
    second.look()
    assert fake_hub.restored == [LostEndpoint(key, HOME, 0)]


def test_an_operators_peer_is_left_alone(quiet: World, fake_hub: FakeHub) -> None:
    key = new_key()
    quiet.append(key, "10.0.0.200/32")
    quiet.look()
    talk(quiet, fake_hub, key, HOME)
    fake_hub.vanish()
    fake_hub.come_back()
    quiet.look()
    assert (fake_hub.restored, quiet.health.unrecorded_endpoints()) == ([], {})


def test_at_most_so_many_endpoints_are_given_back_at_once(
    quiet: World, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interface_sync, "_MAX_ENDPOINTS", 2)
    keys = [new_key() for _ in range(5)]
    for number, key in enumerate(keys):
        quiet.provision(f"node-{number}", key)
        talk(quiet, fake_hub, key, HOME)
    fake_hub.vanish()
    fake_hub.come_back()
    given = []
    for _ in range(4):
        quiet.look()
        given.append(len(fake_hub.restored))
    assert given == [2, 4, 5, 5]


def test_a_restoration_that_fails_is_tried_again(
    quiet: World, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = lose_endpoint(quiet, fake_hub)

    def refuse(_peers: object) -> None:
        raise HubUpdateError("`wg` gave up")

    with monkeypatch.context() as broken:
        broken.setattr(fake_hub, "restore", refuse)
        quiet.look()
        # It is no reason to refuse requests.
        assert quiet.reconciler.problem is None
    quiet.look()
    assert fake_hub.restored == [LostEndpoint(key, HOME, 0)]


def test_a_nudge_that_fails_is_not_taken_for_drift(
    quiet: World, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = lose_endpoint(quiet, fake_hub)

    def fail_halfway(_peers: object) -> None:
        fake_hub.seen[key] = InterfacePeer((), persistent_keepalive=1)
        quiet.observer.look()
        del fake_hub.seen[key]
        raise HubUpdateError("`wg` gave up")

    monkeypatch.setattr(fake_hub, "restore", fail_halfway)
    quiet.look()
    syncs = fake_hub.syncs
    quiet.look()
    assert fake_hub.syncs == syncs


def test_endpoints_are_written_some_at_a_time(
    quiet: World, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_keeper, "_AT_ONCE", 2)
    keys = [new_key() for _ in range(5)]
    for number, key in enumerate(keys):
        quiet.provision(f"node-{number}", key)
        talk(quiet, fake_hub, key, HOME)
    calls = 0

    def call(write: object) -> None:
        nonlocal calls
        calls += 1
        quiet.agent.call(write)  # type: ignore[arg-type] # a function

    quiet.keeper.save(call)
    assert calls == 3
    kept = quiet.records.load_endpoints()
    assert {key: recorded.endpoint for key, recorded in kept.items()} == dict.fromkeys(keys, HOME)
    quiet.keeper.save(call)
    assert calls == 3


def test_the_records_forget_the_endpoint_of_a_removed_peer(quiet: World, fake_hub: FakeHub) -> None:
    key = new_key()
    quiet.provision("node-1", key)
    talk(quiet, fake_hub, key, HOME)
    quiet.keeper.save(lambda write: write())
    assert key in quiet.records.load_endpoints()
    quiet.deprovision("node-1")
    quiet.records.note_observed(2)
    assert quiet.records.load_endpoints() == {}


def test_endpoints_wait_for_records_that_are_away(quiet: World, fake_hub: FakeHub) -> None:
    key = new_key()
    quiet.provision("node-1", key)
    talk(quiet, fake_hub, key, HOME)
    unrecorded = quiet.health.unrecorded_endpoints()
    assert replace(unrecorded[key], seen_at=NOON) == RecordedEndpoint(HOME, NOON)
    quiet.records.database.close()
    quiet.keeper.close()
    assert key in quiet.health.unrecorded_endpoints()


def test_endpoints_do_not_wait_for_a_database_that_another_program_has_locked(
    quiet: World, fake_hub: FakeHub, tmp_path: Path
) -> None:
    """They would hold up the changes behind them, and a stop."""
    key = new_key()
    quiet.provision("node-1", key)
    talk(quiet, fake_hub, key, HOME)
    path = tmp_path / "records.sqlite"
    with closing(Database(f"sqlite:///{path}")) as database:
        database.migrate()
        # A write that succeeded within the last second is taken for an answer.
        time.sleep(1.0)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            began = time.monotonic()
            EndpointKeeper(SqlRecords(database), quiet.health).close()
            assert time.monotonic() - began < 15
    assert key in quiet.health.unrecorded_endpoints()
