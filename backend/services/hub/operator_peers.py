"""The operator's peers of wg0.conf: their keys and addresses, and the room that they leave for ours."""

from collections.abc import Callable, Iterable, Sequence
from ipaddress import IPv4Network

from backend.errors import AddressTakenError, KeyTakenError, PeerLimitError, ProvisioningError
from backend.models.wireguard.keys import WireGuardKey, canonical_spelling
from backend.models.wireguard.peer import Peer
from backend.services.hub.config_text import OperatorPeer
from backend.services.ip_pool_manager import IPPoolManager


class PeerLimit:
    """The most peers that the interface's implementation takes, ours and the operator's together."""

    def __init__(
        self, interface: str = "", most: Callable[[], int | None] = lambda: None, fewest: int = 0
    ) -> None:
        """`most` returns the limit, None for none. It is called each time: the interface may be replaced.

        It is not called for fewer than `fewest` peers, which every interface takes.
        """
        self._interface = interface
        self._most = most
        self._fewest = fewest

    def require_room(self, peers: int) -> None:
        """Raise PeerLimitError unless the interface takes one more than `peers`."""
        if peers < self._fewest:
            return
        most = self._most()
        if most is not None and peers >= most:
            raise PeerLimitError(self._interface, most)


class OperatorPeers:
    """Keeps the operator's addresses out of the pool, and finds peers of ours that collide with them."""

    def __init__(self, pool: IPPoolManager, limit: PeerLimit | None = None) -> None:
        self._pool = pool
        self._limit = limit or PeerLimit()
        self._count = 0
        # Canonical: another spelling would give the holder of one private key a second address.
        self._keys: frozenset[str] = frozenset()
        self._hub_key: WireGuardKey | None = None

    def note(self, peers: Sequence[OperatorPeer], hub_key: WireGuardKey) -> None:
        """Replace the operator's peers by those that the file has now."""
        networks = (network for peer in peers for network in peer.allowed_ips)
        self._pool.set_operators(network for network in networks if isinstance(network, IPv4Network))
        keys = {peer.public_key for peer in peers}
        self._count = len(keys)
        self._keys = frozenset(map(canonical_spelling, keys))
        self._hub_key = hub_key

    def require_room_beside(self, ours: int) -> None:
        """Raise PeerLimitError if the interface is full with `ours` and the operator's peers."""
        self._limit.require_room(ours + self._count)

    @property
    def hub_key(self) -> WireGuardKey:
        """The public half of the file's PrivateKey."""
        if self._hub_key is None:
            raise RuntimeError("the hub's config has not been read yet")
        return self._hub_key

    def has_key(self, key: WireGuardKey) -> bool:
        """Return whether one of them has this key, in any spelling; `key` is as `wg pubkey` prints it."""
        return key in self._keys

    def overlaps(self, ours: Iterable[Peer]) -> bool:
        """Return whether one of them has the key or the address of a peer in `ours`."""
        return any(
            canonical_spelling(peer.wireguard_public_key) in self._keys
            or self._pool.is_operators(peer.address)
            for peer in ours
        )

    def conflict(self, peer: Peer) -> ProvisioningError | None:
        """Return why this peer can't be added beside them, or None."""
        if self.has_key(peer.wireguard_public_key):
            return KeyTakenError(peer.node_id)
        if self._pool.is_operators(peer.address):
            return AddressTakenError(str(peer.address))
        return None
