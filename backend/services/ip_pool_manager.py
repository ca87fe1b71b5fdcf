"""The pool of tunnel addresses: the lowest free one first, and none twice.

It caches what the records hold, and `adopt` builds it from them.
"""

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network
from threading import Lock
from typing import Final

from pyroaring import BitMap

from backend.errors import IPPoolExhaustedError

SHORTEST_PREFIX: Final = 8
LONGEST_PREFIX: Final = 30


class IPPoolManager:
    """Hands out the addresses of one IPv4 network (/8 to /30), lowest first. Safe for any number of threads.

    An address may be held by a peer of ours, by an operator's peer, and as one that the caller reserves, by
    several of them at once, and is free when none of them holds it. The network and the broadcast address are
    never handed out.
    """

    def __init__(self, network: str | IPv4Network, reserved_ips: Iterable[str] | None = None) -> None:
        """Take the network with or without host bits: 10.0.0.5/24 is 10.0.0.0/24. Raises ValueError."""
        # The network that addresses are handed out from.
        self.network: Final = IPv4Network(network, strict=False)
        if not SHORTEST_PREFIX <= self.network.prefixlen <= LONGEST_PREFIX:
            raise ValueError(
                f"{network} can't be a pool: choose an IPv4 network with a prefix length from"
                f" /{SHORTEST_PREFIX} to /{LONGEST_PREFIX}, such as 10.0.0.0/24"
            )
        self._base = int(self.network.network_address)
        self._size = self.network.num_addresses
        # The bitmaps hold offsets in the network; they cost kilobytes for a /8, too.
        self._reserved: Final = BitMap({0, self._size - 1, *map(self._reserved_offset, reserved_ips or ())})

        self._lock = Lock()  # guards everything below; held for microseconds, never across I/O
        # Of our peers, wherever their addresses lie.
        self._address_of: dict[str, int] = {}
        self._peer_at: dict[int, str] = {}
        self._ours = BitMap()
        self._operators = BitMap()
        self._free = self._unheld()

    def allocate_ip(self, peer_id: str) -> str:
        """Give a peer the lowest free address.

        ValueError if it has one already, IPPoolExhaustedError if none is left.
        """
        with self._lock:
            self._refuse_second(peer_id)
            if not self._free:
                raise IPPoolExhaustedError(str(self.network), self._allocated())
            address = self._base + self._free.min()
            self._hold(peer_id, address)
        return str(IPv4Address(address))

    def adopt(self, peer_id: str, address: IPv4Address) -> None:
        """Take over an address that the records give to a peer, wherever it lies.

        The record is the truth: the address may be reserved, held by an operator's peer too, or outside of a
        network that was changed since. ValueError if the peer has an address or another peer holds this one.
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
            if 0 <= offset < self._size:
                self._ours.remove(offset)
                if offset not in self._reserved and offset not in self._operators:
                    self._free.add(offset)

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

    def set_operators(self, networks: Iterable[IPv4Network]) -> None:
        """Replace what the operator's peers hold: their AllowedIPs, as far as they lie in the pool.

        A network that covers the whole pool is a route to elsewhere and holds nothing.
        """
        operators = BitMap()
        for held in networks:
            # Of two networks that overlap one lies in the other.
            if held.subnet_of(self.network) and held != self.network:
                start = int(held.network_address) - self._base
                operators.add_range(start, start + held.num_addresses)
        with self._lock:
            self._operators = operators
            self._free = self._unheld()

    def is_operators(self, address: IPv4Address) -> bool:
        """Whether an operator's peer holds the address, be it ours as well or not."""
        offset = int(address) - self._base
        with self._lock:
            return 0 <= offset < self._size and offset in self._operators

    def available_count(self) -> int:
        """Return how many addresses can still be handed out."""
        with self._lock:
            return len(self._free)

    def get_pool_stats(self) -> dict[str, int]:
        """Count the usable addresses: total = reserved + allocated + available; utilization in whole percent.

        What one of our peers holds counts as allocated, whether it is also reserved or an operator's peer's.
        """
        total = self._size - 2
        with self._lock:
            allocated, available = self._allocated(), len(self._free)
        return {
            "total_addresses": total,
            "reserved_addresses": total - allocated - available,
            "allocated_addresses": allocated,
            "available_addresses": available,
            "utilization_percent": allocated * 100 // total,
        }

    def _reserved_offset(self, ip: str) -> int:
        address = IPv4Address(ip)
        if address not in self.network:
            raise ValueError(f"reserved address {address} is not in {self.network}")
        return int(address) - self._base

    def _unheld(self) -> BitMap:
        return (self._reserved | self._ours | self._operators).flip(0, self._size)

    def _allocated(self) -> int:
        """Count our peers' addresses that can be handed out."""
        return self._ours.range_cardinality(1, self._size - 1)

    def _refuse_second(self, peer_id: str) -> None:
        address = self._address_of.get(peer_id)
        if address is not None:
            raise ValueError(f"Peer {peer_id} already has IP {IPv4Address(address)}")

    def _hold(self, peer_id: str, address: int) -> None:
        self._address_of[peer_id] = address
        self._peer_at[address] = peer_id
        offset = address - self._base
        if 0 <= offset < self._size:
            self._ours.add(offset)
            self._free.discard(offset)
