"""The records' tables, and all the SQL that touches them."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from ipaddress import IPv4Address
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from backend.errors import (
    AddressTakenError,
    DuplicatePeerError,
    KeyTakenError,
    OvertakenError,
    PeerNotFoundError,
    ProvisioningError,
)
from backend.models.wireguard.keys import WireGuardKey
from backend.models.wireguard.peer import Peer
from backend.services.ports import Action, Batch, Change, RecordedState

NAMING: Final = {
    "pk": "pk_%(table_name)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
}


class UtcDateTime(sa.TypeDecorator[datetime]):
    """An aware datetime in UTC, also where the database (SQLite) forgets the zone."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:  # noqa: ARG002 - the base class's
        """Store UTC."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:  # noqa: ARG002 - see above
        """Return UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


metadata: Final = sa.MetaData(naming_convention=NAMING)

peers: Final = sa.Table(
    "peers",
    metadata,
    # The order in which peers came, which is their order in the file.
    sa.Column("sequence", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("node_id", sa.String(128), nullable=False, unique=True),
    sa.Column("wireguard_public_key", sa.String(44), nullable=False, unique=True),
    sa.Column("assigned_ip", sa.String(15), nullable=False, unique=True),
    sa.Column("public_key", sa.String(256), nullable=False),
    sa.Column("provisioned_at", UtcDateTime(), nullable=False),
    sa.Column("version", sa.String(256), nullable=False),
    sa.Column("capabilities", sa.JSON(), nullable=False),
    sa.Column("metadata", sa.JSON(none_as_null=True), nullable=True),
    # The hub's generation that brought the peer.
    sa.Column("generation", sa.BigInteger(), nullable=False),
    # The enrolment token that let the node in, if one did.
    sa.Column("token_id", sa.String(16), nullable=True),
)

# One row: what has been decided, and how far the hub has followed.
hub_state: Final = sa.Table(
    "hub_state",
    metadata,
    sa.Column("id", sa.Integer, sa.CheckConstraint("id = 1", name="single"), primary_key=True),
    sa.Column("generation", sa.BigInteger(), nullable=False),
    sa.Column("applied_generation", sa.BigInteger(), nullable=False),
    # What an operator has decided where the records don't fit the hub, until it's carried out.
    sa.Column("decision", sa.String(8), nullable=True),
    # Which unknown peers the operator was shown (removal_guard.fingerprint).
    sa.Column("decision_basis", sa.String(64), nullable=True),
)

Row = Mapping[str, Any]

# Made once: to make such a statement takes as long as to run it.
_ADVANCE: Final = (
    sa.update(hub_state)
    .where(hub_state.c.generation == sa.bindparam("before"))
    .values(generation=sa.bindparam("reaching"), applied_generation=sa.bindparam("reached"))
    .returning(hub_state.c.generation)
)
_NAMED: Final = peers.c.node_id.in_(sa.bindparam("names", type_=sa.String(), expanding=True))
_REMOVE: Final = sa.delete(peers).where(_NAMED).returning(peers)
_ADD: Final = {
    "sqlite": sqlite.insert(peers).on_conflict_do_nothing().returning(peers.c.node_id),
    "postgresql": postgresql.insert(peers).on_conflict_do_nothing().returning(peers.c.node_id),
}


def load_state(connection: sa.Connection, *, settled: bool = False) -> RecordedState:
    """Read every peer, in the order they came, and the hub's generations.

    `settled` waits for a transaction that is still writing: PostgreSQL may yet commit a batch whose commit
    got no answer.
    """
    statement = sa.select(hub_state.c.generation, hub_state.c.applied_generation)
    state = connection.execute(statement.with_for_update() if settled else statement).one()
    columns = (
        peers.c.node_id,
        peers.c.public_key,
        peers.c.wireguard_public_key,
        peers.c.assigned_ip,
        peers.c.provisioned_at,
        peers.c.token_id,
    )
    found = tuple(
        Peer(node_id, public_key, WireGuardKey.trusted(key), IPv4Address(address), provisioned_at, token_id)
        for node_id, public_key, key, address, provisioned_at, token_id in connection.execute(
            sa.select(*columns).order_by(peers.c.sequence)
        )
    )
    return RecordedState(found, state.generation, state.applied_generation)


def write_intent(connection: sa.Connection, batch: Batch) -> list[Row]:
    """Write one batch under its generation, and how far the hub had come; return the rows that it took out.

    A change that a constraint refuses gets its `refusal` and fails alone.
    """
    moved = {"before": batch.generation - 1, "reaching": batch.generation, "reached": batch.reached}
    if connection.execute(_ADVANCE, moved).first() is None:
        raise OvertakenError
    changes = batch.accepted()
    removed = _remove(connection, [change for change in changes if change.action is Action.REMOVE])
    _add(connection, batch.generation, [change for change in changes if change.action is Action.ADD])
    _identify(connection, [change for change in changes if change.action is Action.IDENTIFY])
    return removed


def revoke_intent(
    connection: sa.Connection, generation: int, changes: Iterable[Change], removed: Sequence[Row]
) -> bool:
    """Take a batch's intent back and return True, unless the hub has reached its generation since."""
    applied = connection.scalar(sa.select(hub_state.c.applied_generation))
    if applied is None or applied >= generation:
        return False
    names = [change.peer.node_id for change in changes if change.action is Action.ADD]
    connection.execute(sa.delete(peers).where(peers.c.node_id.in_(names), peers.c.generation == generation))
    if removed:
        connection.execute(sa.insert(peers), [dict(row) for row in removed])
    return True


def touch(connection: sa.Connection) -> None:
    """Write what is there already."""
    connection.execute(sa.update(hub_state).values(generation=hub_state.c.generation))


def forget(connection: sa.Connection, node_ids: Sequence[str]) -> None:
    """Take rows out that were written in this transaction, and should not have been."""
    if node_ids:
        connection.execute(sa.delete(peers).where(peers.c.node_id.in_(node_ids)))


def adopt(connection: sa.Connection, found: Sequence[Peer], generation: int) -> None:
    """Write peers of which only what the hub has is known."""
    rows = [
        {
            "node_id": peer.node_id,
            "wireguard_public_key": peer.wireguard_public_key,
            "assigned_ip": str(peer.address),
            "public_key": peer.public_key,
            "provisioned_at": peer.provisioned_at,
            "version": "",
            "capabilities": {},
            "generation": generation,
        }
        for peer in found
    ]
    if rows:
        connection.execute(sa.insert(peers), rows)


def mark_applied(connection: sa.Connection, generation: int) -> None:
    """Note that the hub has reached a generation; it never goes back."""
    connection.execute(
        sa.update(hub_state)
        .where(hub_state.c.applied_generation < generation)
        .values(applied_generation=generation)
    )


def _remove(connection: sa.Connection, changes: Sequence[Change]) -> list[Row]:
    if not changes:
        return []
    names = [change.peer.node_id for change in changes]
    rows = connection.execute(_REMOVE, {"names": names}).mappings().all()
    found = {row["node_id"] for row in rows}
    for change in changes:
        if change.peer.node_id not in found:
            change.refusal = PeerNotFoundError(change.peer.node_id)
    return [dict(row) for row in rows]


def _add(connection: sa.Connection, generation: int, changes: Sequence[Change]) -> None:
    rows = [_row(change, generation) for change in changes]
    if not rows:
        return
    written = set(connection.scalars(_ADD[connection.dialect.name], rows))
    for change in changes:
        if change.peer.node_id not in written:
            change.refusal = _refusal(connection, change.peer)


def _identify(connection: sa.Connection, changes: Sequence[Change]) -> None:
    """Fill in what wasn't known of adopted peers. Nothing of it is taken back: the hub has no part in it."""
    for change in changes:
        row = dict(_row(change, 0))
        known = {name: row[name] for name in ("public_key", "version", "capabilities", "metadata")}
        found = connection.execute(
            sa.update(peers).where(peers.c.node_id == change.peer.node_id).values(known)
        )
        if found.rowcount == 0:
            change.refusal = PeerNotFoundError(change.peer.node_id)


def _row(change: Change, generation: int) -> Row:
    record = change.record
    if record is None:
        raise ValueError("a peer without a record can't be added")
    return {
        "node_id": record.node_id,
        "wireguard_public_key": record.wireguard_public_key,
        "assigned_ip": str(record.assigned_ip),
        "public_key": record.public_key,
        "provisioned_at": record.provisioned_at,
        "version": record.version,
        "capabilities": record.capabilities.model_dump(mode="json"),
        "metadata": record.metadata,
        "generation": generation,
        "token_id": change.peer.token_id,
    }


def _refusal(connection: sa.Connection, peer: Peer) -> ProvisioningError:
    """Name the constraint that kept a peer out."""
    address_taken = sa.select(peers.c.node_id).where(
        peers.c.assigned_ip == str(peer.address),
        peers.c.node_id != peer.node_id,
        peers.c.wireguard_public_key != peer.wireguard_public_key,
    )
    if connection.scalar(address_taken) is not None:
        return AddressTakenError(str(peer.address))
    name_taken = sa.select(peers.c.node_id).where(peers.c.node_id == peer.node_id)
    if connection.scalar(name_taken) is not None:
        return DuplicatePeerError(peer.node_id, {})
    return KeyTakenError(peer.node_id)
