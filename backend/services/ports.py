"""What the domain needs from outside, as Protocols."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Literal, Protocol

from backend.models.access.audit import AuditEvent, AuditQuery, AuditRecord
from backend.models.access.credentials import Credential
from backend.models.access.idempotency import Answer
from backend.models.access.sources import LimitKind
from backend.models.wireguard.health import LostEndpoint, RecordedEndpoint
from backend.models.wireguard.interface import InterfaceState
from backend.models.wireguard.peer import Change, Peer
from backend.models.wireguard.records import HubStatus, NewGeneration, RecordedState
from backend.services.hub.drift import Drift, DriftKind

Stage = Literal["prepare", "commit", "apply"]
DatabaseOperation = Literal["read", "write"]
# How a request to provision or to deprovision ended.
Outcome = Literal[
    "provisioned",
    "deprovisioned",
    "duplicate",
    "pool_exhausted",
    "not_found",
    "refused",
    "unavailable",
    "unknown",
]


class Records(Protocol):
    """The durable desired state of one hub. Any thread may call it; the agent's thread alone writes peers.

    Each method raises RecordsUnavailableError where the database does not answer.
    """

    @property
    def durable(self) -> bool:
        """False where the records live as long as the process."""

    def load(self, *, wait_for_commit: bool = False) -> RecordedState:
        """Read the desired state; `wait_for_commit` waits for a transaction that is still being committed."""

    def commit(self, generation: int, observed: int, changes: Sequence[Change]) -> None:
        """Write changes under the hub's next generation, in one transaction.

        `observed` is the generation that the hub has reached. A change that a constraint refuses gets its
        `refusal`, and the others are committed. Raises OvertakenError where the records have another
        generation than `generation` - 1. After any other error the changes may or may not be committed.
        """

    def compensate(self, generation: int, changes: Sequence[Change], reason: str) -> None:
        """Take changes back that could not be applied, in one transaction."""

    def note_observed(self, generation: int) -> None:
        """Note that the hub has reached a generation: pending peers become active, removed ones go."""

    def status(self) -> HubStatus:
        """Return the operator's decision, the notices and the end of the audit log."""

    def adopt(self, new: NewGeneration) -> None:
        """Write peers adopted from the hub under a new generation; delete the operator's decision."""

    def dismiss_decision(self) -> None:
        """Delete an operator's decision that doesn't apply any more."""

    def load_endpoints(self) -> Mapping[str, RecordedEndpoint]:
        """Return the endpoints that peers were seen at last, by their WireGuard keys."""

    def save_endpoints(self, seen: Mapping[str, RecordedEndpoint]) -> None:
        """Write endpoints, by WireGuard key, in one transaction. Those of unknown peers are passed over."""

    def removed_keys(self, keys: Collection[str]) -> set[str]:
        """Return those of the given WireGuard keys that have a tombstone or a `removing` row."""

    def audit_hash(self, sequence: int) -> str | None:
        """Return the hash of a row of the audit log, PRUNED for a pruned one, None where there is none."""

    def check(self) -> None:
        """Raise RecordsUnavailableError unless the database answers."""

    def check_writable(self) -> None:
        """Raise RecordsUnavailableError unless a change could be committed now."""


class AccessStore(Protocol):
    """Credentials, the audit log, stored answers and nonces. Every method may be called by any thread.

    Every method raises RecordsUnavailableError where the records don't answer.
    """

    def load_credentials(self) -> tuple[int, list[Credential]]:
        """Return every credential, and their version."""

    def credentials_version(self) -> int:
        """Return the number that changes whenever a credential is made or revoked."""

    def keep_credential(self, credential: Credential, event: AuditEvent) -> None:
        """Keep a new credential."""

    def revoke_credential(self, credential_id: str, event: AuditEvent) -> Credential | None:
        """Revoke a credential at the event's time and return it, or None if there is none."""

    def write(self, events: Sequence[AuditEvent], used: Mapping[str, datetime]) -> None:
        """Append to the audit log, and note when credentials were used last."""

    def audit_page(self, query: AuditQuery) -> list[AuditRecord]:
        """Return rows of the audit log, the newest first."""

    def prune_audit(self, before: datetime, limit: int, event: AuditEvent) -> int:
        """Delete the oldest rows of the audit log, at most `limit`, all from before a moment; count them.

        `event` is logged with the last one's sequence and hash, if there are any.
        """

    def find_answer(self, scope: str, key_hash: str) -> Answer | None:
        """Return what was answered to this key within the last 24 hours."""

    def tidy(self) -> None:
        """Delete the stored answers and nonces that are no longer needed."""


class Hub(Protocol):
    """The live interface."""

    @property
    def live(self) -> bool:
        """False with WIREGUARD_RELOAD=off: only the file is kept, and there is no interface."""

    def change(self, added: Sequence[Peer], removed: Sequence[Peer]) -> Callable[[], object]:
        """Start to add peers with their AllowedIPs, and to remove others; change nothing else.

        A peer that is added may be there already, one that is removed may be gone. Returns a function that
        waits for the end and has to be called once. Both raise HubUpdateError.
        """

    def close(self) -> None:
        """Let go of everything."""

    def sync(self, stripped: bytes) -> None:
        """Make the interface equal to a config that `wg setconf` would take; raise HubUpdateError."""

    def clear(self, drift: Drift) -> None:
        """Clear what `sync` may leave behind: a mark, keepalives and preshared keys that left the config.

        Raises HubUpdateError.
        """

    def restore(self, peers: Sequence[LostEndpoint]) -> None:
        """Give peers an endpoint, and make each send one keepalive there; raise HubUpdateError."""

    def state(self) -> InterfaceState:
        """Return what the interface has; raise HubUpdateError."""

    def link_problem(self) -> str | None:
        """Say why peers can't reach the hub's address through the interface, or return None."""

    def ifindex(self) -> int | None:
        """Return the interface's index, which changes when it is made again; None if there is none."""


class RateLimiter(Protocol):
    """Counts requests against limits. Never fails: without its storage it counts in this process's memory."""

    async def hit(self, kind: LimitKind, who: str) -> int | None:
        """Count one more for `who`; return None if that is within the limit, else seconds to wait (>= 1).

        `who` is a source address for SOURCE, a source address or a token's id for FAILED_AUTHENTICATION, and
        a credential's id for the others.
        """

    async def close(self) -> None:
        """Close the connections of the event loop that has used them."""


class Metrics(Protocol):
    """Counts events for Prometheus. Any thread may call it; it never fails, and takes a few microseconds.

    What can be read when Prometheus asks is read then, and is no event: see adapters/metrics/state.py.
    """

    def render(self) -> Iterator[bytes]:
        """Return all metrics in Prometheus's text format 0.0.4, in pieces of at most 500 peers each.

        A piece may be empty: it then marks a moment at which other work may go on.
        """

    def request_answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request over HTTP. `route` is the route's template and never a path that a caller sent."""

    def provision_ended(self, outcome: Outcome) -> None:
        """Count a request to provision, by how it ended."""

    def deprovision_ended(self, outcome: Outcome) -> None:
        """Count a request to deprovision, by how it ended."""

    def authentication_failed(self, reason: str) -> None:
        """Count a failed authentication. `reason` is its word in the audit log."""

    def batch_begun(self, changes: int) -> None:
        """Note how many changes a batch has."""

    def stage_ended(self, stage: Stage, seconds: float) -> None:
        """Note how long a stage of a batch took, whether it succeeded or not."""

    def database_used(self, operation: DatabaseOperation, seconds: float) -> None:
        """Note how long a transaction of the records took, whether it succeeded or not."""

    def drift_found(self, kinds: Iterable[DriftKind]) -> None:
        """Count one comparison with these kinds of drift."""

    def drift_mended(self, kinds: Iterable[DriftKind]) -> None:
        """Count one reconciliation that mended these kinds of drift."""

    def reloaded(self, *, succeeded: bool) -> None:
        """Count one `wg syncconf` of the whole file, with the comparison after it."""

    def look_failed(self) -> None:
        """Count one `wg show dump` that failed."""

    def first_handshake(self, seconds: float) -> None:
        """Note how long a peer took from its provision to its first handshake."""

    def endpoints_restored(self, count: int) -> None:
        """Count endpoints that were given back to an interface that had lost them."""

    def endpoint_flapped(self) -> None:
        """Count one key that was flagged because its endpoint goes back and forth."""
