"""The operator's peers: what they hold, and when a peer of ours would collide with them."""

from ipaddress import IPv4Network, IPv6Network

import pytest

from backend.errors import AddressTakenError, DuplicatePeerError
from backend.models.wireguard.keys import WireGuardKey
from backend.services.hub.config_text import OperatorPeer
from backend.services.hub.operator_peers import OperatorPeers
from backend.services.ip_pool_manager import IPPoolManager
from tests.harness.peers import peer
from tests.harness.requests import new_key, other_spelling

THEIRS = WireGuardKey.parse(new_key())
OURS = WireGuardKey.parse(new_key())
HUB = WireGuardKey.parse(new_key())


@pytest.fixture
def pool() -> IPPoolManager:
    return IPPoolManager("10.0.0.0/24", ["10.0.0.1"])


@pytest.fixture
def operator_peers(pool: IPPoolManager) -> OperatorPeers:
    operator_peers = OperatorPeers(pool)
    networks = (IPv4Network("10.0.0.8/30"), IPv6Network("fd00::8/128"), IPv4Network("0.0.0.0/0"))
    operator_peers.note([OperatorPeer(THEIRS, networks), OperatorPeer(new_key(), ())], HUB)
    return operator_peers


@pytest.mark.parametrize("address", ["10.0.0.8", "10.0.0.9", "10.0.0.11"])
def test_an_address_of_theirs_is_shared_wherever_it_lies_in_their_network(
    operator_peers: OperatorPeers, address: str
) -> None:
    assert operator_peers.overlaps([peer("node-1", OURS, address)])
    assert isinstance(operator_peers.conflict(peer("node-1", OURS, address)), AddressTakenError)


def test_a_key_of_theirs_is_shared(operator_peers: OperatorPeers) -> None:
    assert operator_peers.has_key(THEIRS)
    assert operator_peers.overlaps([peer("node-1", THEIRS, "10.0.0.2")])
    conflict = operator_peers.conflict(peer("node-1", THEIRS, "10.0.0.2"))
    assert isinstance(conflict, DuplicatePeerError)
    # Not a word about whose it is.
    assert conflict.existing_config == {}


def test_a_key_of_theirs_in_another_spelling_is_shared_too(operator_peers: OperatorPeers) -> None:
    operator_peers.note([OperatorPeer(other_spelling(OURS), ())], HUB)
    assert operator_peers.has_key(OURS)
    assert operator_peers.overlaps([peer("node-1", OURS, "10.0.0.2")])
    assert isinstance(operator_peers.conflict(peer("node-1", OURS, "10.0.0.2")), DuplicatePeerError)


@pytest.mark.parametrize("address", ["10.0.0.7", "10.0.0.12", "10.1.0.8"])
def test_other_addresses_are_not_shared(operator_peers: OperatorPeers, address: str) -> None:
    assert not operator_peers.has_key(OURS)
    assert not operator_peers.overlaps([peer("node-1", OURS, address)])
    assert not operator_peers.overlaps([])
    assert operator_peers.conflict(peer("node-1", OURS, address)) is None


def test_one_shared_peer_among_many_is_found(operator_peers: OperatorPeers) -> None:
    many = [peer(f"node-{last}", new_key(), f"10.0.0.{last}") for last in range(20, 30)]
    assert not operator_peers.overlaps(many)
    assert operator_peers.overlaps([*many, peer("node-1", THEIRS, "10.0.0.30")])
    assert operator_peers.overlaps([*many, peer("node-1", OURS, "10.0.0.9")])


def test_addresses_of_operators_peers_are_free_only_when_these_are_gone(
    operator_peers: OperatorPeers, pool: IPPoolManager
) -> None:
    given = {pool.allocate_ip(f"node-{number}") for number in range(8)}
    assert not given & {f"10.0.0.{last}" for last in (8, 9, 10, 11)}
    operator_peers.note([], HUB)
    assert not operator_peers.has_key(THEIRS)
    assert not operator_peers.overlaps([peer("node-1", THEIRS, "10.0.0.8")])
    assert pool.allocate_ip("node-8") == "10.0.0.8"


def test_the_hubs_key_is_the_files(pool: IPPoolManager, operator_peers: OperatorPeers) -> None:
    assert operator_peers.hub_key == HUB
    other = WireGuardKey.parse(new_key())
    operator_peers.note([], other)
    assert operator_peers.hub_key == other
    with pytest.raises(RuntimeError, match="not been read yet"):
        _ = OperatorPeers(pool).hub_key
