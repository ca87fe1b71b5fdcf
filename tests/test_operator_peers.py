"""What the peers hold that an operator wrote by hand, and when one of ours would collide with them."""

from ipaddress import IPv4Network, IPv6Network

import pytest

from backend.errors import AddressTakenError, DuplicatePeerError
from backend.models.wireguard.keys import WireGuardKey
from backend.services.hub.operator_peers import HandMadePeers
from backend.services.ip_pool_manager import IPPoolManager
from backend.services.wireguard_config_manager import ForeignPeer
from tests.harness.peers import peer
from tests.harness.requests import new_key, other_spelling

THEIRS = WireGuardKey.parse(new_key())
OURS = WireGuardKey.parse(new_key())
HUB = WireGuardKey.parse(new_key())


@pytest.fixture
def pool() -> IPPoolManager:
    return IPPoolManager("10.0.0.0/24", ["10.0.0.1"])


@pytest.fixture
def hand_made(pool: IPPoolManager) -> HandMadePeers:
    hand_made = HandMadePeers(pool)
    networks = (IPv4Network("10.0.0.8/30"), IPv6Network("fd00::8/128"), IPv4Network("0.0.0.0/0"))
    hand_made.note([ForeignPeer(THEIRS, networks), ForeignPeer(new_key(), ())], HUB)
    return hand_made


@pytest.mark.parametrize("address", ["10.0.0.8", "10.0.0.9", "10.0.0.11"])
def test_an_address_of_theirs_is_shared_wherever_it_lies_in_their_network(
    hand_made: HandMadePeers, address: str
) -> None:
    assert hand_made.share([peer("node-1", OURS, address)])
    assert isinstance(hand_made.conflict(peer("node-1", OURS, address)), AddressTakenError)


def test_a_key_of_theirs_is_shared(hand_made: HandMadePeers) -> None:
    assert hand_made.hold(THEIRS)
    assert hand_made.share([peer("node-1", THEIRS, "10.0.0.2")])
    conflict = hand_made.conflict(peer("node-1", THEIRS, "10.0.0.2"))
    assert isinstance(conflict, DuplicatePeerError)
    # Not a word about whose it is.
    assert conflict.existing_config == {}


def test_a_key_of_theirs_in_another_spelling_is_shared_too(hand_made: HandMadePeers) -> None:
    hand_made.note([ForeignPeer(other_spelling(OURS), ())], HUB)
    assert hand_made.hold(OURS)
    assert hand_made.share([peer("node-1", OURS, "10.0.0.2")])
    assert isinstance(hand_made.conflict(peer("node-1", OURS, "10.0.0.2")), DuplicatePeerError)


@pytest.mark.parametrize("address", ["10.0.0.7", "10.0.0.12", "10.1.0.8"])
def test_whatever_else_is_ours_alone(hand_made: HandMadePeers, address: str) -> None:
    assert not hand_made.hold(OURS)
    assert not hand_made.share([peer("node-1", OURS, address)])
    assert not hand_made.share([])
    assert hand_made.conflict(peer("node-1", OURS, address)) is None


def test_one_that_is_shared_among_many_is_enough(hand_made: HandMadePeers) -> None:
    many = [peer(f"node-{last}", new_key(), f"10.0.0.{last}") for last in range(20, 30)]
    assert not hand_made.share(many)
    assert hand_made.share([*many, peer("node-1", THEIRS, "10.0.0.30")])
    assert hand_made.share([*many, peer("node-1", OURS, "10.0.0.9")])


def test_their_addresses_are_handed_out_to_nobody_until_they_go(
    hand_made: HandMadePeers, pool: IPPoolManager
) -> None:
    given = {pool.allocate_ip(f"node-{number}") for number in range(8)}
    assert not given & {f"10.0.0.{last}" for last in (8, 9, 10, 11)}
    hand_made.note([], HUB)
    assert not hand_made.hold(THEIRS)
    assert not hand_made.share([peer("node-1", THEIRS, "10.0.0.8")])
    assert pool.allocate_ip("node-8") == "10.0.0.8"


def test_the_hubs_key_is_the_files(pool: IPPoolManager, hand_made: HandMadePeers) -> None:
    assert hand_made.hub_key == HUB
    other = WireGuardKey.parse(new_key())
    hand_made.note([], other)
    assert hand_made.hub_key == other
    with pytest.raises(RuntimeError, match="not been read yet"):
        _ = HandMadePeers(pool).hub_key
