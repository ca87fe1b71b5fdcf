"""What `wg show NAME dump` prints, as an interface's state."""

from dataclasses import asdict
from ipaddress import IPv4Address, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.models.wireguard.interface import InterfacePeer, InterfaceState, preshared_key_digest
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
_ENDPOINTS = st.sampled_from([None, "198.51.100.7:51820", "[2001:db8::1]:7", "[fe80::1%eth0]:65535"])
_COUNTERS = st.integers(0, 2**63)


@st.composite
def peers(draw: st.DrawFn) -> tuple[InterfacePeer, str]:
    """Return a peer, and its line behind the key in what `wg show NAME dump` prints."""
    allowed = draw(_CIDRS)
    secret = draw(st.sampled_from([None, SECRET]))
    keepalive = draw(st.integers(0, 65535))
    endpoint = draw(_ENDPOINTS)
    counters = draw(_COUNTERS), draw(_COUNTERS), draw(_COUNTERS)
    digest = None if secret is None else preshared_key_digest(secret)
    fields = [
        secret or "(none)",
        endpoint or "(none)",
        ",".join(sorted(allowed)) or "(none)",
        *counters,
        keepalive or "off",
    ]
    peer = InterfacePeer(tuple(sorted(allowed)), digest, keepalive, endpoint, *counters)
    return peer, "\t".join(map(str, fields))


_PEERS = st.dictionaries(st.sampled_from([FIRST, SECOND, THIRD]), peers())


@given(
    st.sampled_from([None, HUB]),
    st.integers(0, 65535),
    st.integers(0, 2**32 - 1),
    _PEERS,
    st.sampled_from(["", "\tnew"]),
)
def test_a_dump_is_read_as_it_was_printed(
    key: str | None, port: int, fwmark: int, printed: dict[str, tuple[InterfacePeer, str]], later_field: str
) -> None:
    lines = [f"{SECRET}\t{key or '(none)'}\t{port}\t{hex(fwmark) if fwmark else 'off'}\n"]
    lines += [f"{name}\t{fields}{later_field}\n" for name, (_, fields) in printed.items()]
    state = InterfaceState.parse("".join(lines))
    assert (state.public_key, state.listen_port, state.fwmark) == (key, port, fwmark)
    # All fields: a comparison of two peers passes over endpoint and counters.
    assert {name: asdict(peer) for name, peer in state.peers.items()} == {
        name: asdict(peer) for name, (peer, _) in printed.items()
    }


@given(_PEERS)
def test_no_secret_of_a_dump_is_kept(printed: dict[str, tuple[InterfacePeer, str]]) -> None:
    lines = [f"{SECRET}\t{HUB}\t1\toff\n", *(f"{name}\t{line}\n" for name, (_, line) in printed.items())]
    state = InterfaceState.parse("".join(lines))
    assert SECRET not in repr(asdict(state))
    assert "digest" not in repr(state)


def test_endpoint_and_counters_make_no_difference_between_two_peers() -> None:
    settings = ("10.0.0.2/32",), None, 25
    assert InterfacePeer(*settings, "192.0.2.1:7", 1, 2, 3) == InterfacePeer(*settings)


@pytest.mark.parametrize("text", ["", "\n", "a\tb\n", f"{SECRET}\t{HUB}\tport\toff\n"])
def test_invalid_dump_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        InterfaceState.parse(text)
