"""What a start reads from the records."""

import pytest

from backend import errors
from backend.models.wireguard.peer import Change, PeerState
from tests.harness.core import NEVER, World, Worlds
from tests.harness.fakes import FakeHub, FlakyRecords
from tests.harness.peers import peer
from tests.harness.requests import new_key


@pytest.fixture
def restarted(make_world: Worlds) -> tuple[World, str]:
    """Give the test a service that found a peer, node-1, in its records; and that peer's key."""
    records, key = FlakyRecords(), new_key()
    make_world(records, network="10.0.0.0/30").provision("node-1", key)
    return make_world(records, network="10.0.0.0/30"), key


def test_a_start_knows_the_names_of_the_recorded_peers(restarted: tuple[World, str]) -> None:
    world, key = restarted
    assert list(world.service.list_provisioned_peers()) == ["node-1"]
    with pytest.raises(errors.DuplicatePeerError) as refused:
        world.provision("node-1", key)
    assert refused.value.existing_config["node_id"] == "node-1"


def test_a_start_knows_the_keys_of_the_recorded_peers(restarted: tuple[World, str]) -> None:
    # `wg` would take the address of the first holder away without a word.
    world, key = restarted
    with pytest.raises(errors.DuplicatePeerError) as refused:
        world.provision("node-2", key)
    assert refused.value.existing_config == {}


def test_a_start_holds_the_addresses_of_the_recorded_peers(restarted: tuple[World, str]) -> None:
    world, _ = restarted
    assert world.service.get_pool_stats()["allocated_addresses"] == 1
    with pytest.raises(errors.IPPoolExhaustedError):
        world.provision("node-2")


def test_a_recorded_peer_leaves_nothing_in_memory_when_it_goes(restarted: tuple[World, str]) -> None:
    world, key = restarted
    world.deprovision("node-1")
    assert world.service.list_provisioned_peers() == {}
    assert str(world.provision("node-2", key).assigned_ip) == "10.0.0.2"


def test_a_peer_of_a_pool_that_the_operator_has_since_changed_stays(
    make_world: Worlds, fake_hub: FakeHub
) -> None:
    records = FlakyRecords()
    make_world(records).provision("node-1")
    new = make_world(records, network="10.0.0.0/30")
    assert str(new.service.get_peer_config("node-1").assigned_ip) == "10.0.0.2"
    assert new.service.get_pool_stats()["available_addresses"] == 0
    assert fake_hub.table


def test_peers_keep_their_order_over_a_restart(make_world: Worlds) -> None:
    # The file would be written anew at each start, and `wg` told all of it.
    records = FlakyRecords()
    first = make_world(records)
    names = ["node-2", "node-3", "node-1"]
    for name in names:
        first.provision(name)
    before = first.text
    second = make_world(records)
    assert list(second.service.list_provisioned_peers()) == names
    assert second.text == before


def test_changes_that_were_committed_and_not_applied_are_applied_by_the_next_start(
    make_world: Worlds, fake_hub: FakeHub
) -> None:
    """As after a kill between the two."""
    records, gone, added = FlakyRecords(), new_key(), new_key()
    world = make_world(records)
    world.provision("node-1", gone)
    world.stop()
    state = records.load()
    changes = [Change(state.peers[0], None), Change(None, peer("node-2", added, "10.0.0.3"))]
    records.commit(state.generation + 1, state.observed_generation, changes)
    assert records.states() == {"node-1": PeerState.REMOVING, "node-2": PeerState.PENDING}
    restarted = make_world(records)
    assert fake_hub.table == {added: frozenset({"10.0.0.3/32"})}
    assert (gone in restarted.text, added in restarted.text) == (False, True)
    assert records.states() == {"node-2": PeerState.ACTIVE}
    assert str(restarted.provision("node-1", gone).assigned_ip) == "10.0.0.2"


def test_a_removal_that_no_start_could_apply_leaves_its_name_free_once_the_hub_is_there(
    make_world: Worlds, fake_hub: FakeHub
) -> None:
    records, key = FlakyRecords(), new_key()
    world = make_world(records)
    world.provision("node-1", key)
    world.stop()
    state = records.load()
    records.commit(state.generation + 1, state.observed_generation, [Change(state.peers[0], None)])
    fake_hub.vanish()
    restarted = make_world(records, look_every=NEVER)
    assert restarted.service.list_provisioned_peers() == {}
    assert records.states() == {"node-1": PeerState.REMOVING}
    fake_hub.come_back()
    assert str(restarted.provision("node-1", key).assigned_ip) == "10.0.0.2"
    assert fake_hub.table == {key: frozenset({"10.0.0.2/32"})}
