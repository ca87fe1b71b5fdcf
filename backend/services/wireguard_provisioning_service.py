"""Decides about requests: is the node or key known, which address is free? Then the writer gets a change."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from ipaddress import IPv4Address
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
from backend.models.access.audit import AuditAction, AuditOutcome
from backend.models.access.callers import SERVICE, Caller
from backend.models.access.idempotency import ANSWERS_KEPT, IdempotencyKey
from backend.models.wireguard.keys import WireGuardKey
from backend.models.wireguard.peer import UNRECORDED_PUBLIC_KEY, Change, ChangeUnderWayError, Peer
from backend.models.wireguard.provisioning import PeerConfiguration, ProvisioningRequest
from backend.services.access.access_control import AccessControl
from backend.services.access.token_uses import TokenUses
from backend.services.configurations import Configurations
from backend.services.hub.hub_health import HubHealth
from backend.services.hub.operator_peers import OperatorPeers
from backend.services.hub.writer import Writer
from backend.services.ip_pool_manager import IPPoolManager
from backend.services.known_peers import is_same, may_know_address
from backend.services.no_metrics import NO_METRICS
from backend.services.peer_directory import PeerDirectory
from backend.services.ports import AccessStore, Metrics
from backend.services.readiness import Readiness

__all__ = [
    "DuplicatePeerError",
    "IPPoolExhaustedError",
    "InvalidCredentialsError",
    "ProvisioningError",
    "WireGuardProvisioningService",
]


class WireGuardProvisioningService:
    """Provisions and deprovisions the peers of one hub.

    `provision` and `deprovision` decide at once, in memory, and return the change whose future ends when the
    hub has it; they do no I/O, and are for event loops. The methods of the same names with `_peer` wait.
    """

    def __init__(  # noqa: PLR0913 - the parts that a decision needs
        self,
        *,
        pool: IPPoolManager,
        operator_peers: OperatorPeers,
        directory: PeerDirectory,
        writer: Writer,
        configurations: Configurations,
        access: AccessControl,
        token_uses: TokenUses,
        answers: AccessStore,
        readiness: Readiness,
        health: HubHealth,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        """Put the parts together; the endpoints find `access`, `readiness`, `health` and `metrics` here."""
        self.access: Final = access
        self.health: Final = health
        self.metrics: Final = metrics
        self.readiness: Final = readiness
        self._pool = pool
        self._operator_peers = operator_peers
        self._directory = directory
        self._writer = writer
        self._configurations = configurations
        self._token_uses = token_uses
        self._answers = answers
        # The list as JSON, with the directory's revision and the hub's key that it was rendered from.
        self._listed: tuple[int, WireGuardKey, bytes] | None = None

    def provision_peer(self, request: ProvisioningRequest, timeout: float | None = None) -> PeerConfiguration:
        """Provision a peer and wait, at most `timeout` seconds, until it is live."""
        change = _wait(lambda: self.provision(request), timeout)
        return self._configurations.model(self._require_added(change))

    def deprovision_peer(self, node_id: str, timeout: float | None = None) -> None:
        """Remove a peer and wait, at most `timeout` seconds, until the hub has forgotten it."""
        _wait(lambda: self.deprovision(node_id), timeout)

    def provision(
        self, request: ProvisioningRequest, caller: Caller = SERVICE, key: IdempotencyKey | None = None
    ) -> Change:
        """Decide about a request; return the change whose `applied` ends when the hub knows the peer.

        Raises ChangeUnderWayError where another change of this node or key has to end first, and
        DuplicatePeerError, IPPoolExhaustedError, InvalidCredentialsError, UnauthenticatedError,
        HubUpdateError or RecordsUnavailableError. The future may have the last two, too.
        """
        caller.require_node(request.node_id)
        if request.wireguard_public_key == self.hub_key:
            raise InvalidCredentialsError(
                "wireguard_public_key", "this is the hub's own key; send the public half of the node's own"
            )
        with self._directory.lock:
            known = self._directory.by_node(request.node_id)
            holder = self._directory.by_key(request.wireguard_public_key)
            under_way = self._directory.under_way(known, holder)
            if under_way is not None:
                if key is not None and key.is_answered_by(under_way.answer, caller.name):
                    return under_way
                raise ChangeUnderWayError(under_way)
            self._refuse_known(request, caller, known, holder)
            change = (
                self._addition(request, caller, key) if known is None else _completion(request, caller, known)
            )
            self._hand_over(change)
        return change

    def deprovision(self, node_id: str, caller: Caller = SERVICE) -> Change:
        """Decide about a removal; return the change whose `applied` ends when the hub has forgotten the peer.

        Raises PeerNotFoundError, ChangeUnderWayError, HubUpdateError or RecordsUnavailableError.
        """
        with self._directory.lock:
            peer = self._directory.by_node(node_id)
            if peer is None:
                raise PeerNotFoundError(node_id)
            under_way = self._directory.under_way(peer)
            if under_way is not None:
                raise ChangeUnderWayError(under_way)
            event = caller.event(datetime.now(UTC), AuditAction.DEPROVISION, AuditOutcome.ACCEPTED, node_id)
            change = Change(peer, None, event)
            self._hand_over(change)
        return change

    def answer(self, change: Change) -> str:
        """Return the JSON for a node whose peer was added; raise DuplicatePeerError if it was known."""
        return self._configurations.answer(self._require_added(change))

    def stored_answer(self, caller: Caller, key: IdempotencyKey) -> bytes | None:
        """Return the first answer to this Idempotency-Key, if there is one; raise IdempotencyKeyError.

        It reads the records, so it is not for an event loop.
        """
        stored = self._answers.find_answer(caller.name, key.key_hash)
        if stored is None or datetime.now(UTC) - stored.created_at > ANSWERS_KEPT:
            return None
        try:
            # A stored answer outlives its peer until the row of the peer is deleted, and a peer that is being
            # added may still be compensated.
            self._directory.listed(stored.node_id)
        except PeerNotFoundError:
            return None
        key.require_same(stored.body_hash)
        return stored.body

    def get_peer_config(self, node_id: str) -> PeerConfiguration:
        """Return one peer's configuration; raise PeerNotFoundError."""
        return self._configurations.model(self._directory.listed(node_id))

    def get_peer_json(self, node_id: str) -> str:
        """Return one peer's configuration as JSON; raise PeerNotFoundError."""
        return self._configurations.json(self._directory.listed(node_id))

    def find_by_key(self, wireguard_public_key: str) -> Peer | None:
        """Return the peer that has a WireGuard key, or is about to have it, if there is one."""
        return self._directory.by_key(WireGuardKey(wireguard_public_key))

    def list_provisioned_peers(self) -> dict[str, PeerConfiguration]:
        """Return every listed peer's configuration by node_id, in the order in which they were added."""
        return {peer.node_id: self._configurations.model(peer) for peer in self._directory.list()}

    def list_json(self) -> Iterator[bytes]:
        """Return the same as JSON, in pieces, so that other requests go on in between."""
        revision, hub_key = self._directory.revision, self.hub_key
        if self._listed is not None and self._listed[:2] == (revision, hub_key):
            yield self._listed[2]
            return
        pieces = []
        for piece in self._configurations.json_by_node(self._directory.list()):
            pieces.append(piece.encode())
            yield pieces[-1]
        self._listed = (revision, hub_key, b"".join(pieces))

    def get_pool_stats(self) -> dict[str, int]:
        """Return the pool's figures; see IPPoolManager.get_pool_stats."""
        return self._pool.get_pool_stats()

    @property
    def hub_key(self) -> WireGuardKey:
        """The hub's public key."""
        return self._operator_peers.hub_key

    def in_doubt(self) -> bool:
        """Whether the outcome of the changes under way can't be known now; see Writer.in_doubt."""
        return self._writer.in_doubt()

    def _refuse_known(
        self, request: ProvisioningRequest, caller: Caller, known: Peer | None, holder: Peer | None
    ) -> None:
        """Raise KeyTakenError or DuplicatePeerError where the key or the node is provisioned already.

        The error shows what the caller may know of the peer. UnauthenticatedError for a used-up token.
        """
        same = known is not None and is_same(request, caller.identity, known)
        # A used-up token may still repeat the request that used it up.
        if self._token_uses.used_up(caller.credential) and not (
            same and known is not None and known.token_id == caller.token_id
        ):
            raise UnauthenticatedError("used_up", caller.token_id)
        may_know = known is not None and may_know_address(request, caller, known)
        # The key is checked before the node: otherwise a caller could send a key that is taken, and learn
        # which node_ids exist, without a use of its token.
        is_operators = holder is None and self._operator_peers.has_key(request.wireguard_public_key)
        if is_operators or (holder is not None and not (may_know and holder is known)):
            raise KeyTakenError(request.node_id)
        if known is None or (may_know and same and known.public_key == UNRECORDED_PUBLIC_KEY):
            return
        if may_know and same:
            raise self._duplicate_with_config(known)
        shown = {"node_id": known.node_id, "assigned_ip": str(known.address)} if may_know else {}
        raise DuplicatePeerError(known.node_id, shown)

    def _addition(self, request: ProvisioningRequest, caller: Caller, key: IdempotencyKey | None) -> Change:
        """Reserve an address, and return the change that adds the peer."""
        self._directory.require_room()
        now = datetime.now(UTC)
        peer = _with_node_fields(
            request,
            Peer(
                node_id=request.node_id,
                public_key=request.public_key,
                wireguard_public_key=request.wireguard_public_key,
                # Reserved before anything is written: a crash may leak an address, never share one.
                address=IPv4Address(self._pool.allocate_ip(request.node_id)),
                provisioned_at=now.replace(microsecond=0),
                token_id=caller.token_id,
            ),
        )
        event = caller.event(now, AuditAction.PROVISION, AuditOutcome.ACCEPTED, peer.node_id)
        change = Change(None, peer, event, nonce=caller.nonce)
        if peer.token_id is not None:
            change.applied.add_done_callback(partial(self._count_use, peer.token_id))
        if key is not None:
            body = self._configurations.answer(peer).encode()
            change.answer = key.answer(caller.name, peer.node_id, body, peer.provisioned_at)
        return change

    def _hand_over(self, change: Change) -> None:
        """Hand a change to the writer; where it takes none, forget the change. The caller holds the lock."""
        self._directory.begin(change)
        try:
            self._writer.submit(change)
        except ProvisioningError:
            self._directory.end_locked(change, applied=False)
            raise

    def _count_use(self, token_id: str, applied: Future[None]) -> None:
        if applied.exception() is None:
            self._token_uses.count(token_id)

    def _require_added(self, change: Change) -> Peer:
        if change.before is not None:
            raise self._duplicate_with_config(change.peer)
        return change.peer

    def _duplicate_with_config(self, peer: Peer) -> DuplicatePeerError:
        return DuplicatePeerError(peer.node_id, json.loads(self._configurations.json(peer)))


def _with_node_fields(request: ProvisioningRequest, peer: Peer) -> Peer:
    """Return the peer with the fields that come from its node's request and don't concern the hub."""
    return replace(
        peer,
        public_key=request.public_key,
        version=request.version,
        capabilities=request.capabilities.model_dump(mode="json"),
        metadata=request.metadata,
    )


def _completion(request: ProvisioningRequest, caller: Caller, adopted: Peer) -> Change:
    """Return the change that completes an adopted peer's record from its node's first request."""
    event = caller.event(datetime.now(UTC), AuditAction.IDENTIFY, AuditOutcome.ACCEPTED, adopted.node_id)
    return Change(adopted, _with_node_fields(request, adopted), event, nonce=caller.nonce)


def _wait(decide: Callable[[], Change], timeout: float | None) -> Change:
    """Decide, and wait until the change is applied; wait for other changes of the peer first."""
    until = None if timeout is None else time.monotonic() + timeout
    while True:
        left = None if until is None else max(0.0, until - time.monotonic())
        try:
            change = decide()
        except ChangeUnderWayError as exc:
            # Wait for its end, with or without an error.
            exc.change.applied.exception(left)
            continue
        change.applied.result(left)
        return change
