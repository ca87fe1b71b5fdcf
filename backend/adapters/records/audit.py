"""The table of the audit log, and all the SQL that touches it.

Every function runs in its caller's transaction. `access_state` is locked behind the rows of credentials.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import takewhile
from typing import Final

import sqlalchemy as sa

from backend.adapters.records.credentials import access_state
from backend.adapters.records.tables import metadata
from backend.models.access.audit import (
    PRUNED,
    AuditAction,
    AuditEvent,
    AuditOutcome,
    AuditQuery,
    AuditRecord,
    chain_hash,
    timestamp,
)
from backend.models.access.callers import CallerKind

_ROWS_AT_A_TIME: Final = 1000

# Append-only, up to the row that `access_state` says is pruned: triggers refuse anything else.
audit: Final = sa.Table(
    "audit",
    metadata,
    sa.Column(
        "sequence",
        sa.BigInteger().with_variant(sa.Integer, "sqlite"),
        primary_key=True,
        autoincrement=False,
    ),
    # The text that is hashed: a column of dates would give it back in whatever spelling it has.
    sa.Column("at", sa.String(32), nullable=False),
    sa.Column("action", sa.String(32), nullable=False),
    sa.Column("outcome", sa.String(16), nullable=False),
    sa.Column("actor", sa.Text(), nullable=False),
    sa.Column("subject", sa.Text(), nullable=True),
    sa.Column("source", sa.Text(), nullable=True),
    sa.Column("request_id", sa.Text(), nullable=True),
    sa.Column("reason", sa.Text(), nullable=True),
    sa.Column("count", sa.Integer(), nullable=False),
    sa.Column("previous_hash", sa.String(64), nullable=False),
    sa.Column("hash", sa.String(64), nullable=False),
)

_EXTEND_LOG: Final = (
    sa.update(access_state)
    .values(audit_sequence=access_state.c.audit_sequence + sa.bindparam("number"))
    .returning(access_state.c.audit_sequence, access_state.c.audit_hash)
)
# Changes no value. Its lock keeps other transactions from appending until this one ends.
_LOCK_LOG: Final = sa.update(access_state).values(audit_sequence=access_state.c.audit_sequence)
_OLDEST: Final = (
    sa.select(audit.c.sequence, audit.c.at, audit.c.hash)
    .order_by(audit.c.sequence)
    .limit(sa.bindparam("number", type_=sa.Integer()))
)
_NOTE_HEAD: Final = sa.update(access_state).values(audit_hash=sa.bindparam("head"))
# For the driver as it is: SQLAlchemy takes as long for the values of a row as SQLite for the row.
_INSERT_AUDIT: Final = {
    dialect: f"INSERT INTO audit ({', '.join(audit.columns.keys())}) "  # noqa: S608 - the table's own names
    f"VALUES ({', '.join([place] * len(audit.columns))})"
    for dialect, place in (("sqlite", "?"), ("postgresql", "%s"))
}


def append_audit(connection: sa.Connection, events: Sequence[AuditEvent]) -> None:
    """Append to the audit log, in this order."""
    if not events:
        return
    # The first statement: its lock keeps other transactions from appending until this one ends.
    last, previous = connection.execute(_EXTEND_LOG, {"number": len(events)}).one()
    rows = []
    for sequence, given in enumerate(events, start=last - len(events) + 1):
        event = given.storable()
        own = chain_hash(previous, sequence, event)
        # In the order of the table's columns.
        rows.append(
            (
                sequence,
                timestamp(event.at),
                event.action.value,
                event.outcome.value,
                event.actor,
                event.subject,
                event.source,
                event.request_id,
                event.reason,
                event.count,
                previous,
                own,
            )
        )
        previous = own
    connection.exec_driver_sql(_INSERT_AUDIT[connection.dialect.name], rows)
    connection.execute(_NOTE_HEAD, {"head": previous})


def list_audit(connection: sa.Connection, query: AuditQuery) -> list[AuditRecord]:
    """Return the newest rows, the newest first."""
    statement = sa.select(audit).order_by(audit.c.sequence.desc()).limit(query.limit)
    if query.before is not None:
        statement = statement.where(audit.c.sequence < query.before)
    wanted = {"action": query.action, "actor": query.actor, "subject": query.subject}
    for name, value in wanted.items():
        if value is not None:
            statement = statement.where(audit.c[name] == str(value))
    return [_record(row) for row in connection.execute(statement).mappings()]


def hold_still(connection: sa.Connection) -> None:
    """Have the transaction read everything as of one moment. Comes first in it; only reads may follow.

    Otherwise the log may grow between the reads of its head and of its rows.
    """
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN")
    else:
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")


def audit_head(connection: sa.Connection) -> tuple[int, str]:
    """Return the sequence and the hash of the audit log's last row, which are stored apart from it."""
    row = connection.execute(sa.select(access_state.c.audit_sequence, access_state.c.audit_hash)).one()
    return row.audit_sequence, row.audit_hash


def audit_start(connection: sa.Connection) -> tuple[int, str]:
    """Return the sequence and the hash of the last row that was pruned, (0, GENESIS) where none was."""
    row = connection.execute(
        sa.select(access_state.c.audit_pruned_sequence, access_state.c.audit_pruned_hash)
    ).one()
    return row.audit_pruned_sequence, row.audit_pruned_hash


def prune(connection: sa.Connection, before: datetime, limit: int, event: AuditEvent) -> int:
    """Delete the oldest rows from before a moment, at most `limit`; return their number.

    A row about that is appended: `event`, with the last deleted row's sequence and hash. It is part of the
    chain, so the log's start can't be moved without such a row.
    """
    cutoff = timestamp(before)
    if not _older(connection, cutoff, 1):
        return 0
    connection.execute(_LOCK_LOG)
    old = _older(connection, cutoff, limit)
    if not old:
        return 0
    last, last_hash = old[-1]
    # Before the rows are deleted: the triggers look at it.
    connection.execute(
        sa.update(access_state).values(audit_pruned_sequence=last, audit_pruned_hash=last_hash)
    )
    checkpoint = replace(event, subject=str(last), reason=last_hash, count=len(old))
    append_audit(connection, [checkpoint])
    connection.execute(sa.delete(audit).where(audit.c.sequence <= last))
    return len(old)


def _older(connection: sa.Connection, cutoff: str, limit: int) -> list[tuple[int, str]]:
    """Return sequence and hash of the oldest rows, up to the first that is as new as the cutoff."""
    rows = connection.execute(_OLDEST, {"number": limit}).all()
    # As text, which is in the order of time: `timestamp` has one spelling.
    return [(row.sequence, row.hash) for row in takewhile(lambda row: str(row.at) < cutoff, rows)]


def audit_hash(connection: sa.Connection, sequence: int) -> str | None:
    """Return the hash of a row of the audit log, PRUNED for a pruned row, None where there is no such row.

    The hash of the last row that was pruned is still known.
    """
    pruned, last_hash = audit_start(connection)
    if 0 < sequence <= pruned:
        return last_hash if sequence == pruned else PRUNED
    return connection.scalar(sa.select(audit.c.hash).where(audit.c.sequence == sequence))


def iterate_audit(connection: sa.Connection) -> Iterator[AuditRecord]:
    """Read the whole audit log in order, some rows at a time.

    A row that was changed into values that are never written is returned as UNREADABLE.
    """
    statement = sa.select(audit).order_by(audit.c.sequence)
    # Closed also where the caller stops early: PostgreSQL keeps the rest of the result until then.
    with connection.execute(statement.execution_options(yield_per=_ROWS_AT_A_TIME)) as result:
        yield from map(_record, result.mappings())


def _record(row: sa.RowMapping) -> AuditRecord:
    return AuditRecord(
        row["sequence"], _event(row) or _UNREADABLE, str(row["previous_hash"]), str(row["hash"])
    )


def _event(row: sa.RowMapping) -> AuditEvent | None:
    """Read a row as `append_audit` writes it, or return None: SQLite takes any type in any column."""
    texts = (row["actor"], row["subject"], row["source"], row["request_id"], row["reason"])
    actor, subject, source, request_id, reason = texts
    if type(row["count"]) is not int or not all(text is None or type(text) is str for text in texts):
        return None
    try:
        at = datetime.fromisoformat(row["at"])
        action, outcome = AuditAction(row["action"]), AuditOutcome(row["outcome"])
    except (TypeError, ValueError):
        return None
    if timestamp(at) != row["at"]:
        return None
    return AuditEvent(at, action, outcome, actor, subject, source, request_id, reason, row["count"])


# Stands for a row with values that no version writes; `verify` names the row by its hash.
_UNREADABLE: Final = AuditEvent(
    datetime.fromtimestamp(0, UTC),
    AuditAction.UNREADABLE,
    AuditOutcome.NOTED,
    CallerKind.UNAUTHENTICATED.value,
)
