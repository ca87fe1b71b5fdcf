"""The sequence of provisioning, written once: known? an address; hand over; answer when it's live."""

import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import Enum, auto
from ipaddress import IPv4Address
from threading import Lock
from typing import Final

from backend.errors import (
    DuplicatePeerError,
    InvalidCredentialsError,
    IPPoolExhaustedError,
    KeyTakenError,
    PeerNotFoundError,
    ProvisioningError,
    UnauthenticatedError,
)
from backend.models.access.answers import ANSWERS_KEPT
from backend.models.access.audit import AuditAction, AuditOutcome
from backend.models.access.callers import SERVICE, Caller
from backend.models.wireguard.keys import WireGuardKey
from backend.models.wireguard.peer import UNRECORDED_PUBLIC_KEY, Peer
from backend.models.wireguard.provisioning import (
    PeerConfiguration,
    ProvisioningRecord,
    ProvisioningRequest,
)
from backend.services.access.access_control import AccessControl
from backend.services.access.idempotency import IdempotencyKey, RecentAnswers
from backend.services.access.token_uses import TokenUses
from backend.services.configurations import Configurations
from backend.services.hub.hub_committer import HubCommitter
from backend.services.hub.operator_peers import OperatorPeers
from backend.services.ip_pool_manager import IPPoolManager
from backend.services.known_peers import is_same, may_know_address
from backend.services.outcomes import after, fail, pass_on, succeed
from backend.services.ports import AccessStore, Action, Change
from backend.services.readiness import Readiness

__all__ = [
    "DuplicatePeerError",
    "IPPoolExhaustedError",
    "InvalidCredentialsError",
    "ProvisioningError",
    "WireGuardProvisioningService",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Request:
    """What is asked, by whom, and under which key."""

    body: ProvisioningRequest
    caller: Caller
    key: IdempotencyKey | None = None


class _Standing(Enum):
    COMING = auto()
    ACTIVE = auto()
    # An adopted peer's record is being filled in.
    FILLING = auto()
    GOING = auto()


@dataclass(slots=True, eq=False)
class _Entry:
    peer: Peer
    standing: _Standing
    # There while the entry isn't ACTIVE, and done when that has ended, however. Never carries an error.
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

    def __init__(  # noqa: PLR0913 - the parts that it puts together
        self,
        *,
        pool: IPPoolManager,
        hand_made: OperatorPeers,
        committer: HubCommitter,
        configurations: Configurations,
        access: AccessControl,
        token_uses: TokenUses,
        store: AccessStore,
    ) -> None:
        self.access: Final = access
        self._token_uses = token_uses
        self._store = store
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
        # Answers that are on their way to an Idempotency-Key, or got there a moment ago.
        self._answers = RecentAnswers()
        self.readiness: Final = Readiness(
            [
                ("an earlier change", committer.check),
                ("the database", committer.check_records),
                ("the hub's config or interface", committer.check_hub),
                ("the pool", self._check_pool),
            ]
        )

    def start(self) -> None:
        """Fill memory from the records, bring the hub up to them, and begin to take changes."""
        peers = self._committer.load()
        self._take_in(peers)
        self._committer.start(peers, self._take_in)

    def _take_in(self, peers: Sequence[Peer]) -> None:
        """Know peers from here on that are in the records; those that are known stay as they are."""
        with self._lock:
            for peer in peers:
                if peer.node_id not in self._by_node:
                    entry = _Entry(peer, _Standing.ACTIVE)
                    self._by_node[peer.node_id] = self._by_key[peer.wireguard_public_key] = entry
                    self._pool.adopt(peer.node_id, peer.address)
            self._revision += 1
            self._listed = None

    def close(self) -> None:
        """Finish what was accepted, and stop."""
        self._committer.stop()

    def provision_peer(self, request: ProvisioningRequest, timeout: float | None = None) -> PeerConfiguration:
        """Provision a peer and wait, at most `timeout` seconds, until it is live."""
        return self._configurations.model(self.submit_provision(request).result(timeout))

    def deprovision_peer(self, node_id: str, timeout: float | None = None) -> None:
        """Remove a peer and wait, at most `timeout` seconds, until it is gone from the hub."""
        self.submit_deprovision(node_id).result(timeout)

    def submit_provision(self, request: ProvisioningRequest, caller: Caller = SERVICE) -> Future[Peer]:
        """Begin to provision a peer; the future has it as soon as the hub knows it.

        Raises DuplicatePeerError, IPPoolExhaustedError, InvalidCredentialsError or, where the caller's token
        is not for this, UnauthenticatedError, at once or through the future, and through the future
        HubUpdateError or RecordsUnavailableError.
        """
        answer: Future[Peer] = Future()
        self._provision(_Request(request, caller), answer)
        return answer

    def submit_provision_once(
        self, request: ProvisioningRequest, caller: Caller, key: IdempotencyKey
    ) -> Future[bytes]:
        """Begin to provision a peer, or answer as the first time where that was asked before with this key.

        Reads the records, so it is not for an event loop. Raises what `submit_provision` raises, and
        IdempotencyKeyError where the key came with another body.
        """
        scope = caller.name
        # What is written between this look and the next is still among the recent answers.
        kept = self._find_answer(scope, key)
        if kept is not None:
            return kept

        def begin(answer: Future[bytes]) -> None:
            provisioned: Future[Peer] = Future()
            self._provision(_Request(request, caller, key), provisioned)
            provisioned.add_done_callback(lambda _: pass_on(provisioned, self._answered, answer))

        return self._answers.once(scope, key, request.node_id, begin)

    def _find_answer(self, scope: str, key: IdempotencyKey) -> Future[bytes] | None:
        kept = self._store.find_answer(scope, key.key_hash)
        if kept is None or datetime.now(UTC) - kept.created_at > ANSWERS_KEPT:
            return None
        key.require_same(kept.body_hash)
        answer: Future[bytes] = Future()
        answer.set_result(kept.body)
        return answer

    def _answered(self, peer: Peer) -> bytes:
        return self._configurations.answer(peer).encode()

    def answer(self, peer: Peer) -> str:
        """Return the JSON that a node gets that has just been provisioned."""
        return self._configurations.answer(peer)

    def submit_deprovision(self, node_id: str, caller: Caller = SERVICE) -> Future[None]:
        """Begin to remove a peer; the future is done as soon as the hub has forgotten it.

        Raises PeerNotFoundError, at once or through the future, and through the future HubUpdateError or
        RecordsUnavailableError.
        """
        answer: Future[None] = Future()
        self._deprovision(node_id, caller, answer)
        return answer

    def get_peer_config(self, node_id: str) -> PeerConfiguration:
        """Return one peer's configuration; raise PeerNotFoundError."""
        return self._configurations.model(self._peer(node_id))

    def get_peer_json(self, node_id: str) -> str:
        """Return one peer's configuration as JSON; raise PeerNotFoundError."""
        return self._configurations.json(self._peer(node_id))

    def find_by_key(self, wireguard_public_key: str) -> Peer | None:
        """Return the peer that has a WireGuard key, or is about to have it, if there is one."""
        entry = self._by_key.get(WireGuardKey.trusted(wireguard_public_key))
        return None if entry is None else entry.peer

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
    def hub_key(self) -> WireGuardKey:
        """The hub's public key."""
        return self._hand_made.hub_key

    @property
    def live(self) -> bool:
        """False where only the file is kept, and no interface is told."""
        return self._committer.live

    def in_doubt(self) -> bool:
        """Whether the records don't say how the changes under way end."""
        return self._committer.in_doubt()

    @property
    def notices(self) -> tuple[str, ...]:
        """What an operator should know, though the service works."""
        return (*self.access.notices, *self._committer.notices)

    def check(self) -> None:
        """Raise the ProvisioningError that a new node's request would meet now, if any."""
        self.readiness.ask().result()

    def _check_pool(self) -> None:
        self._hand_made.require_room_beside(len(self._by_node))
        if self._pool.available_count() == 0:
            stats = self._pool.get_pool_stats()
            raise IPPoolExhaustedError(str(self._pool.network), stats["allocated_addresses"])

    def _provision(self, asked: _Request, answer: Future[Peer]) -> None:
        request = asked.body
        asked.caller.require_node(request.node_id)
        if request.wireguard_public_key == self._hand_made.hub_key:
            raise InvalidCredentialsError(
                "wireguard_public_key", "this is the hub's own key; send the public half of the node's own"
            )
        with self._lock:
            entries = (self._by_node.get(request.node_id), self._by_key.get(request.wireguard_public_key))
            undecided = _undecided(*entries)
            if undecided is None:
                adopted = self._refuse_known(asked, *entries)
                if adopted is None:
                    self._admit(asked, answer)
                else:
                    self._identify(adopted, asked, answer)
                return
        after(undecided, answer, lambda: self._provision(asked, answer))

    def _peer(self, node_id: str) -> Peer:
        entry = self._by_node.get(node_id)
        if entry is None or entry.standing is _Standing.COMING:
            raise PeerNotFoundError(node_id)
        return entry.peer

    def _live_peers(self) -> list[Peer]:
        with self._lock:
            return [entry.peer for entry in self._by_node.values() if entry.standing is not _Standing.COMING]

    def _refuse_known(self, asked: _Request, by_node: _Entry | None, by_key: _Entry | None) -> _Entry | None:
        """Refuse what is known, and return the entry where all that is known of the node is from the hub."""
        body, caller = asked.body, asked.caller
        same = by_node is not None and is_same(body, caller.identity, by_node.peer)
        # Of a token that is used up one use is left: to ask again what was asked with it.
        used_up = self._token_uses.used_up(caller.credential)
        if used_up and not (same and by_node and by_node.peer.token_id == caller.token_id):
            raise UnauthenticatedError("used_up", caller.token_id)
        may_know = by_node is not None and may_know_address(body, caller, by_node.peer)
        # The key first, or a key that can't be provisioned would tell which node_ids are, and cost no use.
        self._refuse_taken(body, by_node if may_know else None, by_key)
        if by_node is None:
            return None
        peer = by_node.peer
        if may_know and same:
            if peer.public_key == UNRECORDED_PUBLIC_KEY:
                return by_node
            raise self._known_whole(peer)
        known = {"node_id": peer.node_id, "assigned_ip": str(peer.address)} if may_know else {}
        raise DuplicatePeerError(peer.node_id, known)

    def _refuse_taken(self, body: ProvisioningRequest, own: _Entry | None, by_key: _Entry | None) -> None:
        """Refuse a key that a peer has already, unless it is the caller's own."""
        hand_made = by_key is None and self._hand_made.hold(body.wireguard_public_key)
        if hand_made or by_key not in {None, own}:
            raise KeyTakenError(body.node_id)

    def _known_whole(self, peer: Peer) -> DuplicatePeerError:
        return DuplicatePeerError(peer.node_id, json.loads(self._configurations.json(peer)))

    def _identify(self, entry: _Entry, asked: _Request, answer: Future[Peer]) -> None:
        """Fill in an adopted peer's record by what its node says, and then answer as to any repeat."""
        peer = replace(entry.peer, public_key=asked.body.public_key)

        def settle(error: ProvisioningError | None) -> None:
            if error is None:
                entry.peer = peer
            if self._conclude(entry, _Standing.FILLING, forget=False):
                fail(answer, error or self._known_whole(peer))

        entry.standing, entry.decided = _Standing.FILLING, Future()
        try:
            change = Change(Action.IDENTIFY, peer, settle, nonce=asked.caller.nonce)
            change.event = asked.caller.event(
                datetime.now(UTC), AuditAction.IDENTIFY, AuditOutcome.ACCEPTED, peer.node_id
            )
            self._store_provisioning_record(_record(asked.body, peer), change)
        except ProvisioningError:
            _decide(entry)
            raise

    def _admit(self, asked: _Request, answer: Future[Peer]) -> None:
        """Reserve an address and the two names, and hand the record over."""
        request, caller = asked.body, asked.caller
        self._hand_made.require_room_beside(len(self._by_node))
        # Reserved before anything is written: a crash may leak an address, never share one.
        address = IPv4Address(self._pool.allocate_ip(request.node_id))
        peer = Peer(
            node_id=request.node_id,
            public_key=request.public_key,
            wireguard_public_key=request.wireguard_public_key,
            address=address,
            provisioned_at=datetime.now(UTC).replace(microsecond=0),
            token_id=caller.token_id,
        )
        entry = _Entry(peer, _Standing.COMING, Future())
        self._by_node[peer.node_id] = self._by_key[peer.wireguard_public_key] = entry

        def settle(error: ProvisioningError | None) -> None:
            if not self._conclude(entry, _Standing.COMING, forget=error is not None):
                return
            if error is not None:
                fail(answer, error)
                return
            self._token_uses.count(peer.token_id)
            log.info("peer_provisioned", extra={"node_id": peer.node_id, "address": str(address)})
            succeed(answer, peer)

        try:
            change = Change(Action.ADD, peer, settle, nonce=caller.nonce)
            change.event = caller.event(
                datetime.now(UTC), AuditAction.PROVISION, AuditOutcome.ACCEPTED, peer.node_id
            )
            if asked.key is not None:
                change.answer = asked.key.answer(
                    caller.name, peer.node_id, self._answered(peer), peer.provisioned_at
                )
            self._store_provisioning_record(_record(request, peer), change)
        except ProvisioningError:
            self._forget(entry)
            raise

    def _store_provisioning_record(self, record: ProvisioningRecord, change: Change) -> None:
        """Hand a new peer's record over to be kept, written to the file and brought to the interface."""
        change.record = record
        self._committer.submit(change)

    def _deprovision(self, node_id: str, caller: Caller, answer: Future[None]) -> None:
        with self._lock:
            entry = self._by_node.get(node_id)
            if entry is None:
                raise PeerNotFoundError(node_id)
            undecided = _undecided(entry)
            if undecided is None:
                self._dismiss(entry, caller, answer)
                return
        after(undecided, answer, lambda: self._deprovision(node_id, caller, answer))

    def _dismiss(self, entry: _Entry, caller: Caller, answer: Future[None]) -> None:
        def settle(error: ProvisioningError | None) -> None:
            # Not before the hub has forgotten the peer: until then its address is in use.
            if not self._conclude(entry, _Standing.GOING, forget=error is None):
                return
            if error is not None:
                fail(answer, error)
                return
            self._answers.forget(entry.peer.node_id)
            log.info("peer_deprovisioned", extra={"node_id": entry.peer.node_id})
            succeed(answer, None)

        entry.standing, entry.decided = _Standing.GOING, Future()
        try:
            change = Change(Action.REMOVE, entry.peer, settle)
            change.event = caller.event(
                datetime.now(UTC), AuditAction.DEPROVISION, AuditOutcome.ACCEPTED, entry.peer.node_id
            )
            self._committer.submit(change)
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


def _record(request: ProvisioningRequest, peer: Peer) -> ProvisioningRecord:
    return ProvisioningRecord(
        node_id=peer.node_id,
        public_key=peer.public_key,
        wireguard_public_key=peer.wireguard_public_key,
        assigned_ip=peer.address,
        provisioned_at=peer.provisioned_at,
        capabilities=request.capabilities,
        version=request.version,
        metadata=request.metadata,
    )


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
        raise RuntimeError("an active entry has nothing to decide")
    entry.standing, entry.decided = _Standing.ACTIVE, None
    return decided
