"""The source of a request: the address for rate limits, connection caps and the audit log."""

import socket
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, Self

from backend.models.fields import is_mapped, unmapped

_MAPPED_IPV4: Final = bytes(10) + b"\xff\xff"


class LimitKind(StrEnum):
    """What the rate limits count requests by: each kind has a limit and counts of its own."""

    SOURCE = "source"
    TOKEN = "token"  # noqa: S105 - a kind
    KEY = "key"
    FAILED_AUTHENTICATION = "failed_authentication"


def network_of(address: str) -> str:
    """Return the name that an address is counted by: its /64 for IPv6, the least that a subscriber gets.

    An IPv4 address that is mapped into IPv6 counts as itself; text that is no address is returned as it is.
    """
    if ":" not in address:
        return address
    try:
        packed = socket.inet_pton(socket.AF_INET6, address.partition("%")[0])
    except OSError:
        return address
    if packed.startswith(_MAPPED_IPV4):
        return socket.inet_ntoa(packed[len(_MAPPED_IPV4) :])
    return f"{socket.inet_ntop(socket.AF_INET6, packed[:8] + bytes(8))}/64"


@lru_cache(maxsize=4096)
def _address(text: str) -> IPv4Address | IPv6Address | None:
    """Read an address, without port and brackets; IPv4 that is mapped into IPv6 as itself."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    address = unmapped(address)
    return None if isinstance(address, IPv6Address) and address.scope_id else address


def _network(word: str) -> IPv4Network | IPv6Network:
    try:
        network = ip_network(word, strict=False)
    except ValueError:
        raise ValueError(
            f"names {word!r}, which is no network; write some like 127.0.0.1,10.1.0.0/16, or unix"
        ) from None
    if "/" in word and ip_address(word.partition("/")[0]) != network.network_address:
        raise ValueError(f"has a network with host bits set ({word}); write {network}")
    if is_mapped(network):
        raise ValueError(f"names {word}, and IPv4 proxies count as IPv4; write it as such, like 127.0.0.1")
    return network


@dataclass(frozen=True, slots=True)
class TrustedProxies:
    """The proxies whose last X-Forwarded-For hop is believed: it is the client that connected to them.

    `unix` trusts every client of the UNIX socket.
    """

    networks: tuple[IPv4Network | IPv6Network, ...] = ()
    unix: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read networks, addresses and `unix`, separated by commas; raise ValueError."""
        words = [word for word in (part.strip() for part in text.split(",")) if word]
        return cls(tuple(_network(word) for word in words if word != "unix"), "unix" in words)

    def trust(self, peer: str | None) -> bool:
        """Say whether the other end of a connection is one of them; None is a UNIX socket's."""
        if peer is None:
            return self.unix
        address = _address(peer) if self.networks else None
        return address is not None and any(address in network for network in self.networks)

    def source(self, peer: str | None, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
        """Return the source of a request: the last hop that a trusted proxy names, else the peer."""
        if not self.trust(peer):
            return peer
        last = b""
        for name, value in headers:
            if name == b"x-forwarded-for":
                last = value
        hop = _address(last.rpartition(b",")[2].strip().decode("latin-1"))
        return peer if hop is None else str(hop)
