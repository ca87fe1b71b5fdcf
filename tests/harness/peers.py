"""Peers, and their blocks of wg0.conf, in one line."""

from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_network
from typing import Final

from backend.models.wireguard.keys import WireGuardKey
from backend.models.wireguard.peer import Peer
from backend.services.hub.config_text import PeerBlock

NOON: Final = datetime(2026, 2, 19, 12, tzinfo=UTC)


def networks(*texts: str) -> tuple[IPv4Network | IPv6Network, ...]:
    """Return AllowedIPs."""
    return tuple(map(ip_network, texts))


def peer(node_id: str, key: str, address: str | IPv4Address) -> Peer:
    """Return a provisioned node."""
    return Peer(node_id, "libp2p", WireGuardKey.parse_written(key), IPv4Address(address), NOON)


def block(label: str, key: str, address: str | IPv4Address, keepalive: int | None = None) -> PeerBlock:
    """Return a block of wg0.conf; `keepalive` is in seconds."""
    network = IPv4Network(IPv4Address(address))
    return PeerBlock.make(label, WireGuardKey.parse_written(key), (network,), keepalive)
