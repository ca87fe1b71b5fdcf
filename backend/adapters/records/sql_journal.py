"""The records in a database, and the way a batch gets into them: in one transaction, with all of it."""

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from threading import get_ident
from typing import Final

import sqlalchemy as sa
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from backend.adapters.records import audit, credentials, hub_records, idempotency, tables
from backend.adapters.records.database import Database
from backend.adapters.records.postgresql import said
from backend.errors import NonceError, RecordsUnavailableError, UnauthenticatedError
from backend.models.access.answers import Answer
from backend.models.access.audit import AuditAction, AuditOutcome
from backend.models.access.callers import SERVICE
from backend.services.batches import run_sequence
from backend.services.ports import Action, Batch, Change, HubStatus, NewGeneration, NextBatch, RecordedState

_FORGET_INTERVAL_SECONDS: Final = 3600.0

# How often the database is looked at when nothing asks for it: seconds.
_LOOK_INTERVAL_SECONDS: Final = 1.0
# What says nothing of the change itself: the database is away, locked, full or read-only.
_NOT_WRITTEN: Final = (OperationalError, InterfaceError, InternalError, PoolTimeoutError)


class SqlJournal:
    """Takes batches through their sequence, without anything durable about the sequence itself.

    Enough where the database lives as long as the process; `DbosJournal` is for one that outlives it.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._engine = database.engine
        # What the batch under way has taken out, in case it's taken back.
        self._removed: list[tables.Row] = []
        self._forgotten: list[Answer] = []
        self._apply: Callable[[Batch | None], str | None] = lambda _: None
        self._looked_at = self._forgot_at = time.monotonic()
        # Since when which thread has been waiting for the database.
        self._waiting: dict[int, float] = {}
        # Whether the last batch may or may not be written.
        self._in_doubt = False

    @property
    def durable(self) -> bool:
        """False where the records live as long as the process."""
        return self._database.durable

    @property
    def busy_since(self) -> float | None:
        """Since when, by time.monotonic(), a call has been waiting for the database, or None."""
        return min(list(self._waiting.values()), default=None)

    def load(self) -> RecordedState:
        """Read everything; raise RecordsUnavailableError."""
        with self._reading() as connection:
            state = tables.load_state(connection, settled=self._in_doubt)
        self._in_doubt = False
        return state

    def launch(self, apply: Callable[[Batch | None], str | None]) -> None:
        """Remember how a batch gets to the hub."""
        self._apply = apply

    def run(self, next_batch: NextBatch) -> None:
        """Take batches through their sequence, in this thread, until there is none."""

        def elsewhere() -> Batch | None:
            with self._waits_not():
                return next_batch()

        try:
            with self._waits():
                self._run(elsewhere)
        except BaseException as exc:
            self._in_doubt = True
            if isinstance(exc, _NOT_WRITTEN):
                self._database.note_not_written(exc)
                raise RecordsUnavailableError("the records can't be written; check the database") from None
            raise

    def _run(self, next_batch: NextBatch) -> None:
        run_sequence(next_batch, self)

    def hub_status(self) -> HubStatus:
        """Return what changes beside the peers."""
        with self._reading() as connection:
            return hub_records.hub_status(connection)

    def add_generation(self, new: NewGeneration) -> None:
        """Write a new generation, and that the operator's decision is carried out."""
        with self._writing() as connection:
            hub_records.add_generation(connection, new)

    def dismiss_decision(self) -> None:
        """Forget a decision that nothing waits for."""
        with self._writing() as connection:
            hub_records.dismiss_decision(connection)

    def removed_keys(self, keys: Collection[str]) -> set[str]:
        """Return those of the keys whose peers were removed on the record."""
        with self._reading() as connection:
            return hub_records.removed_keys(connection, keys)

    def audit_hash(self, sequence: int) -> str | None:
        """Return the hash of a row of the audit log, PRUNED for a pruned one, None where there is none."""
        with self._reading() as connection:
            return audit.audit_hash(connection, sequence)

    def mark_applied(self, generation: int) -> None:
        """Note that the hub has reached `generation`, outside of any batch."""
        with self._writing() as connection:
            tables.mark_applied(connection, generation)

    def tidy(self) -> None:
        """Look whether the database is still there; forget peers that were removed long ago."""
        now = time.monotonic()
        if now - self._looked_at >= _LOOK_INTERVAL_SECONDS:
            self._looked_at = now
            with self._waits():
                self._database.check()
        if now - self._forgot_at >= _FORGET_INTERVAL_SECONDS:
            self._forgot_at = now
            with self._writing() as connection:
                hub_records.forget_removed(connection, datetime.now(UTC))

    def check(self) -> None:
        """Raise RecordsUnavailableError unless the database answers."""
        with self._waits():
            self._database.check()
        if not self._database.has_room():
            raise RecordsUnavailableError("the disk with the records is full; make room on it")

    def check_writable(self) -> None:
        """Raise RecordsUnavailableError unless a batch could be committed now; not for an event loop."""
        self.check()
        try:
            with self._waits(), self._database.trial() as connection:
                if connection is None:
                    return
                tables.touch(connection)
        except SQLAlchemyError as exc:
            self._database.note_not_written(exc)
            raise RecordsUnavailableError(f"the database can't be written: {said(exc)}") from exc
        self._database.note_written()

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        try:
            with self._waits(), self._engine.connect() as connection:
                yield connection
        except SQLAlchemyError as exc:
            raise RecordsUnavailableError("the records can't be read; check the database") from exc

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        try:
            with self._waits(), self._engine.begin() as connection:
                yield connection
        except SQLAlchemyError as exc:
            raise RecordsUnavailableError("the records can't be written; check the database") from exc

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def intend(self, batch: Batch) -> None:
        """Write the batch's records, count the tokens' uses and log who did it, in one transaction."""
        with self._engine.begin() as connection:
            _burn_nonces(connection, batch.accepted())
            self._removed = tables.write_intent(connection, batch)
            _count_uses(connection, batch.accepted())
            accepted = batch.accepted()
            gone = [change.peer.node_id for change in accepted if change.action is Action.REMOVE]
            _note_removed(connection, accepted, Action.REMOVE, batch.generation)
            self._forgotten = idempotency.forget_answers_of(connection, gone)
            idempotency.save_answers(
                connection, [change.answer for change in accepted if change.answer is not None]
            )
            audit.append_audit(connection, [change.event for change in accepted if change.event is not None])
        # A commit to a file that was moved or deleted succeeds, and the next start knows nothing of it.
        self._database.check_file()
        self._database.note_written()

    def apply(self, batch: Batch) -> str | None:
        """Bring the hub up to the records."""
        with self._waits_not():
            return self._apply(batch)

    def revoke(self, batch: Batch) -> None:
        """Take the intent back, the uses and answers with it, and log that, in one transaction."""
        accepted = batch.accepted()
        now = datetime.now(UTC)
        with self._engine.begin() as connection:
            if not tables.revoke_intent(connection, batch.generation, accepted, self._removed):
                return
            credentials.return_uses(connection, _tokens(accepted))
            added = [change.peer.node_id for change in accepted if change.action is Action.ADD]
            # The hub may have them for a moment longer, where it couldn't be put back at once.
            _note_removed(connection, accepted, Action.ADD, batch.generation)
            idempotency.forget_answers_of(connection, added)
            idempotency.save_answers(connection, self._forgotten)
            audit.append_audit(
                connection,
                [
                    SERVICE.event(
                        now, AuditAction.REVERT, AuditOutcome.NOTED, change.peer.node_id, batch.failure
                    )
                    for change in accepted
                ],
            )

    @contextmanager
    def _waits(self) -> Iterator[None]:
        """Have it seen that this thread waits for the database."""
        self._waiting[get_ident()] = time.monotonic()
        try:
            yield
        finally:
            self._waiting.pop(get_ident(), None)

    @contextmanager
    def _waits_not(self) -> Iterator[None]:
        """Have it seen that this thread, in between, waits for something else."""
        self._waiting.pop(get_ident(), None)
        try:
            yield
        finally:
            self._waiting[get_ident()] = time.monotonic()


def _note_removed(
    connection: sa.Connection, changes: Sequence[Change], action: Action, generation: int
) -> None:
    gone = [
        (change.peer.wireguard_public_key, change.peer.node_id)
        for change in changes
        if change.action is action
    ]
    hub_records.note_removed(connection, gone, generation)


def _tokens(changes: Sequence[Change]) -> Counter[str]:
    return Counter(
        change.peer.token_id
        for change in changes
        if change.action is Action.ADD and change.peer.token_id is not None
    )


def _burn_nonces(connection: sa.Connection, changes: Sequence[Change]) -> None:
    """Keep the nonces that these changes were signed with, and refuse those whose nonce was used before."""
    signed = [(change, change.nonce) for change in changes if change.nonce is not None]
    if not signed:
        return
    fresh = idempotency.burn_nonces(connection, [nonce for _, nonce in signed])
    for change, nonce in signed:
        try:
            # Taken out: of two that came with the same nonce, one is let in.
            fresh.remove((nonce.identity, nonce.nonce))
        except KeyError:
            change.refusal = NonceError()


def _count_uses(connection: sa.Connection, accepted: Sequence[Change]) -> None:
    """Count the uses of these changes' tokens, and refuse those for which none is left."""
    wanted = _tokens(accepted)
    if not wanted:
        return
    left = credentials.count_uses(connection, wanted, datetime.now(UTC))
    refused = []
    for change in accepted:
        token = change.peer.token_id
        if change.action is not Action.ADD or token is None:
            continue
        left[token] -= 1
        if left[token] < 0:
            change.refusal = UnauthenticatedError("used_up", token)
            refused.append(change.peer.node_id)
    tables.forget(connection, refused)
