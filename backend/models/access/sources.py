"""Where a request comes from: the address that limits, connection caps and the audit log go by."""

import socket
from collections.abc import Collection, Iterable
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, Self

from backend.models.fields import is_mapped, unmapped

# Peers of which it is remembered whether they are proxies.
_MOST_KNOWN: Final = 1024
_MAPPED_IPV4: Final = bytes(10) + b"\xff\xff"


def network_of(address: str) -> str:
    """Return what an address counts as: IPv6 by its /64, the least that anybody is given.

    An IPv4 address that comes mapped into IPv6 counts as itself, and what is no address as it is.
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


@lru_cache(maxsize=4096)
def _hop(text: str) -> str | None:
    address = _address(text)
    return None if address is None else str(address)


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


class TrustedProxies:
    """The proxies whose last X-Forwarded-For hop is believed: it is who has connected to them."""

    def __init__(self, networks: Collection[IPv4Network | IPv6Network] = (), *, unix: bool = False) -> None:
        """Trust these networks, and with `unix` what comes by the UNIX socket."""
        self._networks = tuple(networks)
        self._unix = unix
        self._any = bool(self._networks) or unix
        # A proxy has one address, or a few.
        self._known: dict[str, bool] = {}

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what is separated by commas: networks, addresses, or `unix`; raise ValueError."""
        words = [word for word in (part.strip() for part in text.split(",")) if word]
        networks = [_network(word) for word in words if word != "unix"]
        return cls(networks, unix="unix" in words)

    def trust(self, peer: str | None) -> bool:
        """Say whether the other end of a connection is one of them; None is a UNIX socket's."""
        if not self._any:
            return False
        if peer is None:
            return self._unix
        known = self._known.get(peer)
        if known is None:
            address = _address(peer)
            known = address is not None and any(address in network for network in self._networks)
            if len(self._known) < _MOST_KNOWN:
                self._known[peer] = known
        return known

    def source(self, peer: str | None, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
        """Return where a request comes from: the last hop that a trusted proxy names, else the peer."""
        if not self.trust(peer):
            return peer
        last = b""
        for name, value in headers:
            if name == b"x-forwarded-for":
                last = value
        return _hop(last.rpartition(b",")[2].strip().decode("latin-1")) or peer
