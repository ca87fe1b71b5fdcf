"""What `wg show NAME dump` prints, as an interface's state."""

from ipaddress import IPv4Address, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.models.wireguard.interface import InterfacePeer, InterfaceState
from backend.models.wireguard.keys import WireGuardPrivateKey

PRIVATE = WireGuardPrivateKey(bytes([1] * 32))
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
def test_invalid_dump_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        InterfaceState.parse(text)
