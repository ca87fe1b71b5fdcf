"""The SQL of peers. Functions with a connection run in its transaction, for one hub (`hub` is hubs.id)."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError

from backend.adapters.records import idempotency
from backend.adapters.records.tables import UNDER_WAY, hubs, peers, removed_peers
from backend.errors import (
    AddressTakenError,
    DuplicatePeerError,
    KeyTakenError,
    OvertakenError,
    PeerNotFoundError,
    ProvisioningError,
)
from backend.models.wireguard.keys import WireGuardKey
from backend.models.wireguard.peer import Change, Peer, PeerState
from backend.models.wireguard.records import RecordedState

# Statements are built once: building one takes as long as running it.
_ADVANCE: Final = (
    sa.update(hubs)
    .where(hubs.c.id == sa.bindparam("hub"), hubs.c.generation == sa.bindparam("before"))
    .values(generation=sa.bindparam("next"), observed_generation=sa.bindparam("observed"))
    .returning(hubs.c.id)
)
_NAMES: Final = peers.c.node_id.in_(sa.bindparam("names", type_=sa.String(), expanding=True))
_BEGIN_REMOVAL: Final = (
    sa.update(peers)
    .where(_NAMES, peers.c.state != PeerState.REMOVING)
    .values(state=PeerState.REMOVING, generation=sa.bindparam("at"))
    .returning(peers.c.node_id)
)
_INSERT: Final = {
    "sqlite": sqlite.insert(peers).on_conflict_do_nothing().returning(peers.c.node_id),
    "postgresql": postgresql.insert(peers).on_conflict_do_nothing().returning(peers.c.node_id),
}
_OF_HUB: Final = sa.and_(peers.c.hub == sa.bindparam("on"), UNDER_WAY)
_UNTIL: Final = sa.and_(_OF_HUB, peers.c.generation <= sa.bindparam("until"))
_DELETE_REMOVED: Final = (
    sa.delete(peers)
    .where(_UNTIL, peers.c.state == PeerState.REMOVING)
    .returning(peers.c.wireguard_public_key, peers.c.node_id)
)
_ACTIVATE: Final = (
    sa.update(peers).where(_UNTIL, peers.c.state == PeerState.PENDING).values(state=PeerState.ACTIVE)
)
_TAKE_BACK_ADDED: Final = (
    sa.delete(peers)
    .where(_OF_HUB, peers.c.generation == sa.bindparam("at"), peers.c.state == PeerState.PENDING)
    .returning(peers.c.wireguard_public_key, peers.c.node_id)
)
_TAKE_BACK_REMOVED: Final = (
    sa.update(peers)
    .where(_OF_HUB, peers.c.generation == sa.bindparam("at"), peers.c.state == PeerState.REMOVING)
    .values(state=PeerState.ACTIVE)
)
# The fields that an alteration writes, and those of them that memory doesn't keep.
_ALTERABLE: Final = (peers.c.public_key, peers.c.version, peers.c.capabilities, peers.c.metadata)
_DETAILS: Final = sa.select(*_ALTERABLE[1:]).where(peers.c.node_id == sa.bindparam("name"))
_COLUMNS: Final = (
    peers.c.node_id,
    peers.c.public_key,
    peers.c.wireguard_public_key,
    peers.c.assigned_ip,
    peers.c.provisioned_at,
    peers.c.token_id,
)
_INSERT_TOMBSTONE: Final[dict[str, sqlite.Insert | postgresql.Insert]] = {
    "sqlite": sqlite.insert(removed_peers),
    "postgresql": postgresql.insert(removed_peers),
}
_KEEP_TOMBSTONE: Final = {
    dialect: insert.on_conflict_do_update(
        index_elements=["wireguard_public_key"],
        set_={name: insert.excluded[name] for name in ("node_id", "generation", "removed_at", "hub")},
    )
    for dialect, insert in _INSERT_TOMBSTONE.items()
}


def load(connection: sa.Connection, hub: int, *, wait_for_commit: bool) -> RecordedState:
    """Read the desired state.

    `wait_for_commit` waits for a transaction that is still writing: PostgreSQL may yet commit a batch when
    the connection was lost before its answer came.
    """
    statement = sa.select(hubs.c.generation, hubs.c.observed_generation).where(hubs.c.id == hub)
    generations = connection.execute(statement.with_for_update() if wait_for_commit else statement).one()
    rows = connection.execute(
        sa.select(*_COLUMNS)
        .where(peers.c.hub == hub, peers.c.state != PeerState.REMOVING)
        .order_by(peers.c.sequence)
    )
    found = tuple(
        Peer(node_id, public_key, WireGuardKey(key), IPv4Address(address), *others)
        for node_id, public_key, key, address, *others in rows
    )
    return RecordedState(found, generations.generation, generations.observed_generation)


def count_recorded_peers(url: str) -> int:
    """Count a database's peers, whatever the schema's version; 0 where none is there, or answers."""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").is_file():
        return 0
    engine = sa.create_engine(parsed)
    try:
        with engine.connect() as connection:
            return connection.scalar(sa.select(sa.func.count()).select_from(peers)) or 0
    except SQLAlchemyError:
        return 0
    finally:
        engine.dispose()


def advance(connection: sa.Connection, hub: int, generation: int, observed: int) -> None:
    """Go on to the hub's next generation; raise OvertakenError where the records have another one."""
    values = {"hub": hub, "before": generation - 1, "next": generation, "observed": observed}
    if connection.execute(_ADVANCE, values).first() is None:
        raise OvertakenError


def write(connection: sa.Connection, hub: int, generation: int, changes: Sequence[Change]) -> None:
    """Write changes as pending or removing; one that a constraint refuses gets its `refusal`."""
    _remove(connection, generation, [change for change in changes if change.removes])
    _add(connection, hub, generation, [change for change in changes if change.adds])
    for change in changes:
        if change.before is not None and change.after is not None:
            _alter(connection, change, change.before, change.after)


def take_back(connection: sa.Connection, hub: int, generation: int, changes: Sequence[Change]) -> bool:
    """Undo `write`; return False, and undo nothing, where the hub has reached this generation."""
    observed = connection.scalar(sa.select(hubs.c.observed_generation).where(hubs.c.id == hub))
    if observed is None or observed >= generation:
        return False
    of_generation = {"on": hub, "at": generation}
    if any(change.adds for change in changes):
        # They may still be on the hub where it could not be put back: the tombstones let the next
        # reconciliation remove them.
        added = connection.execute(_TAKE_BACK_ADDED, of_generation).all()
        keep_tombstones(connection, hub, [(key, node_id) for key, node_id in added], generation)
    if any(change.removes for change in changes):
        connection.execute(_TAKE_BACK_REMOVED, of_generation)
    for change in changes:
        if change.before is not None and change.after is not None:
            _update(connection, change.before)
    return True


def update_states(connection: sa.Connection, hub: int, observed: int) -> None:
    """Update states to what the hub has reached: pending peers become active, removed ones are deleted."""
    end_removals(connection, hub, observed)
    connection.execute(_ACTIVATE, {"on": hub, "until": observed})


def end_removals(connection: sa.Connection, hub: int, until: int) -> None:
    """Replace the rows of peers that were removed up to a generation by tombstones."""
    removed = connection.execute(_DELETE_REMOVED, {"on": hub, "until": until})
    gone = [(key, node_id) for key, node_id in removed]
    keep_tombstones(connection, hub, gone, until)
    idempotency.forget_answers_of(connection, [node_id for _, node_id in gone])


def delete(connection: sa.Connection, node_ids: Sequence[str]) -> None:
    """Delete rows that were written in this transaction, and should not have been."""
    if node_ids:
        connection.execute(sa.delete(peers).where(peers.c.node_id.in_(node_ids)))


def adopt(connection: sa.Connection, hub: int, found: Iterable[Peer], generation: int) -> None:
    """Write peers that the hub has already."""
    rows = [_row(peer, hub, generation, PeerState.ACTIVE) for peer in found]
    if rows:
        connection.execute(sa.insert(peers), rows)


def keep_tombstones(
    connection: sa.Connection, hub: int, gone: Iterable[tuple[str, str]], generation: int
) -> None:
    """Keep the (key, node_id) of removed peers: a reconciliation may take these off the hub."""
    now = datetime.now(UTC)
    rows = [
        {
            "wireguard_public_key": key,
            "node_id": node_id,
            "generation": generation,
            "removed_at": now,
            "hub": hub,
        }
        for key, node_id in gone
    ]
    if rows:
        connection.execute(_KEEP_TOMBSTONE[connection.dialect.name], rows)


def _remove(connection: sa.Connection, generation: int, changes: Sequence[Change]) -> None:
    if not changes:
        return
    names = [change.peer.node_id for change in changes]
    found = set(connection.scalars(_BEGIN_REMOVAL, {"names": names, "at": generation}))
    for change in changes:
        if change.peer.node_id not in found:
            change.refusal = PeerNotFoundError(change.peer.node_id)


def _add(connection: sa.Connection, hub: int, generation: int, changes: Sequence[Change]) -> None:
    if not changes:
        return
    rows = [_row(change.peer, hub, generation, PeerState.PENDING) for change in changes]
    written = set(connection.scalars(_INSERT[connection.dialect.name], rows))
    for change in changes:
        if change.peer.node_id not in written:
            change.refusal = _refusal(connection, hub, change.peer)


def _alter(connection: sa.Connection, change: Change, before: Peer, after: Peer) -> None:
    """Update the fields that don't concern the hub; state and generation stay as they are."""
    row = connection.execute(_DETAILS, {"name": before.node_id}).mappings().first()
    if row is None:
        change.refusal = PeerNotFoundError(before.node_id)
        return
    # Memory doesn't keep them: without them `take_back` could not write them back.
    change.before = replace(before, **row)
    _update(connection, after)


def _update(connection: sa.Connection, peer: Peer) -> None:
    values = {column.name: getattr(peer, column.name) for column in _ALTERABLE}
    connection.execute(sa.update(peers).where(peers.c.node_id == peer.node_id).values(values))


def _row(peer: Peer, hub: int, generation: int, state: PeerState) -> dict[str, Any]:
    return {
        "hub": hub,
        "node_id": peer.node_id,
        "wireguard_public_key": peer.wireguard_public_key,
        "assigned_ip": str(peer.address),
        "public_key": peer.public_key,
        "provisioned_at": peer.provisioned_at,
        "version": peer.version,
        "capabilities": peer.capabilities or {},
        "metadata": peer.metadata,
        "token_id": peer.token_id,
        "state": state,
        "generation": generation,
    }


def _refusal(connection: sa.Connection, hub: int, peer: Peer) -> ProvisioningError:
    """Return the error for the constraint that refused a peer."""
    address_taken = sa.select(peers.c.node_id).where(
        peers.c.hub == hub,
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
