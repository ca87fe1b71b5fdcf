"""The pool of tunnel addresses: the lowest free one first, and none twice.

It is a cache of the records and can be rebuilt from them at any time by `adopt`.
"""

from bisect import bisect_right
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network
from threading import Lock
from typing import Final

from backend.errors import IPPoolExhaustedError
from backend.services.address_bitmap import AddressBitmap

_SHORTEST_PREFIX: Final = 8
_LONGEST_PREFIX: Final = 30


def _parse_network(network: str | IPv4Network) -> IPv4Network:
    """Return the pool's network, or raise a ValueError that says which one would do."""
    parsed = network if isinstance(network, IPv4Network) else IPv4Network(network, strict=False)
    if not _SHORTEST_PREFIX <= parsed.prefixlen <= _LONGEST_PREFIX:
        raise ValueError(
            f"{network} can't be a pool: choose an IPv4 network with a prefix length from"
            f" /{_SHORTEST_PREFIX} to /{_LONGEST_PREFIX}, such as 10.0.0.0/24"
        )
    return parsed


class IPPoolManager:
    """Hands out the addresses of one IPv4 network (/8 to /30), lowest first. Safe for any number of threads.

    Three kinds of holders keep an address from being handed out: our own peers, the caller's reservation,
    and peers that an operator wrote by hand ("external"). An address may have several of them, and is free
    only when it has none. The network and the broadcast address are never handed out.
    """

    def __init__(self, network: str | IPv4Network, reserved_ips: Iterable[str] | None = None) -> None:
        """Take the network with or without host bits: 10.0.0.5/24 is 10.0.0.0/24. Raises ValueError."""
        self._network = _parse_network(network)
        self._base = int(self._network.network_address)
        self._size = self._network.num_addresses
        # Offsets that stay taken whoever lets go of them.
        self._reserved = frozenset({0, self._size - 1, *map(self._reserved_offset, reserved_ips or ())})

        self._lock = Lock()  # guards everything below; held for microseconds, never across I/O
        self._address_of: dict[str, int] = {}
        self._peer_at: dict[int, str] = {}
        self._allocated = 0  # our peers' addresses that are usable ones of this network
        # External networks as disjoint intervals of offsets [start, stop), in order.
        self._external_starts: list[int] = []
        self._external_stops: list[int] = []
        # Reserved or our peers', without the external ones: what is left when those are replaced.
        self._held = AddressBitmap(self._size)
        for offset in self._reserved:
            self._held.set(offset)
        # Everything that may not be handed out: _held and the external ones.
        self._taken = self._held.copy()

    @property
    def network(self) -> IPv4Network:
        """The network that addresses are handed out from."""
        return self._network

    def allocate_ip(self, peer_id: str) -> str:
        """Give a peer the lowest free address.

        ValueError if it has one already, IPPoolExhaustedError if none is left.
        """
        with self._lock:
            self._refuse_second(peer_id)
            offset = self._taken.lowest_clear()
            if offset is None:
                raise IPPoolExhaustedError(str(self._network), self._allocated)
            self._hold(peer_id, self._base + offset)
        return str(IPv4Address(self._base + offset))

    def adopt(self, peer_id: str, address: IPv4Address) -> None:
        """Take over an address that the records give to a peer, wherever it lies.

        The record is the truth: the address may be reserved, external, or outside of a network that the
        operator has changed since. ValueError if the peer has an address or another peer holds this one.
        """
        with self._lock:
            self._refuse_second(peer_id)
            holder = self._peer_at.get(int(address))
            if holder is not None:
                raise ValueError(f"address {address} of peer {peer_id} is held by peer {holder}")
            self._hold(peer_id, int(address))

    def deallocate_ip(self, peer_id: str) -> None:
        """Take a peer's address back; ValueError if the peer has none."""
        with self._lock:
            address = self._address_of.pop(peer_id, None)
            if address is None:
                raise ValueError(f"peer {peer_id} has no address")
            del self._peer_at[address]
            offset = address - self._base
            self._allocated -= self._is_usable(offset)
            if not 0 <= offset < self._size or offset in self._reserved:
                return
            self._held.clear(offset)
            if not self._is_external_offset(offset):
                self._taken.clear(offset)

    def get_allocated_ip(self, peer_id: str) -> str | None:
        """Return the address that a peer holds."""
        with self._lock:
            address = self._address_of.get(peer_id)
        return None if address is None else str(IPv4Address(address))

    def is_allocated(self, ip: str) -> bool:
        """Whether one of our peers holds the address; ValueError if it isn't an IPv4 address."""
        address = int(IPv4Address(ip))
        with self._lock:
            return address in self._peer_at

    def set_external(self, networks: Iterable[IPv4Network]) -> None:
        """Replace what hand-made peers hold: their AllowedIPs, as far as they lie in the pool.

        A network that covers the whole pool is a route to elsewhere and holds nothing.
        """
        intervals = sorted(
            (int(held.network_address) - self._base, int(held.broadcast_address) - self._base + 1)
            for held in networks
            if held.overlaps(self._network) and not self._network.subnet_of(held)
        )
        starts: list[int] = []
        stops: list[int] = []
        for start, stop in intervals:
            if stops and start <= stops[-1]:
                stops[-1] = max(stops[-1], stop)
            else:
                starts.append(start)
                stops.append(stop)
        with self._lock:
            taken = self._held.copy()
            for start, stop in zip(starts, stops, strict=True):
                taken.set_range(start, stop)
            self._external_starts, self._external_stops, self._taken = starts, stops, taken

    def is_external(self, address: IPv4Address) -> bool:
        """Whether a hand-made peer holds the address, be it ours as well or not."""
        with self._lock:
            return self._is_external_offset(int(address) - self._base)

    def available_count(self) -> int:
        """Return how many addresses can still be handed out."""
        with self._lock:
            return self._taken.clear_count

    def get_pool_stats(self) -> dict[str, int]:
        """Count the usable addresses: total = reserved + allocated + available; utilization in whole percent.

        An address that is reserved or external and also held by one of our peers counts as allocated.
        """
        total = self._size - 2
        with self._lock:
            allocated, available = self._allocated, self._taken.clear_count
        return {
            "total_addresses": total,
            "reserved_addresses": total - allocated - available,
            "allocated_addresses": allocated,
            "available_addresses": available,
            "utilization_percent": allocated * 100 // total,
        }

    def _reserved_offset(self, ip: str) -> int:
        address = IPv4Address(ip)
        if address not in self._network:
            raise ValueError(f"reserved address {address} is not in {self._network}")
        return int(address) - self._base

    def _is_usable(self, offset: int) -> bool:
        return 0 < offset < self._size - 1

    def _is_external_offset(self, offset: int) -> bool:
        before = bisect_right(self._external_starts, offset) - 1
        return before >= 0 and offset < self._external_stops[before]

    def _refuse_second(self, peer_id: str) -> None:
        address = self._address_of.get(peer_id)
        if address is not None:
            raise ValueError(f"Peer {peer_id} already has IP {IPv4Address(address)}")

    def _hold(self, peer_id: str, address: int) -> None:
        self._address_of[peer_id] = address
        self._peer_at[address] = peer_id
        offset = address - self._base
        self._allocated += self._is_usable(offset)
        if 0 <= offset < self._size:
            self._held.set(offset)
            self._taken.set(offset)
