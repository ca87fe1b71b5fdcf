"""What `wg show dump` prints, and how it differs from the file."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.models.wireguard.interface_state import InterfacePeer, InterfaceState
from backend.models.wireguard.keys import WireGuardPrivateKey
from backend.services.hub.config_text import OperatorPeer
from backend.services.hub.drift import DesiredInterface, compare
from tests.harness.peers import block

HUB, FIRST, SECOND, THIRD = (WireGuardPrivateKey(bytes([n] * 32)).public_key() for n in range(1, 5))
SECRET = WireGuardPrivateKey(bytes([9] * 32)).reveal()

_CIDRS = st.sets(
    st.one_of(
        st.builds(lambda n: f"{IPv4Address(n)}/32", st.integers(0, 2**32 - 1)),
        st.builds(lambda n: f"{IPv6Network(n)}", st.integers(0, 2**128 - 1)),
    ),
    max_size=4,
)
_PEERS = st.dictionaries(
    st.sampled_from([FIRST, SECOND, THIRD]),
    st.builds(
        InterfacePeer,
        _CIDRS.map(frozenset),
        st.sampled_from([None, SECRET]),
        st.integers(0, 65535),
    ),
)


def printed(state: InterfaceState) -> str:
    """Write a state as `wg show NAME dump` does."""
    lines = [
        [
            SECRET,
            state.public_key or "(none)",
            state.listen_port,
            hex(state.fwmark) if state.fwmark else "off",
        ]
    ]
    for key, peer in state.peers.items():
        allowed = ",".join(sorted(peer.allowed_ips)) or "(none)"
        keepalive = peer.persistent_keepalive or "off"
        lines.append([key, peer.preshared_key or "(none)", "[2001:db8::1]:7", allowed, 0, 0, 0, keepalive])
    return "".join("\t".join(map(str, line)) + "\n" for line in lines)


@given(
    st.builds(
        InterfaceState, st.sampled_from([None, HUB]), st.integers(0, 65535), st.integers(0, 2**32 - 1), _PEERS
    )
)
def test_a_dump_is_read_as_it_was_printed(state: InterfaceState) -> None:
    assert InterfaceState.parse(printed(state)) == state


def test_no_secret_of_a_dump_is_shown() -> None:
    state = InterfaceState(HUB, 51820, 0, {FIRST: InterfacePeer(frozenset(), SECRET)})
    assert SECRET not in repr(InterfaceState.parse(printed(state)))


@pytest.mark.parametrize("text", ["", "\n", "a\tb\n", f"{SECRET}\t{HUB}\tport\toff\n"])
def test_what_is_no_dump_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        InterfaceState.parse(text)


OURS = block("node-1", FIRST, "10.0.0.2")
OPERATORS = OperatorPeer(
    SECOND,
    (IPv4Network("10.0.0.200/32"), IPv6Network("fd00::/64"), IPv6Network("::ffff:1.2.3.4/128")),
    SECRET,
    21,
)
DESIRED = DesiredInterface(HUB, 51820, 7, (OPERATORS,), (OURS,))


def actual() -> InterfaceState:
    return InterfaceState(
        HUB,
        51820,
        7,
        {
            FIRST: InterfacePeer(frozenset({"10.0.0.2/32"})),
            SECOND: InterfacePeer(
                frozenset({"10.0.0.200/32", "fd00::/64", "::ffff:1.2.3.4/128"}), SECRET, 21
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
        ({"peers": actual().peers | {THIRD: InterfacePeer(frozenset())}}, "1 peer(s) not in the file"),
        ({"peers": actual().peers | {FIRST: InterfacePeer(frozenset())}}, "1 peer(s) changed"),
    ],
)
def test_each_difference_is_named(change: dict[str, object], said: str) -> None:
    assert str(compare(replace(actual(), **change), DESIRED)) == said  # type: ignore[arg-type] # a field each


def test_what_a_sync_does_not_clear_is_told_apart() -> None:
    state = actual()
    state.peers[FIRST] = InterfacePeer(frozenset({"10.0.0.2/32"}), SECRET, 25)
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
            FIRST: InterfacePeer(frozenset({"10.0.0.2/32"})),
            SECOND: InterfacePeer(frozenset()),
            THIRD: InterfacePeer(frozenset({"10.0.0.9/32"})),
        },
    )
    assert not compare(state, DesiredInterface(HUB, 51820, 0, (first, second), (OURS,)))


def test_the_hubs_own_key_as_a_peer_and_a_key_that_stands_twice_are_not_judged() -> None:
    own = OperatorPeer(HUB, (IPv4Network("10.0.0.9/32"),))
    twice = [OperatorPeer(SECOND, (IPv4Network(f"10.0.0.{n}/32"),), None, n) for n in (7, 8)]
    desired = DesiredInterface(HUB, 51820, 0, (own, *twice), ())
    state = InterfaceState(HUB, 51820, 0, {SECOND: InterfacePeer(frozenset({"10.0.0.8/32"}), None, 8)})
    assert not compare(state, desired)
