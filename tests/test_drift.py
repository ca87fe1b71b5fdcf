"""How an interface differs from the file."""

from collections.abc import Sequence
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network

import pytest

from backend.models.wireguard.interface import InterfacePeer, InterfaceState, preshared_key_digest
from backend.models.wireguard.keys import WireGuardPrivateKey
from backend.services.hub.config_text import OperatorPeer, ParsedConfig, PeerBlock
from backend.services.hub.drift import compare
from tests.harness.peers import block

PRIVATE = WireGuardPrivateKey(bytes([1] * 32))
HUB, FIRST, SECOND, THIRD = (WireGuardPrivateKey(bytes([n] * 32)).public_key() for n in range(1, 5))
SECRET = WireGuardPrivateKey(bytes([9] * 32)).reveal()

OURS = block("node-1", FIRST, "10.0.0.2")
OPERATORS = OperatorPeer(
    SECOND,
    (IPv4Network("10.0.0.200/32"), IPv6Network("fd00::/64"), IPv6Network("::ffff:1.2.3.4/128")),
    SECRET,
    21,
)


def file(operators: Sequence[OperatorPeer], *blocks: PeerBlock, fwmark: int = 0) -> ParsedConfig:
    """Return what a file says."""
    return ParsedConfig(b"", b"", PRIVATE, HUB, tuple(operators), blocks, 51820, fwmark)


DESIRED = file([OPERATORS], OURS, fwmark=7)


def actual() -> InterfaceState:
    return InterfaceState(
        HUB,
        51820,
        7,
        {
            FIRST: InterfacePeer(("10.0.0.2/32",)),
            SECOND: InterfacePeer(
                ("10.0.0.200/32", "::ffff:1.2.3.4/128", "fd00::/64"),
                preshared_key_digest(SECRET),
                21,
            ),
        },
    )


def test_an_interface_that_is_what_the_file_says_has_no_drift() -> None:
    assert not compare(actual(), DESIRED)
    # The file leaves the port to `wg`.
    assert not compare(replace(actual(), listen_port=1), replace(DESIRED, listen_port=None))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"listen_port": 51821}, "ListenPort 51821 instead of 51820"),
        ({"fwmark": 0}, "FwMark 0x0 instead of 0x7"),
        ({"peers": {}}, "2 peer(s) missing"),
        ({"peers": actual().peers | {THIRD: InterfacePeer(())}}, "1 peer(s) not in the file"),
        ({"peers": actual().peers | {FIRST: InterfacePeer(())}}, "1 peer(s) changed"),
    ],
)
def test_each_difference_is_named(change: dict[str, object], said: str) -> None:
    assert str(compare(replace(actual(), **change), DESIRED)) == said  # type: ignore[arg-type] # a field each


def test_what_a_sync_does_not_clear_is_told_apart() -> None:
    state = actual()
    state.peers[FIRST] = InterfacePeer(("10.0.0.2/32",), preshared_key_digest(SECRET), 25)
    drift = compare(state, replace(DESIRED, fwmark=0))
    assert (drift.fwmark, drift.preshared_keys, drift.keepalives) == (True, {FIRST}, {FIRST})


def test_an_address_that_several_peers_claim_belongs_to_the_last_and_ours_are_last() -> None:
    first = OperatorPeer(SECOND, (IPv4Network("10.0.0.2/32"), IPv4Network("10.0.0.9/32")))
    second = OperatorPeer(THIRD, (IPv4Network("10.0.0.9/32"),))
    state = InterfaceState(
        HUB,
        51820,
        0,
        {
            FIRST: InterfacePeer(("10.0.0.2/32",)),
            SECOND: InterfacePeer(()),
            THIRD: InterfacePeer(("10.0.0.9/32",)),
        },
    )
    assert not compare(state, file([first, second], OURS))


def test_the_hubs_own_key_as_a_peer_and_a_key_that_stands_twice_are_not_judged() -> None:
    own = OperatorPeer(HUB, (IPv4Network("10.0.0.9/32"),))
    twice = [OperatorPeer(SECOND, (IPv4Network(f"10.0.0.{n}/32"),), None, n) for n in (7, 8)]
    desired = file([own, *twice])
    state = InterfaceState(HUB, 51820, 0, {SECOND: InterfacePeer(("10.0.0.8/32",), None, 8)})
    assert not compare(state, desired)
