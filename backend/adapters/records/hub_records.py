"""What the records keep of the hub beside its peers: removed ones, an operator's decision, notices."""

from collections.abc import Collection, Iterable
from datetime import UTC, datetime, timedelta
from typing import Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from backend.adapters.records import audit, tables
from backend.adapters.records.tables import UtcDateTime, hub_state, metadata
from backend.models.access.audit import AuditEvent
from backend.services.ports import Decision, HubStatus, NewGeneration

# A hub that was away for longer, and comes back with a peer that was removed, asks its operator.
_REMOVED_KEPT: Final = timedelta(days=90)
# SQLite takes 32,766 values in a statement, PostgreSQL 65,535.
_KEYS_AT_A_TIME: Final = 10_000

removed_peers: Final = sa.Table(
    "removed_peers",
    metadata,
    sa.Column("wireguard_public_key", sa.String(44), primary_key=True),
    sa.Column("node_id", sa.String(128), nullable=False),
    # The hub's generation that took the peer out.
    sa.Column("generation", sa.BigInteger(), nullable=False),
    sa.Column("removed_at", UtcDateTime(), nullable=False),
    sa.Index("ix_removed_peers_removed_at", "removed_at"),
)

# What `/readyz` says until an operator has acknowledged it.
notices: Final = sa.Table(
    "notices",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("at", UtcDateTime(), nullable=False),
    sa.Column("text", sa.Text(), nullable=False),
)

# Made once, and with its type: for a value without one SQLAlchemy imports its ORM, which at the start another
# thread may be doing at that moment for DBOS.
_REMOVED_KEYS: Final = sa.select(removed_peers.c.wireguard_public_key).where(
    removed_peers.c.wireguard_public_key.in_(sa.bindparam("keys", type_=sa.String(), expanding=True))
)
_INSERT_REMOVED: Final[dict[str, sqlite.Insert | postgresql.Insert]] = {
    "sqlite": sqlite.insert(removed_peers),
    "postgresql": postgresql.insert(removed_peers),
}
_NOTE_REMOVED: Final = {
    dialect: insert.on_conflict_do_update(
        index_elements=["wireguard_public_key"],
        set_={name: insert.excluded[name] for name in ("node_id", "generation", "removed_at")},
    )
    for dialect, insert in _INSERT_REMOVED.items()
}
_DECISION: Final = sa.select(hub_state.c.decision, hub_state.c.decision_basis)
_UNDECIDED: Final[dict[str, None]] = {"decision": None, "decision_basis": None}
_NOTICES: Final = sa.select(notices.c.text).order_by(notices.c.id)


def note_removed(connection: sa.Connection, gone: Iterable[tuple[str, str]], generation: int) -> None:
    """Keep the (key, node_id) of peers that were taken out, so that the hub may be relieved of them."""
    now = datetime.now(UTC)
    rows = [
        {"wireguard_public_key": key, "node_id": node_id, "generation": generation, "removed_at": now}
        for key, node_id in gone
    ]
    if rows:
        connection.execute(_NOTE_REMOVED[connection.dialect.name], rows)


def removed_keys(connection: sa.Connection, keys: Collection[str]) -> set[str]:
    """Return those of the keys that removed peers had."""
    wanted = list(keys)
    found: set[str] = set()
    for start in range(0, len(wanted), _KEYS_AT_A_TIME):
        part = wanted[start : start + _KEYS_AT_A_TIME]
        found.update(connection.scalars(_REMOVED_KEYS, {"keys": part}))
    return found


def forget_removed(connection: sa.Connection, now: datetime) -> None:
    """Delete the rows of peers that were removed long ago, and that the hub is known to be rid of."""
    reached = sa.select(hub_state.c.applied_generation).scalar_subquery()
    connection.execute(
        sa.delete(removed_peers).where(
            removed_peers.c.removed_at < now - _REMOVED_KEPT, removed_peers.c.generation <= reached
        )
    )


def hub_status(connection: sa.Connection) -> HubStatus:
    """Read what changes beside the peers."""
    decision, basis = connection.execute(_DECISION).one()
    return HubStatus(
        None if decision is None else Decision(decision),
        basis,
        tuple(connection.scalars(_NOTICES)),
        audit.audit_head(connection),
    )


def add_generation(connection: sa.Connection, new: NewGeneration) -> None:
    """Write a new generation, the peers that it adopts, and why; the decision is carried out by that."""
    connection.execute(sa.update(hub_state).values(generation=new.generation, **_UNDECIDED))
    tables.adopt(connection, new.peers, new.generation)
    note_removed(connection, new.removed, new.generation)
    if new.notice is not None:
        connection.execute(sa.insert(notices), [{"at": datetime.now(UTC), "text": new.notice}])
    audit.append_audit(connection, [new.event])


def decide(connection: sa.Connection, decision: Decision, basis: str, event: AuditEvent) -> None:
    """Write what an operator has decided, and about which unknown peers (removal_guard.fingerprint)."""
    connection.execute(sa.update(hub_state).values(decision=decision, decision_basis=basis))
    audit.append_audit(connection, [event])


def dismiss_decision(connection: sa.Connection) -> None:
    """Forget a decision."""
    connection.execute(sa.update(hub_state).values(_UNDECIDED))


def acknowledge(connection: sa.Connection, event: AuditEvent) -> int:
    """Delete all notices, and return how many there were."""
    count = connection.execute(sa.delete(notices)).rowcount
    if count:
        audit.append_audit(connection, [event])
    return count
