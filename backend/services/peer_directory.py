"""Index of the hub's peers in memory, by node_id and by key, with each peer's change that is under way."""

from collections.abc import Iterable
from threading import Lock
from typing import Final

from backend.errors import IPPoolExhaustedError, PeerNotFoundError
from backend.models.wireguard.keys import WireGuardKey
from backend.models.wireguard.peer import Change, Peer
from backend.services.hub.operator_peers import OperatorPeers
from backend.services.ip_pool_manager import IPPoolManager


class PeerDirectory:
    """The hub's peers, and the addresses that they hold. It can be rebuilt from the records at any time.

    A peer that is being added is known here, so that its name, key and address are taken, but it is not
    listed. One that is being removed is listed until the hub has forgotten it.
    """

    def __init__(self, pool: IPPoolManager, operator_peers: OperatorPeers) -> None:
        self._pool = pool
        self._operator_peers = operator_peers
        # Guards the attributes below. The service holds it from its look at the directory until `begin`, so
        # that two requests can't take the same name, key or address. Never held across I/O.
        self.lock: Final = Lock()
        self._by_node: dict[str, Peer] = {}
        self._by_key: dict[WireGuardKey, Peer] = {}
        self._under_way: dict[str, Change] = {}
        # Grows whenever `list` would return something else, so that a rendered list can be reused.
        self.revision = 0

    def load(self, peers: Iterable[Peer]) -> None:
        """Add the peers of the records that aren't here yet, and reserve their addresses."""
        with self.lock:
            for peer in peers:
                if peer.node_id not in self._by_node:
                    self._keep(peer)
                    self._pool.adopt(peer.node_id, peer.address)
            self.revision += 1

    def by_node(self, node_id: str) -> Peer | None:
        """Return the peer of this name, also one that is being added or removed."""
        return self._by_node.get(node_id)

    def by_key(self, key: WireGuardKey) -> Peer | None:
        """Return the peer with this key, also one that is being added or removed."""
        return self._by_key.get(key)

    def under_way(self, *peers: Peer | None) -> Change | None:
        """Return the first change under way of these peers."""
        for peer in peers:
            if peer is not None and peer.node_id in self._under_way:
                return self._under_way[peer.node_id]
        return None

    def listed(self, node_id: str) -> Peer:
        """Return the peer of this name; raise PeerNotFoundError."""
        # Under the lock: between two reads a peer that is being added may be taken back.
        with self.lock:
            peer, change = self._by_node.get(node_id), self._under_way.get(node_id)
        if peer is None or (change is not None and change.adds):
            raise PeerNotFoundError(node_id)
        return peer

    def list(self) -> list[Peer]:
        """Return the listed peers in the order in which they were added."""
        with self.lock:
            hidden = {node_id for node_id, change in self._under_way.items() if change.adds}
            return [peer for peer in self._by_node.values() if peer.node_id not in hidden]

    def begin(self, change: Change) -> None:
        """Register a change as under way, and a new peer with it. The caller holds the lock."""
        self._under_way[change.peer.node_id] = change
        if change.before is None:
            self._keep(change.peer)

    def end(self, change: Change, *, applied: bool) -> None:
        """End a change that was applied, or that failed: then the peer is as before it."""
        with self.lock:
            self.end_locked(change, applied=applied)

    def end_locked(self, change: Change, *, applied: bool) -> None:
        """Do what `end` does for a caller that holds the lock."""
        before, after = (change.before, change.after) if applied else (change.after, change.before)
        del self._under_way[change.peer.node_id]
        if after is None:
            # The one place where an address becomes free: the hub doesn't have the peer now.
            del self._by_node[change.peer.node_id]
            self._pool.deallocate_ip(change.peer.node_id)
        if before is not None and before is not after:
            self._by_key.pop(before.wireguard_public_key, None)
        if after is not None:
            self._keep(after.for_memory())
        self.revision += 1

    def require_room(self) -> None:
        """Raise PeerLimitError or IPPoolExhaustedError where no peer can be added."""
        self._operator_peers.require_room_beside(len(self._by_node))
        if self._pool.available_count() == 0:
            stats = self._pool.get_pool_stats()
            raise IPPoolExhaustedError(str(self._pool.network), stats["allocated_addresses"])

    def _keep(self, peer: Peer) -> None:
        self._by_node[peer.node_id] = self._by_key[peer.wireguard_public_key] = peer
