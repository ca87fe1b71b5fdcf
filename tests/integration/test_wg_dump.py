"""What the service reads of an interface is what `wg` itself prints of it."""

from contextlib import closing
from dataclasses import asdict
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, Final

from hypothesis import given
from hypothesis import strategies as st

from backend.adapters.wireguard.wg import WgInterface
from backend.models.wireguard.interface import InterfacePeer, preshared_key_digest
from backend.models.wireguard.keys import WireGuardPrivateKey
from tests.harness.hosts import LocalHost
from tests.harness.nodes import shown
from tests.harness.patience import eventually
from tests.harness.torture import tried
from tests.harness.wireguard import HubInterface, Interface, genkey

_COLUMNS: Final = (
    "allowed-ips",
    "preshared-keys",
    "persistent-keepalive",
    "endpoints",
    "latest-handshakes",
    "transfer",
)
_SECRETS: Final = st.binary(min_size=32, max_size=32).map(WireGuardPrivateKey)
# None that the kernel refuses to send to, as 0.0.0.0, or names differently, as a mapped IPv6 address.
_HOSTS: Final = st.one_of(
    st.builds(lambda n: f"{IPv4Address(n)}", st.integers(0x01000000, 0xDFFFFFFF)),
    st.builds(lambda n: f"[{IPv6Address(n)}]", st.integers(0x20 << 120, 0x3F << 120)),
)
_ENDPOINTS: Final = st.builds(lambda host, port: f"{host}:{port}", _HOSTS, st.integers(1, 65535))
_NETWORKS: Final = st.one_of(
    st.builds(lambda n, bits: f"{IPv4Address(n)}/{bits}", st.integers(0, 2**32 - 1), st.integers(0, 32)),
    st.builds(lambda n, bits: f"{IPv6Address(n)}/{bits}", st.integers(0, 2**128 - 1), st.integers(0, 128)),
)
_PEERS: Final = st.dictionaries(
    _SECRETS.map(WireGuardPrivateKey.public_key),
    st.fixed_dictionaries(
        {},
        optional={
            "PresharedKey": _SECRETS.map(WireGuardPrivateKey.reveal),
            "Endpoint": _ENDPOINTS,
            "PersistentKeepalive": st.integers(0, 65535).map(str),
            "AllowedIPs": st.lists(_NETWORKS, min_size=1, max_size=4).map(", ".join),
        },
    ),
    max_size=6,
)


def printed(hub: HubInterface) -> dict[str, dict[str, Any]]:
    """Return the fields of each peer by its key, as `wg show NAME ...` prints them, a column at a time."""
    columns = [shown(hub, what) for what in _COLUMNS]
    return {key: asdict(_peer(*(column[key] for column in columns))) for key in columns[0]}


def _peer(  # noqa: PLR0913, PLR0917 - a column each
    allowed: str, preshared_key: str, keepalive: str, endpoint: str, handshake: str, transfer: str
) -> InterfacePeer:
    received, sent = map(int, transfer.split("\t"))
    return InterfacePeer(
        () if allowed == "(none)" else tuple(sorted(allowed.split(" "))),
        None if preshared_key == "(none)" else preshared_key_digest(preshared_key),
        0 if keepalive == "off" else int(keepalive),
        None if endpoint == "(none)" else endpoint,
        int(handshake),
        received,
        sent,
    )


def assert_state_is_what_wg_shows(hub: HubInterface) -> None:
    """Compare all fields, between two looks that are the same: counters grow by themselves."""
    with closing(WgInterface(hub.name, IPv4Address(hub.address))) as interface:
        before = printed(hub)
        state = interface.state()
        while before != (after := printed(hub)):
            before, state = after, interface.state()
    assert {key: asdict(peer) for key, peer in state.peers.items()} == before
    assert state.public_key == hub.show("public-key")
    assert state.listen_port == int(hub.show("listen-port"))
    assert hex(state.fwmark) == hub.show("fwmark").replace("off", "0x0")
    kept = repr(asdict(state))
    keys = {hub.private_key, *shown(hub, "preshared-keys").values()} - {"(none)"}
    assert [key for key in keys if key in kept] == []


@tried(25)
@given(peers=_PEERS, fwmark=st.integers(0, 2**32 - 1))
def test_any_configuration_is_read_as_wg_shows_it(
    hub_interface: HubInterface, peers: dict[str, dict[str, str]], fwmark: int
) -> None:
    text = f"{hub_interface.interface_section}FwMark = {fwmark}\n"
    for key, fields in peers.items():
        lines = [f"{name} = {value}\n" for name, value in fields.items()]
        text += "".join(["[Peer]\n", f"PublicKey = {key}\n", *lines])
    hub_interface.configure(text)
    assert set(hub_interface.peers()) == set(peers)
    assert_state_is_what_wg_shows(hub_interface)


def test_counters_of_a_peer_that_talks_are_read_as_wg_shows_them(
    hub_interface: HubInterface, tmp_path: Path
) -> None:
    private_key, public_key = genkey()
    secret, _ = genkey()
    both = f"PresharedKey = {secret}\nAllowedIPs = 10.0.0.0/24\n"
    hub_interface.configure(f"{hub_interface.interface_section}[Peer]\nPublicKey = {public_key}\n{both}")
    with Interface(LocalHost(), "wgtalker", tmp_path) as talker:
        talker.up()
        talker.configure(
            f"[Interface]\nPrivateKey = {private_key}\n[Peer]\nPublicKey = {hub_interface.public_key}\n{both}"
            f"Endpoint = 127.0.0.1:{hub_interface.listen_port}\nPersistentKeepalive = 1\n"
        )
        eventually(lambda: shown(hub_interface, "latest-handshakes")[public_key] != "0")
        assert_state_is_what_wg_shows(hub_interface)
    received, sent = map(int, shown(hub_interface, "transfer")[public_key].split("\t"))
    assert min(received, sent) > 0
