"""The one shape of a peer inside the service, and what a change of one is.

Requests, answers, rows of the records and blocks of wg0.conf are made from a `Peer` at the edges, each in
one place.
"""

import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import Any, Final

from backend.errors import ProvisioningError
from backend.models.access.audit import AuditEvent
from backend.models.access.idempotency import Answer
from backend.models.access.proof import Nonce
from backend.models.wireguard.keys import WireGuardKey

# The libp2p key of a peer that was adopted from the hub: only its node knows it.
UNRECORDED_PUBLIC_KEY: Final = ""


class PeerState(StrEnum):
    """How far a peer's newest change has come, as the records have it."""

    # Committed, and not known to be on the hub.
    PENDING = "pending"
    ACTIVE = "active"
    # Its removal is committed, and the hub is not known to have forgotten it.
    REMOVING = "removing"


@dataclass(frozen=True, slots=True)
class Peer:
    """A provisioned node. `capabilities` and `metadata` are the JSON objects that the node sent.

    The records alone keep them, and `version`: nothing in memory reads them, and they would take the most of
    it. So they don't count when two peers are compared.
    """

    node_id: str
    public_key: str
    wireguard_public_key: WireGuardKey
    address: IPv4Address
    provisioned_at: datetime
    # The enrolment token that the node was provisioned with, if it was one.
    token_id: str | None = None
    version: str = field(default="", compare=False)
    capabilities: Mapping[str, Any] | None = field(default=None, compare=False)
    metadata: Mapping[str, Any] | None = field(default=None, compare=False)

    @property
    def allowed_ips(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """The networks that `wg` accepts from the peer and routes to it (wg(8), AllowedIPs)."""
        # By its number: ipaddress would write an address out and read it again.
        return (IPv4Network(int(self.address)),)

    def for_memory(self) -> "Peer":
        """Return the peer without the fields that the records alone keep."""
        return replace(self, version="", capabilities=None, metadata=None)


def cidr(network: IPv4Network | IPv6Network) -> str:
    """Write a network as `wg` prints it, by inet_ntop(3): Python spells some IPv6 addresses otherwise."""
    if isinstance(network, IPv4Network):
        return str(network)
    return f"{socket.inet_ntop(socket.AF_INET6, network.network_address.packed)}/{network.prefixlen}"


def only_address(allowed_ips: Sequence[IPv4Network | IPv6Network]) -> IPv4Address | None:
    """Return the address of a peer that has these AllowedIPs; None if no `Peer` can have them."""
    if len(allowed_ips) != 1:
        return None
    (network,) = allowed_ips
    if not isinstance(network, IPv4Network) or network.prefixlen != network.max_prefixlen:
        return None
    return network.network_address


def _running() -> Future[None]:
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()
    return future


@dataclass(slots=True, eq=False)
class Change:
    """A peer that is added (no `before`), removed (no `after`) or altered (both).

    All that it carries is written in one transaction, or nothing of it.
    """

    before: Peer | None
    after: Peer | None
    # The row that the audit log gets for it.
    event: AuditEvent | None = None
    # The response to repeat to requests with the same Idempotency-Key.
    answer: Answer | None = None
    # The nonce of the signature that the node sent: it is accepted once.
    nonce: Nonce | None = None
    # Why this change alone was refused; the rest of its batch goes on without it.
    refusal: ProvisioningError | None = None
    # Completed once: when the change is applied, or with the error that says why it is not. It can't be
    # cancelled: the change goes on without the caller, and the others of its batch with it.
    applied: Future[None] = field(default_factory=_running)

    @property
    def peer(self) -> Peer:
        """The peer as it is after the change, or was before its removal."""
        peer = self.after or self.before
        if peer is None:
            raise ValueError("a change has a peer before it, after it, or both")
        return peer

    @property
    def adds(self) -> bool:
        """Whether the peer is new."""
        return self.before is None

    @property
    def removes(self) -> bool:
        """Whether the peer goes."""
        return self.after is None


def accepted(changes: Sequence[Change]) -> list[Change]:
    """Return the changes that were not refused."""
    return [change for change in changes if change.refusal is None]


class ChangeUnderWayError(Exception):
    """Another change of the same node or key has to end before a request can be decided."""

    def __init__(self, change: Change) -> None:
        super().__init__(change)
        self.change = change
