"""The tables of stored answers and used nonces, and all the SQL that touches them.

Every function runs in its caller's transaction.
"""

from collections.abc import Collection, Iterable
from datetime import datetime
from typing import Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from backend.adapters.records.tables import UtcDateTime, metadata
from backend.models.access.answers import Answer

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

_FORGET_ANSWERS: Final = (
    sa.delete(answers)
    .where(answers.c.node_id.in_(sa.bindparam("names", type_=sa.String(), expanding=True)))
    .returning(answers)
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
    """Keep answers. The first of a key stays, until it is forgotten."""
    rows = [{column.name: getattr(answer, column.name) for column in answers.columns} for answer in given]
    if rows:
        connection.execute(_SAVE_ANSWERS[connection.dialect.name], rows)


def find_answer(connection: sa.Connection, scope: str, key_hash: str) -> Answer | None:
    """Return the answer that was given for a key, however long ago, if it's still there."""
    rows = connection.execute(
        sa.select(answers).where(answers.c.scope == scope, answers.c.key_hash == key_hash)
    )
    found = rows.mappings().one_or_none()
    return None if found is None else Answer(**found)


def forget_answers_of(connection: sa.Connection, node_ids: Collection[str]) -> list[Answer]:
    """Delete the stored answers of removed nodes and return them."""
    if not node_ids:
        return []
    gone = connection.execute(_FORGET_ANSWERS, {"names": list(node_ids)}).mappings()
    return [Answer(**row) for row in gone]


def forget_answers_before(connection: sa.Connection, moment: datetime) -> int:
    """Forget the answers that were given before a moment, and return how many there were."""
    return connection.execute(sa.delete(answers).where(answers.c.created_at < moment)).rowcount


def burn_nonces(
    connection: sa.Connection, given: Iterable[tuple[str, str, datetime]]
) -> set[tuple[str, str]]:
    """Keep (identity, nonce, expires_at) and return those (identity, nonce) that nobody had used before.

    One that is given twice is burnt once: which of the two it was for is the caller's to decide.
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


def forget_nonces_before(connection: sa.Connection, moment: datetime) -> int:
    """Forget the nonces that expired before a moment, and return how many there were."""
    return connection.execute(sa.delete(nonces).where(nonces.c.expires_at < moment)).rowcount
