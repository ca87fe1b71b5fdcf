"""The table of credentials and the one row of `access_state`, and the SQL that touches them.

Every function runs in its caller's transaction. Rows are locked in one order everywhere, credentials
(by id) before `access_state`, so that no two transactions wait for each other.
"""

from collections.abc import Mapping
from datetime import datetime
from ipaddress import ip_network
from typing import Any, Final

import sqlalchemy as sa

from backend.adapters.records.tables import UtcDateTime, metadata
from backend.models.access.audit import GENESIS
from backend.models.access.credentials import Credential, CredentialKind, Role

credentials: Final = sa.Table(
    "credentials",
    metadata,
    sa.Column("id", sa.String(16), primary_key=True),
    sa.Column("kind", sa.String(8), nullable=False),
    sa.Column("role", sa.String(8), nullable=True),
    sa.Column("secret_hash", sa.String(64), nullable=False),
    sa.Column("note", sa.String(256), nullable=False),
    sa.Column("created_at", UtcDateTime(), nullable=False),
    sa.Column("created_by", sa.String(256), nullable=False),
    sa.Column("expires_at", UtcDateTime(), nullable=True),
    sa.Column("max_uses", sa.Integer(), nullable=True),
    sa.Column("uses", sa.Integer(), nullable=False),
    sa.Column("node_id_pattern", sa.String(128), nullable=True),
    sa.Column("source_cidr", sa.String(43), nullable=True),
    # Kept for leases of nodes; nothing reads it.
    sa.Column("ephemeral", sa.Boolean(), nullable=False, default=False),
    sa.Column("revoked_at", UtcDateTime(), nullable=True),
    sa.Column("last_used_at", UtcDateTime(), nullable=True),
    # A token has a number of uses and a key has a role; no other row is a credential.
    sa.CheckConstraint(
        "(kind = 'token' AND role IS NULL AND max_uses IS NOT NULL) OR "
        "(kind = 'key' AND role IS NOT NULL AND role IN ('read', 'operate', 'admin') AND max_uses IS NULL)",
        name="kind",
    ),
    # The count that decides whether a token has a use left.
    sa.CheckConstraint("uses >= 0 AND (max_uses IS NULL OR uses <= max_uses)", name="uses"),
)

# One row: the credentials' version, the audit log's last row, and the last of its rows that was pruned.
access_state: Final = sa.Table(
    "access_state",
    metadata,
    sa.Column("id", sa.Integer, sa.CheckConstraint("id = 1", name="single"), primary_key=True),
    sa.Column("credentials_version", sa.BigInteger(), nullable=False),
    sa.Column("audit_sequence", sa.BigInteger(), nullable=False),
    sa.Column("audit_hash", sa.String(64), nullable=False),
    sa.Column("audit_pruned_sequence", sa.BigInteger(), nullable=False, server_default=sa.text("0")),
    sa.Column("audit_pruned_hash", sa.String(64), nullable=False, server_default=GENESIS),
)

_CREDENTIAL_FIELDS: Final = tuple(column.name for column in credentials.columns if column.name != "ephemeral")

# Made once: building a statement costs more than running it.
_TOKENS: Final = sa.and_(
    credentials.c.id.in_(sa.bindparam("tokens", expanding=True)),
    credentials.c.kind == CredentialKind.TOKEN.value,
    credentials.c.revoked_at.is_(None),
    sa.or_(
        credentials.c.expires_at.is_(None),
        credentials.c.expires_at > sa.bindparam("now", type_=UtcDateTime()),
    ),
)
_LOCK_TOKENS: Final = (
    sa.select(credentials.c.id, credentials.c.max_uses - credentials.c.uses)
    .where(_TOKENS)
    .order_by(credentials.c.id)
    .with_for_update()
)
_COUNT_USES: Final = (
    sa.update(credentials)
    .where(_TOKENS, credentials.c.uses + sa.bindparam("number") <= credentials.c.max_uses)
    .values(
        uses=credentials.c.uses + sa.bindparam("number"),
        last_used_at=sa.bindparam("now", type_=UtcDateTime()),
    )
    .returning(credentials.c.id)
)
_RETURN_USES: Final = (
    sa.update(credentials)
    .where(credentials.c.id == sa.bindparam("token"), credentials.c.kind == CredentialKind.TOKEN.value)
    .values(
        uses=sa.case(
            (credentials.c.uses > sa.bindparam("number"), credentials.c.uses - sa.bindparam("number")),
            else_=0,
        )
    )
)
_NOTE_USED: Final = (
    sa.update(credentials)
    .where(
        credentials.c.id == sa.bindparam("credential"),
        sa.or_(
            credentials.c.last_used_at.is_(None),
            credentials.c.last_used_at < sa.bindparam("moment", type_=UtcDateTime()),
        ),
    )
    .values(last_used_at=sa.bindparam("moment", type_=UtcDateTime()))
)
_BUMP_VERSION: Final = sa.update(access_state).values(
    credentials_version=access_state.c.credentials_version + 1
)


def load_credentials(connection: sa.Connection) -> list[Credential]:
    """Read every credential, revoked and expired ones too, the oldest first."""
    rows = connection.execute(
        sa.select(credentials).order_by(credentials.c.created_at, credentials.c.id)
    ).mappings()
    return [_credential(row) for row in rows]


def credentials_version(connection: sa.Connection) -> int:
    """Return the number that changes whenever a credential is made or revoked."""
    version: int = connection.execute(sa.select(access_state.c.credentials_version)).scalar_one()
    return version


def insert_credential(connection: sa.Connection, credential: Credential) -> None:
    """Keep a new credential."""
    values = {name: getattr(credential, name) for name in _CREDENTIAL_FIELDS}
    network = credential.source_cidr
    values["source_cidr"] = None if network is None else str(network)
    connection.execute(sa.insert(credentials), [values])
    connection.execute(_BUMP_VERSION)


def revoke_credential(connection: sa.Connection, credential_id: str, at: datetime) -> Credential | None:
    """Revoke a credential and return it, or None if there is none. An earlier revocation keeps its time."""
    revoked = connection.execute(
        sa.update(credentials)
        .where(credentials.c.id == credential_id, credentials.c.revoked_at.is_(None))
        .values(revoked_at=at)
    )
    if revoked.rowcount:
        connection.execute(_BUMP_VERSION)
    found = connection.execute(sa.select(credentials).where(credentials.c.id == credential_id)).mappings()
    return next(map(_credential, found), None)


def note_used(connection: sa.Connection, used: Mapping[str, datetime]) -> None:
    """Record when credentials were used last; a later time that is recorded already stays."""
    if used:
        rows = [{"credential": name, "moment": used[name]} for name in sorted(used)]
        connection.execute(_NOTE_USED, rows)


def count_uses(connection: sa.Connection, wanted: Mapping[str, int], now: datetime) -> dict[str, int]:
    """Count uses of tokens; return how many of the wanted uses each token was granted.

    A token that is unknown, revoked or expired by now has none.
    """
    granted = dict.fromkeys(wanted, 0)
    by_number: dict[int, list[str]] = {}
    for token, number in wanted.items():
        if number > 0:
            by_number.setdefault(number, []).append(token)
    if len(wanted) > 1 and connection.dialect.name == "postgresql":
        # One UPDATE locks its rows in any order: two of them could wait for each other.
        connection.execute(_LOCK_TOKENS, {"tokens": list(wanted), "now": now})
    for number, tokens in by_number.items():
        values = {"tokens": tokens, "number": number, "now": now}
        for token in connection.scalars(_COUNT_USES, values):
            granted[token] = number
    short = [token for token, number in wanted.items() if number > 1 and not granted[token]]
    if short:
        # The UPDATE above has the write lock of SQLite, and this has the rows' of PostgreSQL: what is
        # left now is left until the end of the transaction.
        for token, left in connection.execute(_LOCK_TOKENS, {"tokens": short, "now": now}).all():
            if left > 0:
                connection.execute(_COUNT_USES, {"tokens": [token], "number": left, "now": now}).one()
                granted[token] = left
    return granted


def return_uses(connection: sa.Connection, counts: Mapping[str, int]) -> None:
    """Give uses back that `count_uses` has counted for changes that were compensated."""
    rows = [{"token": token, "number": counts[token]} for token in sorted(counts) if counts[token] > 0]
    if rows:
        connection.execute(_RETURN_USES, rows)


def _credential(row: sa.RowMapping) -> Credential:
    values: dict[str, Any] = {name: row[name] for name in _CREDENTIAL_FIELDS}
    values["kind"] = CredentialKind(values["kind"])
    values["role"] = None if values["role"] is None else Role(values["role"])
    values["source_cidr"] = None if values["source_cidr"] is None else ip_network(values["source_cidr"])
    return Credential(**values)
