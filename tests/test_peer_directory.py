"""What memory knows of the peers while their changes begin and end."""

import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address

import pytest

from backend.errors import IPPoolExhaustedError, PeerLimitError, PeerNotFoundError
from backend.models.wireguard.keys import WireGuardKey
from backend.models.wireguard.peer import Change, Peer
from backend.services.hub.config_text import OperatorPeer
from backend.services.hub.operator_peers import OperatorPeers, PeerLimit
from backend.services.ip_pool_manager import IPPoolManager
from backend.services.peer_directory import PeerDirectory
from tests.harness.peers import peer
from tests.harness.requests import new_key

# The addresses from 10.0.0.2 to 10.0.0.6.
NETWORK = "10.0.0.0/29"


class Memory:
    """A directory and its pool."""

    def __init__(self, limit: PeerLimit | None = None) -> None:
        self.pool = IPPoolManager(NETWORK, ["10.0.0.1"])
        self.operator_peers = OperatorPeers(self.pool, limit)
        self.directory = PeerDirectory(self.pool, self.operator_peers)

    def new(self, node_id: str) -> Peer:
        """Return a peer with an address that is reserved for it."""
        return peer(node_id, new_key(), self.pool.allocate_ip(node_id))

    def begin(self, before: Peer | None, after: Peer | None) -> Change:
        """Begin a change, as the service does."""
        change = Change(before, after)
        with self.directory.lock:
            self.directory.begin(change)
        return change

    def knows(self, known: Peer) -> bool:
        """Say whether name, key and address are taken, all of them or none."""
        found = {
            self.directory.by_node(known.node_id) is not None,
            self.directory.by_key(known.wireguard_public_key) is not None,
            self.pool.is_allocated(str(known.address)),
        }
        assert len(found) == 1
        return found.pop()

    def names(self) -> list[str]:
        """Return the listed names."""
        return [listed.node_id for listed in self.directory.list()]


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def known(memory: Memory) -> Peer:
    """Return a peer that was in the records."""
    known = peer("node-1", new_key(), "10.0.0.2")
    memory.directory.load([known])
    return known


# Adding


def test_an_addition_takes_name_key_and_address_before_it_is_listed(memory: Memory) -> None:
    added = memory.new("node-1")
    change = memory.begin(None, added)
    assert memory.knows(added)
    assert memory.directory.under_way(added) is change
    assert memory.names() == []
    with pytest.raises(PeerNotFoundError):
        memory.directory.listed("node-1")


def test_an_addition_that_was_applied_is_listed(memory: Memory) -> None:
    added = memory.new("node-1")
    memory.directory.end(memory.begin(None, added), applied=True)
    assert memory.directory.listed("node-1") == added
    assert memory.names() == ["node-1"]
    assert memory.knows(added)
    assert memory.directory.under_way(added) is None


def test_memory_does_not_keep_what_the_records_alone_need_of_a_peer(memory: Memory) -> None:
    """For ten thousand peers it would take the most of the memory."""
    added = replace(memory.new("node-1"), version="1.0.0", capabilities={"cpu_cores": 8}, metadata={})
    memory.directory.end(memory.begin(None, added), applied=True)
    kept = memory.directory.listed("node-1")
    assert kept == added
    assert (kept.version, kept.capabilities, kept.metadata) == ("", None, None)


def test_an_addition_that_was_not_applied_leaves_name_key_and_address_free(memory: Memory) -> None:
    added = memory.new("node-1")
    memory.directory.end(memory.begin(None, added), applied=False)
    assert not memory.knows(added)
    assert memory.names() == []
    assert memory.directory.under_way(added) is None
    again = memory.new("node-1")
    assert again.address == added.address
    memory.directory.end(memory.begin(None, again), applied=True)
    assert memory.names() == ["node-1"]


# Removing


def test_a_peer_that_is_being_removed_is_listed_and_keeps_name_key_and_address(
    memory: Memory, known: Peer
) -> None:
    change = memory.begin(known, None)
    assert memory.knows(known)
    assert memory.names() == ["node-1"]
    assert memory.directory.listed("node-1") == known
    assert memory.directory.under_way(known) is change


def test_a_removal_that_was_applied_leaves_name_key_and_address_free(memory: Memory, known: Peer) -> None:
    memory.directory.end(memory.begin(known, None), applied=True)
    assert not memory.knows(known)
    assert memory.names() == []
    with pytest.raises(PeerNotFoundError):
        memory.directory.listed("node-1")
    assert memory.new("node-2").address == known.address


def test_a_removal_that_was_not_applied_changes_nothing(memory: Memory, known: Peer) -> None:
    memory.directory.end(memory.begin(known, None), applied=False)
    assert memory.knows(known)
    assert memory.directory.listed("node-1") == known
    assert memory.directory.under_way(known) is None


# Altering


def test_an_alteration_shows_the_peer_as_it_was_until_it_is_applied(memory: Memory, known: Peer) -> None:
    altered = replace(known, public_key="another")
    change = memory.begin(known, altered)
    assert memory.directory.listed("node-1") == known
    assert memory.directory.under_way(known) is change
    memory.directory.end(change, applied=True)
    assert memory.directory.listed("node-1") == altered
    assert memory.directory.by_key(known.wireguard_public_key) == altered
    assert memory.knows(altered)


def test_an_alteration_that_was_not_applied_changes_nothing(memory: Memory, known: Peer) -> None:
    memory.directory.end(memory.begin(known, replace(known, public_key="another")), applied=False)
    assert memory.directory.listed("node-1") == known
    assert memory.directory.by_key(known.wireguard_public_key) == known
    assert memory.directory.under_way(known) is None


@pytest.mark.parametrize("applied", [True, False])
def test_an_alteration_of_the_key_leaves_one_of_both_taken(
    memory: Memory, known: Peer, *, applied: bool
) -> None:
    altered = replace(known, wireguard_public_key=WireGuardKey.parse(new_key()))
    memory.directory.end(memory.begin(known, altered), applied=applied)
    kept, free = (altered, known) if applied else (known, altered)
    assert memory.directory.by_key(kept.wireguard_public_key) == kept
    assert memory.directory.by_key(free.wireguard_public_key) is None


# Several peers


def test_the_first_change_under_way_of_several_peers_is_found(memory: Memory, known: Peer) -> None:
    other = memory.new("node-2")
    change = memory.begin(None, other)
    assert memory.directory.under_way(known, other) is change
    assert memory.directory.under_way(None, known) is None
    removal = memory.begin(known, None)
    assert memory.directory.under_way(known, other) == removal


def test_peers_are_listed_in_the_order_in_which_they_were_added(memory: Memory) -> None:
    for name in ("node-2", "node-3", "node-1"):
        memory.directory.end(memory.begin(None, memory.new(name)), applied=True)
    assert memory.names() == ["node-2", "node-3", "node-1"]
    second = memory.directory.listed("node-3")
    memory.directory.end(memory.begin(second, replace(second, public_key="another")), applied=True)
    assert memory.names() == ["node-2", "node-3", "node-1"]


def test_a_second_load_adds_peers_and_changes_none(memory: Memory, known: Peer) -> None:
    """After an operator's decision the records have more peers than memory."""
    adopted = peer("node-2", new_key(), "10.0.0.3")
    memory.directory.load([peer("node-1", known.wireguard_public_key, known.address), adopted])
    assert memory.directory.by_node("node-1") == known
    assert memory.names() == ["node-1", "node-2"]
    assert memory.new("node-3").address == IPv4Address("10.0.0.4")


def test_the_revision_is_another_one_after_each_change_of_the_list(memory: Memory, known: Peer) -> None:
    seen = {memory.directory.revision}
    added = memory.new("node-2")
    memory.directory.end(memory.begin(None, added), applied=True)
    seen.add(memory.directory.revision)
    memory.directory.end(memory.begin(known, None), applied=True)
    seen.add(memory.directory.revision)
    memory.directory.load([peer("node-3", new_key(), "10.0.0.6")])
    seen.add(memory.directory.revision)
    assert len(seen) == 4


# Room


def test_a_full_pool_has_no_room(memory: Memory) -> None:
    for number in range(5):
        memory.directory.require_room()
        memory.begin(None, memory.new(f"node-{number}"))
    with pytest.raises(IPPoolExhaustedError, match=r"5 addresses allocated from range 10\.0\.0\.0/29"):
        memory.directory.require_room()


def test_an_interface_has_room_for_so_many_peers_with_the_operators(known: Peer) -> None:
    memory = Memory(PeerLimit("wg0", lambda: 3, fewest=1))
    memory.directory.load([known])
    memory.directory.require_room()
    memory.operator_peers.note(
        [OperatorPeer(new_key(), ()), OperatorPeer(new_key(), ())], WireGuardKey.parse(new_key())
    )
    with pytest.raises(PeerLimitError, match="takes no more than 3 peers"):
        memory.directory.require_room()


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Let another thread run after nearly every instruction."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("eager_threads")
def test_peer_whose_addition_fails_is_never_listed_meanwhile(memory: Memory) -> None:
    until = time.monotonic() + 0.3
    refused = memory.new("node-1")

    def add_and_take_back() -> None:
        while time.monotonic() < until:
            memory.directory.end(memory.begin(None, refused), applied=False)
            memory.pool.allocate_ip("node-1")

    agent = threading.Thread(target=add_and_take_back)
    agent.start()
    while time.monotonic() < until:
        with pytest.raises(PeerNotFoundError):
            memory.directory.listed("node-1")
    agent.join()
