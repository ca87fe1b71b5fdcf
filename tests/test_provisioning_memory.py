"""What the service keeps in memory: its peers after a start, the list, and answers to an Idempotency-Key."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from backend import errors
from backend.adapters.records.access_store import SqlAccessStore
from backend.adapters.records.database import IN_MEMORY, Database
from backend.adapters.records.sql_journal import SqlJournal
from backend.models.access.callers import SERVICE
from backend.services.access import idempotency
from backend.services.access.idempotency import IdempotencyKey
from backend.services.hub import hub_committer
from backend.services.ports import AccessStore, Journal
from backend.services.wireguard_provisioning_service import DuplicatePeerError, IPPoolExhaustedError
from tests.harness.fakes import FakeHub
from tests.harness.memory_journal import MemoryJournal
from tests.harness.requests import new_key
from tests.test_provisioning_service import WAIT, World, request

MakeWorld = Callable[..., World]


@pytest.fixture
def hub() -> FakeHub:
    return FakeHub()


@pytest.fixture
def make_world(tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeWorld]:
    """Start services on one file and one interface, and close them at the end."""
    monkeypatch.setattr(hub_committer, "HEAL_INTERVAL_SECONDS", 0.02)
    worlds = list[World]()

    def make(
        journal: Journal | None = None, *, network: str = "10.0.0.0/24", store: AccessStore | None = None
    ) -> World:
        world = World(tmp_path, journal or MemoryJournal(), hub, network, store)
        worlds.append(world)
        world.service.start()
        return world

    yield make
    for world in worlds:
        world.service.close()


# What a start reads from the records


@pytest.fixture
def restarted(make_world: MakeWorld) -> tuple[World, str]:
    """Give the test a service that found a peer, node-1, in its records; and that peer's key."""
    journal, key = MemoryJournal(), new_key()
    first = make_world(journal, network="10.0.0.0/30")
    first.provision("node-1", key)
    first.service.close()
    return make_world(journal, network="10.0.0.0/30"), key


def test_a_start_knows_the_names_of_the_recorded_peers(restarted: tuple[World, str]) -> None:
    world, key = restarted
    assert list(world.service.list_provisioned_peers()) == ["node-1"]
    with pytest.raises(DuplicatePeerError) as refused:
        world.provision("node-1", key)
    assert refused.value.existing_config["node_id"] == "node-1"


def test_a_start_knows_the_keys_of_the_recorded_peers(restarted: tuple[World, str]) -> None:
    # `wg` would take the address of the first holder away without a word.
    world, key = restarted
    with pytest.raises(DuplicatePeerError) as refused:
        world.provision("node-2", key)
    assert refused.value.existing_config == {}


def test_a_start_holds_the_addresses_of_the_recorded_peers(restarted: tuple[World, str]) -> None:
    world, _ = restarted
    assert world.service.get_pool_stats()["allocated_addresses"] == 1
    with pytest.raises(IPPoolExhaustedError):
        world.provision("node-2")


def test_a_recorded_peer_leaves_nothing_in_memory_when_it_goes(restarted: tuple[World, str]) -> None:
    world, key = restarted
    world.service.deprovision_peer("node-1", WAIT)
    assert world.service.list_provisioned_peers() == {}
    assert str(world.provision("node-2", key).assigned_ip) == "10.0.0.2"


# The list


def read(pieces: Iterator[bytes]) -> dict[str, Any]:
    listed: dict[str, Any] = json.loads(b"".join(pieces))
    return listed


@pytest.fixture
def two_peers(make_world: MakeWorld) -> World:
    world = make_world()
    world.provision("node-1")
    world.provision("node-2")
    return world


def begin_list(world: World) -> tuple[Iterator[bytes], bytes]:
    """Begin a list, as a slow reader does; return the rest of it and its first piece."""
    pieces = world.service.list_json()
    return pieces, next(pieces)


def test_a_list_that_was_begun_before_an_addition_is_not_shown_after_it(two_peers: World) -> None:
    pieces, first = begin_list(two_peers)
    two_peers.provision("node-3")
    assert set(read(iter([first, *pieces]))) == {"node-1", "node-2"}
    assert set(read(two_peers.service.list_json())) == {"node-1", "node-2", "node-3"}


def test_a_list_that_was_begun_before_a_removal_is_not_shown_after_it(two_peers: World) -> None:
    pieces, first = begin_list(two_peers)
    two_peers.service.deprovision_peer("node-2", WAIT)
    assert set(read(iter([first, *pieces]))) == {"node-1", "node-2"}
    assert set(read(two_peers.service.list_json())) == {"node-1"}


def test_a_list_that_was_read_is_not_shown_after_a_change(two_peers: World) -> None:
    for present in ({"node-1", "node-2", "node-3"}, {"node-1", "node-2"}):
        read(two_peers.service.list_json())
        if "node-3" in present:
            two_peers.provision("node-3")
        else:
            two_peers.service.deprovision_peer("node-3", WAIT)
        assert set(read(two_peers.service.list_json())) == present


def test_a_list_that_nothing_has_changed_is_made_once(
    two_peers: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = b"".join(two_peers.service.list_json())

    def make_again(_: object) -> Iterator[str]:
        raise AssertionError("the list is made again")

    monkeypatch.setattr(two_peers.service._configurations, "json_by_node", make_again)
    assert b"".join(two_peers.service.list_json()) == first


# Answers to an Idempotency-Key


@pytest.fixture
def recorded(make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch) -> World:
    """Give the test a service whose answers are found in its records, as they are a minute later."""
    monkeypatch.setattr(idempotency, "_RECENT_SECONDS", -1.0)
    database = Database(IN_MEMORY)
    database.migrate()
    return make_world(SqlJournal(database), store=SqlAccessStore(database))


def ask(world: World, node_id: str, wireguard_key: str, key: str = "key-1") -> str:
    """Provision with an Idempotency-Key; return the address in the answer."""
    body = request(node_id, wireguard_key)
    future = world.service.submit_provision_once(
        body, SERVICE, IdempotencyKey.parse(key, body.model_dump_json().encode())
    )
    address: str = json.loads(future.result(WAIT))["config"]["assigned_ip"]
    return address


@pytest.mark.parametrize("kept", ["in memory", "in the records"])
def test_an_answer_is_given_again_while_its_peer_is_there(
    make_world: MakeWorld, request: pytest.FixtureRequest, kept: str
) -> None:
    world: World = make_world() if kept == "in memory" else request.getfixturevalue("recorded")
    key = new_key()
    assert [ask(world, "node-1", key) for _ in range(3)] == ["10.0.0.2"] * 3
    assert world.service.get_pool_stats()["allocated_addresses"] == 1


@pytest.mark.parametrize("kept", ["in memory", "in the records"])
def test_a_removed_peers_answer_with_an_address_that_another_node_has_is_never_given_again(
    make_world: MakeWorld, request: pytest.FixtureRequest, kept: str
) -> None:
    world: World = make_world() if kept == "in memory" else request.getfixturevalue("recorded")
    key = new_key()
    assert ask(world, "node-1", key) == "10.0.0.2"
    world.service.deprovision_peer("node-1", WAIT)
    assert str(world.provision("node-2").assigned_ip) == "10.0.0.2"
    assert ask(world, "node-1", key) == "10.0.0.3"
    assert {node: str(peer.assigned_ip) for node, peer in world.service.list_provisioned_peers().items()} == {
        "node-2": "10.0.0.2",
        "node-1": "10.0.0.3",
    }


def test_a_removal_that_fails_leaves_the_answer(recorded: World, hub: FakeHub) -> None:
    key = new_key()
    assert ask(recorded, "node-1", key) == "10.0.0.2"
    hub.broken = "out of order"
    with pytest.raises(errors.HubUpdateError):
        recorded.service.deprovision_peer("node-1", WAIT)
    hub.broken = None
    assert ask(recorded, "node-1", key) == "10.0.0.2"


def test_an_answer_of_a_provision_that_failed_is_not_kept(recorded: World, hub: FakeHub) -> None:
    key = new_key()
    hub.broken = "out of order"
    with pytest.raises(errors.HubUpdateError):
        ask(recorded, "node-1", key)
    hub.broken = None
    assert str(recorded.provision("node-2").assigned_ip) == "10.0.0.2"
    assert ask(recorded, "node-1", key) == "10.0.0.3"


# The order


def test_peers_keep_their_order_over_a_restart(make_world: MakeWorld) -> None:
    # The file would be written anew at each start, and `wg` told all of it.
    journal = MemoryJournal()
    first = make_world(journal)
    names = ["node-2", "node-3", "node-1"]
    for name in names:
        first.provision(name)
    before: bytes = first.path.read_bytes()
    first.service.close()
    second = make_world(journal)
    assert list(second.service.list_provisioned_peers()) == names
    assert second.path.read_bytes() == before
