"""The audit log's entries, and the chain of hashes that holds them together."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from hashlib import sha256
from json.encoder import encode_basestring_ascii
from typing import Annotated, Final, Self

from pydantic import AfterValidator, AwareDatetime, ConfigDict, Field

from backend.models.fields import FrozenModel, StrictModel, escaped

# What the first row follows.
GENESIS: Final = "0" * 64
# Where a log begins of which nothing was pruned.
BEGINNING: Final = (0, GENESIS)
# Stands for the hash of a row that was pruned, where a row's hash is asked for.
PRUNED: Final = "pruned"
_VERSION: Final = "wireguard-provisioning audit 1"
_TEXT_MAX_CHARACTERS: Final = 512


class AuditAction(StrEnum):
    """The act that was done or refused."""

    PROVISION = "provision"
    DEPROVISION = "deprovision"
    # An adopted peer's record was filled in.
    IDENTIFY = "identify"
    # A change taken back, because the hub could not be updated.
    REVERT = "revert"
    AUTHENTICATE = "authenticate"
    CHALLENGE = "challenge"
    TOKEN_MADE = "token_made"  # noqa: S105 - no secret
    TOKEN_REVOKED = "token_revoked"  # noqa: S105 - an act
    KEY_MADE = "key_made"
    KEY_REVOKED = "key_revoked"
    # An operator's edit of the config file was noticed.
    CONFIG_EDITED = "config_edited"
    # The interface or the file could not be brought up to date.
    HUB_FAILED = "hub_failed"
    # The interface wasn't what the file says, and was mended.
    DRIFT_FOUND = "drift_found"
    # A peer's endpoint goes back and forth: two nodes may have the same key.
    ENDPOINT_FLAPPING = "endpoint_flapping"
    # The records didn't fit the hub, so that nothing is changed until an operator decides.
    HUB_PAUSED = "hub_paused"
    # What the operator decided: to take the hub's peers into the records, or off the hub.
    PEERS_ADOPTED = "peers_adopted"
    PEERS_REMOVED = "peers_removed"
    # The operator has read that peers were adopted at a start.
    NOTICE_ACKNOWLEDGED = "notice_acknowledged"
    # The oldest rows were deleted: `subject` is the sequence of the last of them, `reason` its hash.
    AUDIT_PRUNED = "audit_pruned"
    # Never written: stands for a row that was changed into what can't be read any more.
    UNREADABLE = "unreadable"


class AuditOutcome(StrEnum):
    """How the act ended. NOTED is for events that no caller asked for."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    NOTED = "noted"


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """One event: actor, act, time and outcome; never a secret. `at` is timezone-aware."""

    at: datetime
    action: AuditAction
    outcome: AuditOutcome
    # `local`, `anyone`, `token:<id>`, `key:<id>`, `cli:<os user>`, `service`, or `nobody`.
    actor: str
    # The node or the credential that it was done to.
    subject: str | None = None
    source: str | None = None
    request_id: str | None = None
    reason: str | None = None
    # More than one where equal ones were counted together.
    count: int = 1

    def storable(self) -> Self:
        """Return the event with texts that any database can store.

        Characters that aren't printable are escaped (PostgreSQL refuses NUL, UTF-8 lone surrogates) and long
        text is cut, so that no caller can keep its refusal out of the log by the text that it sends.
        """
        texts = (self.actor, self.subject, self.source, self.request_id, self.reason)
        if all(text is None or _fits(text) for text in texts):
            return self
        actor, subject, source, request_id, reason = (_storable(text) for text in texts)
        return replace(
            self, actor=actor or "", subject=subject, source=source, request_id=request_id, reason=reason
        )


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """One row of the log. `hash` is the row's own, over everything before it."""

    sequence: int
    event: AuditEvent
    previous_hash: str
    hash: str


class AuditQuery(StrictModel):
    """Which rows to return: the newest first, at most `limit`, `before` a sequence, only those that match."""

    # All of a URL's query is text.
    model_config = ConfigDict(strict=False)

    limit: int = Field(default=100, ge=1, le=1000)
    before: int | None = Field(
        default=None, ge=1, le=2**62, description="Only entries with a lower sequence."
    )
    action: AuditAction | None = None
    actor: str | None = Field(default=None, max_length=512)
    subject: str | None = Field(default=None, max_length=512)


def timestamp(moment: datetime) -> str:
    """Return the one spelling of a moment that is stored and hashed: UTC, to the microsecond."""
    # Without its zone, because Python takes three times as long to write one.
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def chain_hash(previous_hash: str, sequence: int, event: AuditEvent) -> str:
    """Return the SHA-256 of a row and of the hash before it, in hexadecimal.

    Of a compact JSON array in ASCII: two rows have the same text only if they are the same, for all that
    is Unicode (and so for whatever came from a database).
    """
    # Put together here, because a general encoder takes twice as long and this is done for every request.
    members = (
        _quoted(_VERSION),
        _quoted(previous_hash),
        str(sequence),
        _quoted(timestamp(event.at)),
        _quoted(event.action),
        _quoted(event.outcome),
        _quoted(event.actor),
        _quoted(event.subject),
        _quoted(event.source),
        _quoted(event.request_id),
        _quoted(event.reason),
        str(event.count),
    )
    return sha256(f"[{','.join(members)}]".encode("ascii")).hexdigest()


def _quoted(text: str | None) -> str:
    return "null" if text is None else encode_basestring_ascii(text)


def verify(
    records: Iterable[AuditRecord], head: tuple[int, str], start: tuple[int, str] = BEGINNING
) -> str | None:
    """Return a sentence that names the first row that isn't as it was written, or None.

    `records` is the whole log in order, read once; `head` is the sequence and the hash of its last row as
    noted apart from it, (0, GENESIS) for an empty log; `start` is the same of the last row that was pruned.
    An attacker who can write both the log and the head can write another log. A copy of the head that is kept
    elsewhere shows that.
    """
    sequence, previous = start
    checkpoint: AuditRecord | None = None
    for record in records:
        if wrong := _wrong(record, sequence, previous):
            return wrong
        sequence, previous = record.sequence, record.hash
        if record.event.action is AuditAction.AUDIT_PRUNED:
            checkpoint = record
        if sequence > head[0]:
            return f"Row {sequence} was inserted: the log ends at row {head[0]}."
    if sequence < head[0]:
        return f"Row {sequence + 1} is missing: the log goes on to row {head[0]}."
    if previous != head[1]:
        return f"Row {sequence} was replaced: it isn't the one that the log ends with."
    return _wrong_start(checkpoint, start)


def _wrong_start(checkpoint: AuditRecord | None, start: tuple[int, str]) -> str | None:
    """Return a sentence if the newest checkpoint in the chain names another start than `start`, or None."""
    if checkpoint is None:
        if start == BEGINNING:
            return None
        return f"Row {start[0] + 1} is the first, and no row says that those before it were pruned."
    event = checkpoint.event
    if (event.subject, event.reason) == (str(start[0]), start[1]):
        return None
    return (
        f"Row {checkpoint.sequence} says that the rows up to {event.subject} were pruned, "
        f"and the log begins behind row {start[0]}."
    )


def _wrong(record: AuditRecord, sequence: int, previous: str) -> str | None:
    """Return a sentence about a row that can't follow the row of this sequence and hash, or None."""
    found, expected = record.sequence, sequence + 1
    if found > expected:
        return f"Row {expected} is missing: row {found} stands in its place."
    if found < expected:
        return f"Row {found} stands where row {expected} belongs."
    if chain_hash(record.previous_hash, found, record.event) != record.hash:
        return f"Row {found} was changed after it was written."
    if record.previous_hash != previous:
        if sequence == 0:
            return "Row 1 was replaced: it doesn't begin the log."
        return f"Row {sequence} was replaced: it isn't the one that row {found} was written after."
    return None


def _fits(text: str) -> bool:
    return len(text) <= _TEXT_MAX_CHARACTERS and text.isprintable()


def _storable(text: str | None) -> str | None:
    if text is None or _fits(text):
        return text
    return escaped(text[:_TEXT_MAX_CHARACTERS])[:_TEXT_MAX_CHARACTERS]


class AuditEntry(FrozenModel):
    """One row of the audit log."""

    sequence: int
    # To the microsecond: the hash can be computed again from an entry.
    at: Annotated[AwareDatetime, AfterValidator(lambda moment: moment.astimezone(UTC))] = Field(
        description="RFC 3339, UTC."
    )
    action: AuditAction
    outcome: AuditOutcome
    actor: str = Field(examples=["key:3f1c0e5a9b7d2468"])
    subject: str | None = Field(description="The node or the credential that it was done to.")
    source: str | None = Field(description="The caller's address.")
    request_id: str | None
    reason: str | None
    count: int = Field(description="More than one where equal ones were counted together.")
    previous_hash: str
    hash: str

    @classmethod
    def of(cls, record: AuditRecord) -> Self:
        """Show a row."""
        event = record.event
        return cls(
            sequence=record.sequence,
            at=event.at,
            action=event.action,
            outcome=event.outcome,
            actor=event.actor,
            subject=event.subject,
            source=event.source,
            request_id=event.request_id,
            reason=event.reason,
            count=event.count,
            previous_hash=record.previous_hash,
            hash=record.hash,
        )


class AuditPage(FrozenModel):
    """Entries of the audit log, the newest first."""

    entries: list[AuditEntry]
    next: int | None = Field(description="Ask for those `before` this sequence to go on; null at the end.")
