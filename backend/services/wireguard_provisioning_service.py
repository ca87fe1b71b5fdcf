"""The sequence of provisioning, written once: known? an address; hand over; answer when it's live."""

import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum, auto
from ipaddress import IPv4Address
from threading import Lock
from typing import Final, TypeVar

from backend.errors import (
    DuplicatePeerError,
    InvalidCredentialsError,
    IPPoolExhaustedError,
    PeerNotFoundError,
    ProvisioningError,
)
from backend.models.wireguard.keys import WireGuardKey
from backend.models.wireguard.provisioning import (
    PeerConfiguration,
    ProvisioningRecord,
    ProvisioningRequest,
)
from backend.services.configurations import Configurations
from backend.services.hand_made_peers import HandMadePeers
from backend.services.hub_committer import HubCommitter
from backend.services.ip_pool_manager import IPPoolManager
from backend.services.ports import Action, Change, Peer

__all__ = [
    "DuplicatePeerError",
    "IPPoolExhaustedError",
    "InvalidCredentialsError",
    "ProvisioningError",
    "WireGuardProvisioningService",
]

log = logging.getLogger(__name__)

_T = TypeVar("_T")

# Stands for the libp2p key of a peer that is known from the file alone, where records are not kept.
UNRECORDED_PUBLIC_KEY: Final = ""


class _Standing(Enum):
    COMING = auto()
    ACTIVE = auto()
    GOING = auto()


@dataclass(slots=True, eq=False)
class _Entry:
    peer: Peer
    standing: _Standing
    # There while the entry is COMING or GOING, and done when that has ended, however. Never carries an error.
    decided: Future[None] | None = None


@dataclass(frozen=True, slots=True)
class _Listed:
    """Everybody's configuration as JSON, which holds for one key of the hub."""

    hub_key: WireGuardKey
    text: bytes


class WireGuardProvisioningService:
    """Provisions and deprovisions peers of one hub.

    Whatever is decided at once (a known node, a full pool) is decided under the lock, in memory;
    everything else waits for the committer. A request that meets a change of the same node or key
    that is still under way waits for its outcome: until then neither answer would be true.
    """

    def __init__(
        self,
        *,
        pool: IPPoolManager,
        hand_made: HandMadePeers,
        committer: HubCommitter,
        configurations: Configurations,
    ) -> None:
        self._pool = pool
        self._hand_made = hand_made
        self._committer = committer
        self._configurations = configurations
        # Guards the four below; never held across I/O. The pool's own lock is taken inside.
        self._lock = Lock()
        self._by_node: dict[str, _Entry] = {}
        self._by_key: dict[WireGuardKey, _Entry] = {}
        # Counts what the list shows; and the list of this count, once somebody has asked for it.
        self._revision = 0
        self._listed: _Listed | None = None

    def start(self) -> None:
        """Fill memory from the records, bring the hub up to them, and begin to take changes."""
        peers = self._committer.load()
        for peer in peers:
            entry = _Entry(peer, _Standing.ACTIVE)
            self._by_node[peer.node_id] = entry
            self._by_key[peer.wireguard_public_key] = entry
            self._pool.adopt(peer.node_id, peer.address)
        self._committer.start(peers)

    def close(self) -> None:
        """Finish what was accepted, and stop."""
        self._committer.close()

    def provision_peer(self, request: ProvisioningRequest, timeout: float | None = None) -> PeerConfiguration:
        """Provision a peer and wait, at most `timeout` seconds, until it is live."""
        return self._configurations.model(self.submit_provision(request).result(timeout))

    def deprovision_peer(self, node_id: str, timeout: float | None = None) -> None:
        """Remove a peer and wait, at most `timeout` seconds, until it is gone from the hub."""
        self.submit_deprovision(node_id).result(timeout)

    def submit_provision(self, request: ProvisioningRequest) -> Future[Peer]:
        """Begin to provision a peer; the future has it as soon as the hub knows it.

        Raises DuplicatePeerError, IPPoolExhaustedError or InvalidCredentialsError, at once or through the
        future, and through the future HubUpdateError or RecordsUnavailableError.
        """
        answer: Future[Peer] = Future()
        self._provision(request, answer)
        return answer

    def submit_deprovision(self, node_id: str) -> Future[None]:
        """Begin to remove a peer; the future is done as soon as the hub has forgotten it.

        Raises PeerNotFoundError, at once or through the future, and through the future HubUpdateError or
        RecordsUnavailableError.
        """
        answer: Future[None] = Future()
        self._deprovision(node_id, answer)
        return answer

    def get_peer_config(self, node_id: str) -> PeerConfiguration:
        """Return one peer's configuration; raise PeerNotFoundError."""
        return self._configurations.model(self._peer(node_id))

    def get_peer_json(self, node_id: str) -> str:
        """Return one peer's configuration as JSON; raise PeerNotFoundError."""
        return self._configurations.json(self._peer(node_id))

    def peer_json(self, peer: Peer) -> str:
        """Return the configuration of a peer as JSON."""
        return self._configurations.json(peer)

    def list_provisioned_peers(self) -> dict[str, PeerConfiguration]:
        """Return every live peer's configuration by node_id, in the order they came."""
        return {peer.node_id: self._configurations.model(peer) for peer in self._live_peers()}

    def list_json(self) -> Iterator[bytes]:
        """Return the same as JSON, in pieces, so that others may go on in between."""
        listed = self._listed
        if listed is not None and listed.hub_key == self._hand_made.hub_key:
            yield listed.text
            return
        hub_key = self._hand_made.hub_key
        with self._lock:
            revision = self._revision
        pieces = []
        for piece in self._configurations.json_by_node(self._live_peers()):
            pieces.append(piece.encode())
            yield pieces[-1]
        with self._lock:
            if revision == self._revision:
                self._listed = _Listed(hub_key, b"".join(pieces))

    def get_pool_stats(self) -> dict[str, int]:
        """Return the pool's figures; see IPPoolManager.get_pool_stats."""
        return self._pool.get_pool_stats()

    @property
    def live(self) -> bool:
        """False where only the file is kept, and no interface is told."""
        return self._committer.live

    def check(self) -> None:
        """Raise the ProvisioningError that a new node's request would meet now, if any."""
        self._committer.check()
        if self._pool.available_count() == 0:
            stats = self._pool.get_pool_stats()
            raise IPPoolExhaustedError(str(self._pool.network), stats["allocated_addresses"])

    def _provision(self, request: ProvisioningRequest, answer: Future[Peer]) -> None:
        with self._lock:
            entries = (self._by_node.get(request.node_id), self._by_key.get(request.wireguard_public_key))
            undecided = _undecided(*entries)
            if undecided is None:
                self._refuse_known(request, *entries)
                self._admit(request, answer)
                return
        _after(undecided, answer, lambda: self._provision(request, answer))

    def _peer(self, node_id: str) -> Peer:
        entry = self._by_node.get(node_id)
        if entry is None or entry.standing is _Standing.COMING:
            raise PeerNotFoundError(node_id)
        return entry.peer

    def _live_peers(self) -> list[Peer]:
        with self._lock:
            return [entry.peer for entry in self._by_node.values() if entry.standing is not _Standing.COMING]

    def _refuse_known(
        self, request: ProvisioningRequest, by_node: _Entry | None, by_key: _Entry | None
    ) -> None:
        node_id, key = request.node_id, request.wireguard_public_key
        if by_node is not None:
            peer = by_node.peer
            if peer.wireguard_public_key == key and peer.public_key in (
                request.public_key,
                UNRECORDED_PUBLIC_KEY,
            ):
                raise DuplicatePeerError(node_id, json.loads(self._configurations.json(peer)))
            raise DuplicatePeerError(node_id, {"node_id": node_id, "assigned_ip": str(peer.address)})
        if by_key is not None or self._hand_made.hold(key):
            raise DuplicatePeerError(node_id, {})
        if key == self._hand_made.hub_key:
            raise InvalidCredentialsError(
                "wireguard_public_key", "this is the hub's own key; send the public half of the node's own"
            )

    def _admit(self, request: ProvisioningRequest, answer: Future[Peer]) -> None:
        """Reserve an address and the two names, and hand the record over."""
        # Reserved before anything is written: a crash may leak an address, never share one.
        address = IPv4Address(self._pool.allocate_ip(request.node_id))
        record = ProvisioningRecord(
            node_id=request.node_id,
            public_key=request.public_key,
            wireguard_public_key=request.wireguard_public_key,
            assigned_ip=address,
            provisioned_at=datetime.now(UTC),
            capabilities=request.capabilities,
            version=request.version,
            metadata=request.metadata,
        )
        peer = Peer(
            node_id=record.node_id,
            public_key=record.public_key,
            wireguard_public_key=record.wireguard_public_key,
            address=address,
            provisioned_at=record.provisioned_at,
        )
        entry = _Entry(peer, _Standing.COMING, Future())
        self._by_node[peer.node_id] = self._by_key[peer.wireguard_public_key] = entry

        def settle(error: ProvisioningError | None) -> None:
            if not self._conclude(entry, _Standing.COMING, forget=error is not None):
                return
            if error is not None:
                _fail(answer, error)
                return
            log.info("peer_provisioned", extra={"node_id": peer.node_id, "address": str(address)})
            _succeed(answer, peer)

        try:
            self._store_provisioning_record(record, Change(Action.ADD, peer, settle))
        except ProvisioningError:
            self._forget(entry)
            raise

    def _store_provisioning_record(self, record: ProvisioningRecord, change: Change) -> None:
        """Hand a new peer's record over to be kept, written to the file and brought to the interface."""
        change.record = record
        self._committer.submit(change)

    def _deprovision(self, node_id: str, answer: Future[None]) -> None:
        with self._lock:
            entry = self._by_node.get(node_id)
            if entry is None:
                raise PeerNotFoundError(node_id)
            undecided = _undecided(entry)
            if undecided is None:
                self._dismiss(entry, answer)
                return
        _after(undecided, answer, lambda: self._deprovision(node_id, answer))

    def _dismiss(self, entry: _Entry, answer: Future[None]) -> None:
        def settle(error: ProvisioningError | None) -> None:
            # Not before the hub has forgotten the peer: until then its address is in use.
            if not self._conclude(entry, _Standing.GOING, forget=error is None):
                return
            if error is not None:
                _fail(answer, error)
                return
            log.info("peer_deprovisioned", extra={"node_id": entry.peer.node_id})
            _succeed(answer, None)

        entry.standing, entry.decided = _Standing.GOING, Future()
        try:
            self._committer.submit(Change(Action.REMOVE, entry.peer, settle))
        except ProvisioningError:
            _decide(entry)
            raise

    def _conclude(self, entry: _Entry, standing: _Standing, *, forget: bool) -> bool:
        """End an entry's coming or going; return False where that has been done already."""
        with self._lock:
            if entry.standing is not standing:
                return False
            if forget:
                self._forget(entry)
            decided = _decide(entry)
            self._revision += 1
            self._listed = None
        decided.set_result(None)
        return True

    def _forget(self, entry: _Entry) -> None:
        peer = entry.peer
        del self._by_node[peer.node_id]
        del self._by_key[peer.wireguard_public_key]
        self._pool.deallocate_ip(peer.node_id)


def _undecided(*entries: _Entry | None) -> Future[None] | None:
    """Return what to wait for before these entries can be judged, or None."""
    for entry in entries:
        if entry is not None and entry.decided is not None:
            return entry.decided
    return None


def _decide(entry: _Entry) -> Future[None]:
    """Make an entry one that can be judged, and return the future of those who wait for that."""
    decided = entry.decided
    if decided is None:
        raise RuntimeError("only an entry that is coming or going can be decided")
    entry.standing, entry.decided = _Standing.ACTIVE, None
    return decided


def _after(undecided: Future[None], answer: Future[_T], again: Callable[[], None]) -> None:
    """Judge once more as soon as the change in the way is decided."""

    def judge(_: Future[None]) -> None:
        try:
            again()
        except ProvisioningError as exc:
            _fail(answer, exc)

    undecided.add_done_callback(judge)


def _succeed(answer: Future[_T], value: _T) -> None:
    # A caller that has gone away has cancelled its future; what it asked for has happened all the same.
    if answer.set_running_or_notify_cancel():
        answer.set_result(value)


def _fail(answer: Future[_T], error: ProvisioningError) -> None:
    if answer.set_running_or_notify_cancel():
        answer.set_exception(error)
