"""The tables of stored answers and used nonces, and all the SQL that touches them.

Every function runs in its caller's transaction.
"""

from collections.abc import Collection, Iterable
from datetime import datetime, timedelta
from typing import Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from backend.adapters.records.tables import UtcDateTime, metadata
from backend.models.access.idempotency import ANSWERS_KEPT, Answer

answers: Final = sa.Table(
    "answers",
    metadata,
    sa.Column("scope", sa.String(128), primary_key=True),
    sa.Column("key_hash", sa.String(64), primary_key=True),
    sa.Column("body_hash", sa.String(64), nullable=False),
    sa.Column("node_id", sa.String(128), nullable=False),
    sa.Column("body", sa.LargeBinary(), nullable=False),
    sa.Column("created_at", UtcDateTime(), nullable=False),
    sa.Index("ix_answers_node_id", "node_id"),
    sa.Index("ix_answers_created_at", "created_at"),
)

nonces: Final = sa.Table(
    "nonces",
    metadata,
    sa.Column("identity", sa.String(128), primary_key=True),
    sa.Column("nonce", sa.String(128), primary_key=True),
    sa.Column("expires_at", UtcDateTime(), nullable=False),
    sa.Index("ix_nonces_expires_at", "expires_at"),
    # The key is nearly the whole row; a second tree beside it would cost each request a page.
    sqlite_with_rowid=False,
)

_FORGET_ANSWERS: Final = sa.delete(answers).where(
    answers.c.node_id.in_(sa.bindparam("names", type_=sa.String(), expanding=True))
)
_SAVE_ANSWERS: Final = {
    "sqlite": sqlite.insert(answers).on_conflict_do_nothing(),
    "postgresql": postgresql.insert(answers).on_conflict_do_nothing(),
}
_BURN_NONCES: Final = {
    "sqlite": sqlite.insert(nonces).on_conflict_do_nothing().returning(nonces.c.identity, nonces.c.nonce),
    "postgresql": postgresql.insert(nonces)
    .on_conflict_do_nothing()
    .returning(nonces.c.identity, nonces.c.nonce),
}


def save_answers(connection: sa.Connection, given: Iterable[Answer]) -> None:
    """Store answers. Of two with the same key the first stays, until it is deleted."""
    rows = [{column.name: getattr(answer, column.name) for column in answers.columns} for answer in given]
    if rows:
        connection.execute(_SAVE_ANSWERS[connection.dialect.name], rows)


def find_answer(connection: sa.Connection, scope: str, key_hash: str) -> Answer | None:
    """Return the stored answer of a key, whatever its age, or None."""
    statement = sa.select(answers).where(answers.c.scope == scope, answers.c.key_hash == key_hash)
    found = connection.execute(statement).mappings().one_or_none()
    return None if found is None else Answer(**found)


def taken_keys(
    connection: sa.Connection, key_hashes: Collection[str], since: datetime
) -> set[tuple[str, str]]:
    """Return the (scope, key_hash) of those Idempotency-Keys that have an answer from after a moment."""
    rows = connection.execute(
        sa.select(answers.c.scope, answers.c.key_hash).where(
            answers.c.key_hash.in_(key_hashes), answers.c.created_at >= since
        )
    )
    return {(scope, key_hash) for scope, key_hash in rows}


def forget_answers_of(connection: sa.Connection, node_ids: Collection[str]) -> None:
    """Delete the stored answers of removed nodes."""
    if node_ids:
        connection.execute(_FORGET_ANSWERS, {"names": list(node_ids)})


def burn_nonces(
    connection: sa.Connection, given: Iterable[tuple[str, str, datetime]]
) -> set[tuple[str, str]]:
    """Record (identity, nonce, expires_at); return the (identity, nonce) pairs that were not recorded before.

    A pair that is given twice is recorded once: the caller decides which of the two it was for.
    """
    rows = [
        {"identity": identity, "nonce": nonce, "expires_at": expires_at}
        # In one order, or two transactions could wait for each other.
        for identity, nonce, expires_at in sorted(given)
    ]
    if not rows:
        return set()
    burnt = connection.execute(_BURN_NONCES[connection.dialect.name], rows)
    return {(row.identity, row.nonce) for row in burnt}


def tidy(connection: sa.Connection, now: datetime) -> None:
    """Delete the stored answers and nonces that are no longer needed at a moment."""
    connection.execute(sa.delete(answers).where(answers.c.created_at < now - ANSWERS_KEPT))
    # A second more than it can be sent again: clocks are compared in whole seconds.
    connection.execute(sa.delete(nonces).where(nonces.c.expires_at < now - timedelta(seconds=1)))
