"""The unit of work: implements `Records` for one hub. Each method is one transaction."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

import sqlalchemy as sa

from backend.adapters.records import audit, credentials, endpoints, idempotency, peers
from backend.adapters.records.database import Database
from backend.adapters.records.tables import hubs, notices, removed_peers
from backend.adapters.records.tables import peers as peer_table
from backend.errors import IdempotencyKeyError, NonceError, RecordsUnavailableError, UnauthenticatedError
from backend.models.access.audit import AuditAction, AuditEvent, AuditOutcome
from backend.models.access.callers import SERVICE
from backend.models.access.idempotency import ANSWERS_KEPT, KEY_OF_ANOTHER_REQUEST
from backend.models.wireguard.health import RecordedEndpoint
from backend.models.wireguard.peer import Change, PeerState, accepted
from backend.models.wireguard.records import Decision, HubStatus, NewGeneration, RecordedState

# The row that the first migration writes.
FIRST_HUB: Final = 1
# After that a removed peer that is still on a hub counts as unknown, and may need an operator's decision.
_TOMBSTONES_KEPT: Final = timedelta(days=90)
# SQLite takes 32,766 values in a statement, PostgreSQL 65,535.
_KEYS_AT_A_TIME: Final = 10_000

# Built once, and with its type: for a value without one SQLAlchemy imports its ORM, which DBOS may be doing
# at that moment in another thread.
_KEYS: Final = sa.bindparam("keys", type_=sa.String(), expanding=True)
_REMOVED_KEYS: Final = sa.union(
    sa.select(removed_peers.c.wireguard_public_key).where(removed_peers.c.wireguard_public_key.in_(_KEYS)),
    sa.select(peer_table.c.wireguard_public_key).where(
        peer_table.c.wireguard_public_key.in_(_KEYS), peer_table.c.state == PeerState.REMOVING
    ),
)
_DECISION: Final = sa.select(hubs.c.decision, hubs.c.decision_basis).where(hubs.c.id == sa.bindparam("hub"))
_UNDECIDED: Final[dict[str, None]] = {"decision": None, "decision_basis": None}
_NOTICES: Final = sa.select(notices.c.text).where(notices.c.hub == sa.bindparam("hub")).order_by(notices.c.id)


class SqlRecords:
    """The records in a database: SQLite, in a file or in memory, or PostgreSQL."""

    def __init__(self, database: Database, hub: int = FIRST_HUB) -> None:
        self._database = database
        # False where the records live as long as the process.
        self.durable = database.durable
        self._hub = hub
        # Whether rows of removed peers may still hold names, keys and addresses that are free by now.
        self._removing = True

    def name_hub(self, name: str) -> None:
        """Keep the interface's name with the hub."""
        with self._database.transaction() as connection:
            connection.execute(
                sa.update(hubs).where(hubs.c.id == self._hub, hubs.c.name != name).values(name=name)
            )

    def load(self, *, wait_for_commit: bool = False) -> RecordedState:
        """Read the desired state; `wait_for_commit` waits for a transaction that is still being committed."""
        with self._database.reading() as connection:
            return peers.load(connection, self._hub, wait_for_commit=wait_for_commit)

    def commit(self, generation: int, observed: int, changes: Sequence[Change]) -> None:
        """Write changes with their nonces, token uses, answers and audit rows, in one transaction.

        The one transaction of a provision or a removal: see Records.commit.
        """
        # True until the commit has succeeded: after a lost answer the rows may be there.
        removing, self._removing = self._removing, True
        database = self._database
        with database.writing(), database.timing("write"), database.engine.begin() as connection:
            peers.advance(connection, self._hub, generation, observed)
            if removing:
                peers.end_removals(connection, self._hub, observed)
            _keep_nonces(connection, changes)
            _refuse_taken_keys(connection, accepted(changes))
            peers.write(connection, self._hub, generation, accepted(changes))
            _count_uses(connection, accepted(changes))
            left = accepted(changes)
            answers = [change.answer for change in left if change.answer is not None]
            idempotency.save_answers(connection, answers)
            audit.append_audit(connection, [change.event for change in left if change.event is not None])
        # Rows of earlier removals stay where the hub hasn't reached the generation before this one.
        behind = removing and observed < generation - 1
        self._removing = behind or any(change.removes for change in left)
        # SQLite also commits to a file that was moved or deleted, and the next start would not see that.
        self._database.check_file()
        self._database.note_written()

    def compensate(self, generation: int, changes: Sequence[Change], reason: str) -> None:
        """Undo a commit's changes, token uses and answers, and log that, in one transaction."""
        now = datetime.now(UTC)
        with self._database.transaction() as connection:
            if not peers.take_back(connection, self._hub, generation, changes):
                return
            credentials.return_uses(connection, _token_uses(changes))
            idempotency.forget_answers_of(connection, [c.peer.node_id for c in changes if c.adds])
            reverted = [
                SERVICE.event(now, AuditAction.REVERT, AuditOutcome.NOTED, change.peer.node_id, reason)
                for change in changes
            ]
            audit.append_audit(connection, reverted)

    def note_observed(self, generation: int) -> None:
        """Note that the hub has reached a generation: pending peers become active, removed ones go."""
        with self._database.transaction() as connection:
            # It never goes back.
            connection.execute(
                sa.update(hubs)
                .where(hubs.c.id == self._hub, hubs.c.observed_generation < generation)
                .values(observed_generation=generation)
            )
            peers.update_states(connection, self._hub, generation)
        self._removing = False

    def status(self) -> HubStatus:
        """Return the operator's decision, the notices and the end of the audit log."""
        with self._database.reading() as connection:
            decision, basis = connection.execute(_DECISION, {"hub": self._hub}).one()
            return HubStatus(
                None if decision is None else Decision(decision),
                basis,
                tuple(connection.scalars(_NOTICES, {"hub": self._hub})),
                audit.audit_head(connection),
            )

    def adopt(self, new: NewGeneration) -> None:
        """Write peers adopted from the hub under a new generation; delete the operator's decision."""
        with self._database.transaction() as connection:
            values = {"generation": new.generation, **_UNDECIDED}
            connection.execute(sa.update(hubs).where(hubs.c.id == self._hub).values(values))
            # An adopted peer may have the name or the address of one that was removed.
            peers.end_removals(connection, self._hub, new.generation)
            peers.adopt(connection, self._hub, new.peers, new.generation)
            peers.keep_tombstones(connection, self._hub, new.removed, new.generation)
            if new.notice is not None:
                notice = {"at": datetime.now(UTC), "text": new.notice, "hub": self._hub}
                connection.execute(sa.insert(notices), [notice])
            audit.append_audit(connection, [new.event])

    def decide(self, decision: Decision, basis: str, event: AuditEvent) -> None:
        """Write an operator's decision about the unknown peers of `basis`, for the service to carry out.

        `basis` is their removal_guard.fingerprint.
        """
        with self._database.transaction() as connection:
            connection.execute(
                sa.update(hubs).where(hubs.c.id == self._hub).values(decision=decision, decision_basis=basis)
            )
            audit.append_audit(connection, [event])

    def dismiss_decision(self) -> None:
        """Delete an operator's decision that doesn't apply any more."""
        with self._database.transaction() as connection:
            connection.execute(sa.update(hubs).where(hubs.c.id == self._hub).values(_UNDECIDED))

    def acknowledge(self, event: AuditEvent) -> int:
        """Delete all notices, and return how many there were."""
        with self._database.transaction() as connection:
            count = connection.execute(sa.delete(notices).where(notices.c.hub == self._hub)).rowcount
            if count:
                audit.append_audit(connection, [event])
            return count

    def removed_keys(self, keys: Collection[str]) -> set[str]:
        """Return those of the given WireGuard keys that have a tombstone or a `removing` row."""
        wanted = list(keys)
        found: set[str] = set()
        with self._database.reading() as connection:
            for start in range(0, len(wanted), _KEYS_AT_A_TIME):
                part = wanted[start : start + _KEYS_AT_A_TIME]
                found.update(connection.scalars(_REMOVED_KEYS, {"keys": part}))
        return found

    def load_endpoints(self) -> Mapping[str, RecordedEndpoint]:
        """Return the endpoints that peers were seen at last, by their WireGuard keys."""
        with self._database.reading() as connection:
            return endpoints.load(connection, self._hub)

    def save_endpoints(self, seen: Mapping[str, RecordedEndpoint]) -> None:
        """Write endpoints, by WireGuard key, in one transaction. Those of unknown peers are passed over."""
        with self._database.transaction() as connection:
            endpoints.save(connection, self._hub, seen)

    def audit_hash(self, sequence: int) -> str | None:
        """Return the hash of a row of the audit log, PRUNED for a pruned one, None where there is none."""
        with self._database.reading() as connection:
            return audit.audit_hash(connection, sequence)

    def expire_tombstones(self) -> None:
        """Delete old tombstones of peers that the hub is known to be rid of."""
        observed = sa.select(hubs.c.observed_generation).where(hubs.c.id == self._hub).scalar_subquery()
        old = removed_peers.c.removed_at < datetime.now(UTC) - _TOMBSTONES_KEPT
        with self._database.transaction() as connection:
            connection.execute(
                sa.delete(removed_peers).where(
                    removed_peers.c.hub == self._hub, old, removed_peers.c.generation <= observed
                )
            )

    def check(self) -> None:
        """Raise RecordsUnavailableError unless the database answers and has room."""
        self._database.check()
        if not self._database.has_room():
            raise RecordsUnavailableError("the disk with the records is full; make room on it")

    def check_writable(self) -> None:
        """Raise RecordsUnavailableError unless a change could be committed now; not for an event loop."""
        self.check()
        # With the value that is there already.
        self._database.try_to_write(
            sa.update(hubs).where(hubs.c.id == self._hub).values(generation=hubs.c.generation)
        )


def _token_uses(changes: Sequence[Change]) -> Counter[str]:
    return Counter(
        change.peer.token_id for change in changes if change.adds and change.peer.token_id is not None
    )


def _keep_nonces(connection: sa.Connection, changes: Sequence[Change]) -> None:
    """Keep the nonces that these changes were signed with, and refuse those whose nonce was used before."""
    signed = [(change, change.nonce) for change in changes if change.nonce is not None]
    if not signed:
        return
    fresh = idempotency.burn_nonces(connection, [nonce for _, nonce in signed])
    for change, nonce in signed:
        try:
            # Taken out: of two changes with the same nonce, one is accepted.
            fresh.remove((nonce.identity, nonce.nonce))
        except KeyError:
            change.refusal = NonceError()


def _refuse_taken_keys(connection: sa.Connection, changes: Sequence[Change]) -> None:
    """Refuse changes whose Idempotency-Key came with another request before."""
    asked = [(change, (change.answer.scope, change.answer.key_hash)) for change in changes if change.answer]
    if not asked:
        return
    since = datetime.now(UTC) - ANSWERS_KEPT
    taken = idempotency.taken_keys(connection, [key for _, (_, key) in asked], since)
    for change, key in asked:
        if key in taken:
            change.refusal = IdempotencyKeyError(KEY_OF_ANOTHER_REQUEST)
        taken.add(key)


def _count_uses(connection: sa.Connection, changes: Sequence[Change]) -> None:
    """Count the uses of these changes' tokens, and refuse those for which none is left."""
    wanted = _token_uses(changes)
    if not wanted:
        return
    left = credentials.count_uses(connection, wanted, datetime.now(UTC))
    refused = []
    for change in changes:
        token = change.peer.token_id
        if not change.adds or token is None:
            continue
        left[token] -= 1
        if left[token] < 0:
            change.refusal = UnauthenticatedError("used_up", token)
            refused.append(change.peer.node_id)
    peers.delete(connection, refused)
