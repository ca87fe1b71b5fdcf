"""What the service reads of an interface is what `wg` itself prints of it, whatever the interface was told."""

import re
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from hypothesis import given
from hypothesis import strategies as st

from backend.adapters.wireguard.wg import WgInterface
from backend.models.wireguard.interface import InterfacePeer, preshared_key_digest
from backend.models.wireguard.keys import WireGuardPrivateKey
from tests.harness.hosts import LocalHost
from tests.harness.nodes import shown
from tests.harness.torture import tried
from tests.harness.wireguard import HubInterface, Interface

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
            "AllowedIPs": st.lists(_NETWORKS, max_size=4).map(", ".join),
        },
    ),
    max_size=6,
)
