"""What the domain needs from outside, as Protocols, and the small values that cross them."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from backend.errors import ProvisioningError
from backend.models.access.answers import Answer
from backend.models.access.audit import AuditEvent, AuditQuery, AuditRecord
from backend.models.access.credentials import Credential
from backend.models.access.limit_kind import LimitKind
from backend.models.access.nonces import Nonce
from backend.models.wireguard.interface_state import InterfaceState
from backend.models.wireguard.peer import Peer
from backend.models.wireguard.provisioning import ProvisioningRecord
from backend.services.hub.drift import Drift


class Action(StrEnum):
    """What a change does to a peer."""

    ADD = "add"
    REMOVE = "remove"
    # A peer that was found in the file gets the rest of its record, which neither file nor interface have.
    IDENTIFY = "identify"


@dataclass(slots=True)
class Change:
    """One peer that comes or goes.

    `record` is there for an ADD and an IDENTIFY. `settle` is told the outcome,
    None for success, from the committer's thread; only the first word counts.
    """

    action: Action
    peer: Peer
    settle: Callable[[ProvisioningError | None], None]
    record: ProvisioningRecord | None = None
    # What the audit log is told of it, and who it counts as a use of, in the same transaction.
    event: AuditEvent | None = None
    # What is to be answered again to whoever asks with the same Idempotency-Key.
    answer: Answer | None = None
    # Of the signature that the node proved its identity with: kept in the same transaction, or else refused.
    nonce: Nonce | None = None
    # Set when this change alone was refused; the rest of its batch goes on without it.
    refusal: ProvisioningError | None = None


@dataclass(slots=True)
class Batch:
    """Changes that are committed together, under one generation of the hub."""

    generation: int
    # How far the hub had come before, to be noted with this batch's intent.
    reached: int
    changes: list[Change]
    # Why the hub could not be updated, once `apply` has failed for good.
    failure: str | None = field(default=None)

    def accepted(self) -> list[Change]:
        """Return the changes that nothing has refused so far."""
        return [change for change in self.changes if change.refusal is None]


@dataclass(frozen=True, slots=True)
class RecordedState:
    """What the records say: the peers in the order they came, and how far the hub has followed."""

    peers: Sequence[Peer]
    generation: int
    applied_generation: int


class Decision(StrEnum):
    """What an operator has decided where the records don't fit the hub."""

    # Take the hub's peers into the records.
    ADOPT = "adopt"
    # Take them off the hub.
    FORCE = "force"


@dataclass(frozen=True, slots=True)
class HubStatus:
    """What changes beside the peers: an operator's decision, what they should know, the audit log's head."""

    decision: Decision | None
    # The fingerprint of the unknown peers that it is about; None where it's about any.
    basis: str | None
    notices: tuple[str, ...]
    audit_head: tuple[int, str]


@dataclass(frozen=True, slots=True)
class NewGeneration:
    """A new generation without a change of a node's: peers that are adopted, and why.

    `removed` are the (key, label) of peers that the hub is to lose.
    """

    generation: int
    peers: Sequence[Peer]
    removed: Sequence[tuple[str, str]]
    event: AuditEvent
    # What `/readyz` says until an operator has acknowledged it.
    notice: str | None = None


NextBatch = Callable[[], Batch | None]


class BatchSteps(Protocol):
    """The three things that happen to a batch."""

    def intend(self, batch: Batch) -> None:
        """Write the batch's records in one transaction."""

    def apply(self, batch: Batch) -> str | None:
        """Bring file and interface up to the records; return why it could not be done, or None."""

    def revoke(self, batch: Batch) -> None:
        """Take the intent back, in one transaction."""


class Journal(Protocol):
    """The records, and the way a batch gets into them.

    Called by the committer's thread, except where a docstring says otherwise; at the start `removed_keys` is
    called beside `launch`.
    """

    @property
    def durable(self) -> bool:
        """False where the records live as long as the process."""

    @property
    def busy_since(self) -> float | None:
        """Since when, by time.monotonic(), a call has been waiting, or None; any thread may ask."""

    def load(self) -> RecordedState:
        """Read everything; raise RecordsUnavailableError."""

    def launch(self, apply: Callable[[Batch | None], str | None]) -> None:
        """Take up work. `apply` is called for each batch, and with None for one of an earlier process."""

    def run(self, next_batch: NextBatch) -> None:
        """Take batches through their sequence until there is none.

        On any exception the outcome of the last one is to be looked up by `load`.
        """

    def hub_status(self) -> HubStatus:
        """Return what changes beside the peers; raise RecordsUnavailableError."""

    def add_generation(self, new: NewGeneration) -> None:
        """Write a new generation, which carries a decision out; raise RecordsUnavailableError."""

    def dismiss_decision(self) -> None:
        """Forget a decision that nothing waits for; raise RecordsUnavailableError."""

    def removed_keys(self, keys: Collection[str]) -> set[str]:
        """Return those of the given WireGuard keys whose peers were removed on the record."""

    def audit_hash(self, sequence: int) -> str | None:
        """Return the hash of a row of the audit log, PRUNED for a pruned one, None where there is none."""

    def mark_applied(self, generation: int) -> None:
        """Note that the hub has reached `generation`, outside of any batch."""

    def tidy(self) -> None:
        """Forget what is no longer needed, if it is time to; called when nothing else is to do."""

    def check(self) -> None:
        """Raise RecordsUnavailableError unless the records answer."""

    def check_writable(self) -> None:
        """Raise RecordsUnavailableError unless a batch could be written now; any thread may ask."""

    def close(self) -> None:
        """Let go of everything."""


class AccessStore(Protocol):
    """Credentials, the audit log, and the answers that are given again. Called by any thread.

    Everything raises RecordsUnavailableError where the records don't answer.
    """

    def load_credentials(self) -> tuple[int, list[Credential]]:
        """Return every credential, and their version."""

    def credentials_version(self) -> int:
        """Return a number that is another one after each credential that was made or revoked."""

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
        """False where only the file is kept, so that nothing is said about an interface."""

    def change(self, added: Sequence[Peer], removed: Sequence[Peer]) -> Callable[[], None]:
        """Start to add peers with their AllowedIPs, and to remove others; change nothing else.

        A peer that is added may be there already, one that is removed may be gone. Returns a function that
        waits for the end and has to be called once. Both raise HubUpdateError.
        """

    def close(self) -> None:
        """Let go of everything."""

    def sync(self, stripped: bytes) -> None:
        """Make the interface equal to a config that `wg setconf` would take; raise HubUpdateError."""

    def clear(self, drift: Drift) -> None:
        """Mend what `sync` may leave as it was: marks and values that the config has no longer.

        Raises HubUpdateError.
        """

    def state(self) -> InterfaceState:
        """Return what the interface has; raise HubUpdateError."""

    def link_problem(self) -> str | None:
        """Say why peers can't reach the hub's address through the interface, or return None."""

    def ifindex(self) -> int | None:
        """Return a number that is another one whenever the interface was made anew; None if there is none."""


class RateLimiter(Protocol):
    """Counts what callers do. Never fails: without its storage it goes on with what this process knows."""

    async def hit(self, kind: LimitKind, who: str) -> int | None:
        """Count one more for `who`; return None if that is within the limit, else seconds to wait (>= 1).

        `who` is a source address for SOURCE, a source address or a token's id for FAILED_AUTHENTICATION, and
        a credential's id for the others.
        """

    async def close(self) -> None:
        """Let go of what belongs to the event loop."""
