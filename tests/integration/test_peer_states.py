"""The states of a peer's row, from its commit until the hub is known to have reached it."""

from datetime import UTC, datetime

import pytest
import sqlalchemy as sa

from backend.adapters.records import tables
from backend.adapters.records.database import Database
from backend.adapters.records.unit_of_work import SqlRecords
from backend.errors import (
    AddressTakenError,
    DuplicatePeerError,
    KeyTakenError,
    PeerNotFoundError,
    RecordsUnavailableError,
)
from backend.models.access.audit import AuditAction, AuditOutcome
from backend.models.access.callers import SERVICE
from backend.models.wireguard.peer import Change, Peer, PeerState
from backend.models.wireguard.records import NewGeneration
from tests.harness.records import adding, altering, removing, states

PENDING, ACTIVE, REMOVING = PeerState.PENDING, PeerState.ACTIVE, PeerState.REMOVING


@pytest.fixture
def peer(records: SqlRecords) -> Peer:
    """Return a peer that the hub has."""
    change = adding("node-1", "10.0.0.2")
    records.commit(1, 0, [change])
    records.note_observed(1)
    return change.peer


def successors(peer: Peer) -> list[Change]:
    """Return a peer with the name, one with the key and one with the address of another."""
    return [
        adding(peer.node_id, "10.0.0.10"),
        adding("node-11", "10.0.0.11", peer.wireguard_public_key),
        adding("node-12", str(peer.address)),
    ]


def said(database: Database) -> list[tuple[object, ...]]:
    """Return what each node says of itself, as the records have it."""
    columns = [tables.peers.c[name] for name in ("node_id", "version", "capabilities", "metadata")]
    with database.engine.connect() as connection:
        return [tuple(row) for row in connection.execute(sa.select(*columns).order_by("node_id"))]


def refusals(changes: list[Change]) -> list[type]:
    return [type(change.refusal) for change in changes]


def tombstones(database: Database) -> dict[str, int]:
    """Return the generation that removed each node."""
    with database.engine.connect() as connection:
        rows = connection.execute(
            sa.select(tables.removed_peers.c.node_id, tables.removed_peers.c.generation)
        )
        return {row.node_id: row.generation for row in rows}


def test_an_added_peer_is_pending_until_the_hub_has_it(records: SqlRecords, database: Database) -> None:
    change = adding("node-1", "10.0.0.2")
    records.commit(1, 0, [change])
    assert states(database) == {"node-1": PENDING}
    # The desired state has it all the same.
    assert list(records.load().peers) == [change.peer]
    records.commit(2, 1, [adding("node-2", "10.0.0.3")])
    records.note_observed(1)
    assert states(database) == {"node-1": ACTIVE, "node-2": PENDING}
    records.note_observed(2)
    assert states(database) == {"node-1": ACTIVE, "node-2": ACTIVE}


def test_a_removed_peer_keeps_name_key_and_address_until_the_hub_is_known_to_be_rid_of_it(
    records: SqlRecords, database: Database, peer: Peer
) -> None:
    records.commit(2, 1, [removing(peer)])
    assert states(database) == {"node-1": REMOVING}
    assert list(records.load().peers) == []
    # The hub has not reached generation 2.
    early = [*successors(peer), removing(peer)]
    records.commit(3, 1, early)
    assert refusals(early) == [DuplicatePeerError, KeyTakenError, AddressTakenError, PeerNotFoundError]
    assert states(database) == {"node-1": REMOVING}
    records.note_observed(3)
    assert states(database) == {}
    late = successors(peer)
    records.commit(4, 3, late)
    assert refusals(late) == [type(None)] * 3


@pytest.mark.parametrize("restarted", [False, True])
def test_name_key_and_address_of_a_removed_peer_are_free_in_the_next_commit(
    records: SqlRecords, database: Database, peer: Peer, restarted: bool
) -> None:
    records.commit(2, 1, [removing(peer)])
    if restarted:
        records = SqlRecords(database)
    changes = successors(peer)
    records.commit(3, 2, changes)
    assert refusals(changes) == [type(None)] * 3
    assert states(database) == dict.fromkeys(["node-1", "node-11", "node-12"], PENDING)


def test_name_key_and_address_are_free_after_a_hub_that_was_behind(records: SqlRecords, peer: Peer) -> None:
    """As at a start that could not bring the hub up to the records."""
    records.commit(2, 1, [removing(peer)])
    records.commit(3, 1, [])
    changes = successors(peer)
    records.commit(4, 3, changes)
    assert refusals(changes) == [type(None)] * 3


def test_name_key_and_address_are_free_after_a_commit_without_an_answer(
    records: SqlRecords, database: Database, peer: Peer
) -> None:
    def lose_the_answer(connection: sa.Connection) -> None:
        connection.connection.commit()
        raise sa.exc.OperationalError("COMMIT", None, Exception("no answer"))

    records.commit(2, 1, [])
    sa.event.listen(database.engine, "commit", lose_the_answer, once=True)
    with pytest.raises(RecordsUnavailableError):
        records.commit(3, 2, [removing(peer)])
    assert records.load().generation == 3
    changes = successors(peer)
    records.commit(4, 3, changes)
    assert refusals(changes) == [type(None)] * 3


def test_a_removed_peer_is_known_by_its_key_from_its_commit_on(
    records: SqlRecords, database: Database, peer: Peer
) -> None:
    asked = [peer.wireguard_public_key, adding("node-9", "10.0.0.9").peer.wireguard_public_key]
    assert records.removed_keys(asked) == set()
    records.commit(2, 1, [removing(peer)])
    assert (records.removed_keys(asked), tombstones(database)) == ({peer.wireguard_public_key}, {})
    records.note_observed(2)
    assert (records.removed_keys(asked), tombstones(database)) == ({peer.wireguard_public_key}, {"node-1": 2})


def test_compensating_puts_removed_peers_back_in_their_place_and_deletes_added_ones(
    records: SqlRecords, database: Database
) -> None:
    added = [adding(f"node-{number}", f"10.0.0.{number + 2}") for number in range(3)]
    records.commit(1, 0, added)
    records.note_observed(1)
    before, written = list(records.load().peers), said(database)
    changes = [
        removing(before[0]),
        removing(before[1]),
        adding("node-9", "10.0.0.9"),
        altering(before[2], version="2.0.0", capabilities={"cpu_cores": 8}, metadata=None),
    ]
    records.commit(2, 1, changes)
    assert states(database) == dict(
        zip(["node-0", "node-1", "node-2", "node-9"], [REMOVING, REMOVING, ACTIVE, PENDING], strict=True)
    )
    records.compensate(2, changes, "the device is on fire")
    assert list(records.load().peers) == before
    # With what memory doesn't keep of them.
    assert said(database) == written
    assert states(database) == dict.fromkeys(["node-0", "node-1", "node-2"], ACTIVE)
    # The hub may have it for a moment longer.
    assert tombstones(database) == {"node-9": 2}
    # And again, as if nothing had been.
    again = [adding("node-9", "10.0.0.9"), removing(before[0])]
    records.commit(3, 1, again)
    assert refusals(again) == [type(None)] * 2


def test_compensating_touches_no_earlier_generation(records: SqlRecords, database: Database) -> None:
    first = [adding("node-1", "10.0.0.2"), adding("node-2", "10.0.0.3")]
    records.commit(1, 0, first)
    records.commit(2, 1, [removing(first[0].peer)])
    changes = [adding("node-3", "10.0.0.4"), removing(first[1].peer)]
    # Their states stay as they are: the hub has not reached generation 2.
    records.commit(3, 1, changes)
    records.compensate(3, changes, "no")
    assert states(database)["node-1"] is REMOVING
    assert list(records.load().peers) == [first[1].peer]


def test_an_adopted_peer_may_have_the_name_or_the_address_of_one_that_was_just_removed(
    records: SqlRecords, database: Database
) -> None:
    named, addressed = adding("node-1", "10.0.0.2"), adding("node-2", "10.0.0.3")
    records.commit(1, 0, [named, addressed])
    records.commit(2, 1, [removing(named.peer), removing(addressed.peer)])
    adopted = [adding("node-1", "10.0.0.8").peer, adding("node-8", "10.0.0.3").peer]
    event = SERVICE.event(datetime.now(UTC), AuditAction.PEERS_ADOPTED, AuditOutcome.NOTED)
    records.adopt(NewGeneration(3, adopted, [], event))
    assert list(records.load().peers) == adopted
    assert states(database) == {"node-1": ACTIVE, "node-8": ACTIVE}
    assert tombstones(database).keys() == {"node-1", "node-2"}


def test_a_tombstone_goes_when_it_is_old_and_the_hub_is_rid_of_the_peer(
    records: SqlRecords, database: Database, peer: Peer
) -> None:
    unknown = adding("node-8", "10.0.0.8").peer
    records.commit(2, 1, [removing(peer)])
    records.note_observed(2)
    event = SERVICE.event(datetime.now(UTC), AuditAction.PEERS_REMOVED, AuditOutcome.NOTED)
    records.adopt(NewGeneration(3, [], [(unknown.wireguard_public_key, "node-8")], event))
    records.expire_tombstones()
    assert tombstones(database) == {"node-1": 2, "node-8": 3}
    with database.engine.begin() as connection:
        connection.execute(
            sa.update(tables.removed_peers).values(removed_at=datetime(2026, 1, 1, tzinfo=UTC))
        )
    records.expire_tombstones()
    assert tombstones(database) == {"node-8": 3}
    records.note_observed(3)
    records.expire_tombstones()
    assert tombstones(database) == {}
