"""The records of the peers, on both databases."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta, timezone
from pathlib import Path
from typing import Final

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from backend.adapters.records import tables
from backend.adapters.records.database import IN_MEMORY, Database
from backend.adapters.records.unit_of_work import SqlRecords
from backend.errors import (
    AddressTakenError,
    DuplicatePeerError,
    KeyTakenError,
    OvertakenError,
    PeerNotFoundError,
    RecordsUnavailableError,
)
from backend.models.wireguard.peer import Change, Peer, PeerState
from tests.harness.peers import NOON
from tests.harness.records import adding, altering, database_url, removing, states
from tests.harness.requests import new_key
from tests.harness.torture import tried

KEYS: Final = [new_key() for _ in range(6)]


@pytest.fixture(params=["file", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return database_url(request, tmp_path)


def rows(database: Database) -> list[dict[str, object]]:
    with database.engine.connect() as connection:
        found = connection.execute(sa.select(tables.peers).order_by(tables.peers.c.sequence))
        return [dict(row) for row in found.mappings()]


def three(records: SqlRecords) -> list[Peer]:
    """Add three peers, have the hub reach that, and return them."""
    changes = [adding(f"node-{number}", f"10.0.0.{number + 2}") for number in range(3)]
    records.commit(1, 0, changes)
    records.note_observed(1)
    return [change.peer for change in changes]


def test_peers_are_read_in_the_order_in_which_they_were_added(
    records: SqlRecords, database: Database
) -> None:
    # An order that no other column has.
    names = ["node-3", "node-1", "node-5", "node-2", "node-4"]
    changes = [adding(name, f"10.0.0.{2 + number * 7 % 5}") for number, name in enumerate(names)]
    records.commit(1, 0, changes)
    state = records.load()
    assert list(state.peers) == [change.peer for change in changes]
    assert (state.generation, state.observed_generation) == (1, 0)
    assert rows(database)[0]["metadata"] == {"nul": "\x00", "deep": [{"a": None}]}
    assert rows(database)[0]["provisioned_at"] == NOON


def test_peer_whose_removal_was_taken_back_is_read_in_its_old_place(records: SqlRecords) -> None:
    # A row that is written anew would be behind the others, and the file in another order after a restart.
    before = three(records)
    removal = removing(before[0])
    records.commit(2, 1, [removal])
    assert list(records.load().peers) == before[1:]
    records.compensate(2, [removal], "no")
    assert list(records.load().peers) == before


@pytest.fixture
def far_away(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Move host and server to where the clock shows nine hours more."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        patch.setenv("PGTZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


def test_a_time_is_read_as_it_was_written_wherever_host_and_server_are(far_away: None, url: str) -> None:
    database = Database(url)
    database.migrate()
    records = SqlRecords(database)
    west = NOON.astimezone(timezone(timedelta(hours=-5)))
    change = adding("node-1", "10.0.0.2")
    change.after = replace(change.peer, provisioned_at=west)
    records.commit(1, 0, [change])
    (peer,) = records.load().peers
    assert (peer.provisioned_at, peer.provisioned_at.utcoffset()) == (NOON, timedelta(0))
    database.close()


def test_migrating_again_changes_nothing(records: SqlRecords, database: Database) -> None:
    records.commit(1, 0, [adding("node-1", "10.0.0.2")])
    before = rows(database)
    database.migrate()
    assert rows(database) == before


def test_a_change_that_a_constraint_refuses_fails_alone(records: SqlRecords) -> None:
    first = adding("node-1", "10.0.0.2")
    records.commit(1, 0, [first])
    same_address = adding("node-2", "10.0.0.2")
    same_name = adding("node-1", "10.0.0.3")
    same_key = adding("node-3", "10.0.0.4", first.peer.wireguard_public_key)
    nobody = adding("nobody", "10.0.0.9").peer
    unknown, unaltered, fine = removing(nobody), altering(nobody, version="2"), adding("node-4", "10.0.0.5")
    changes = [same_address, same_name, same_key, unknown, unaltered, fine]
    records.commit(2, 1, changes)
    assert [type(change.refusal) for change in changes] == [
        AddressTakenError,
        DuplicatePeerError,
        KeyTakenError,
        PeerNotFoundError,
        PeerNotFoundError,
        type(None),
    ]
    assert list(records.load().peers) == [first.peer, fine.peer]


def test_compensating_leaves_the_peers_as_they_were(records: SqlRecords, database: Database) -> None:
    def said() -> list[dict[str, object]]:
        # Which generation touched a row last says nothing of an active peer.
        return [{**row, "generation": None} for row in rows(database)]

    peers = three(records)
    before = said()
    changes = [removing(peers[1]), adding("node-9", "10.0.0.9"), altering(peers[2], version="2.0.0")]
    records.commit(2, 1, changes)
    assert said() != before
    records.compensate(2, changes, "no")
    assert said() == before


def test_an_altered_peer_keeps_its_place_key_address_and_state(
    records: SqlRecords, database: Database
) -> None:
    peers = three(records)
    change = altering(
        peers[1], public_key="another", version="2.0.0", capabilities={"cpu_cores": 2}, metadata=None
    )
    records.commit(2, 1, [change])
    assert list(records.load().peers) == [peers[0], change.after, peers[2]]
    assert set(states(database).values()) == {PeerState.ACTIVE}


def test_a_generation_that_the_hub_has_reached_is_never_taken_back(records: SqlRecords) -> None:
    changes = [adding("node-1", "10.0.0.2")]
    records.commit(1, 0, changes)
    records.note_observed(1)
    records.compensate(1, changes, "too late")
    assert [peer.node_id for peer in records.load().peers] == ["node-1"]


def test_a_writer_that_has_been_overtaken_writes_nothing(records: SqlRecords, database: Database) -> None:
    records.commit(1, 0, [adding("node-1", "10.0.0.2")])
    for generation in (1, 3):
        with pytest.raises(OvertakenError, match="Another process"):
            records.commit(generation, 0, [adding("node-2", "10.0.0.3")])
    assert len(rows(database)) == 1


def test_the_observed_generation_never_goes_back(records: SqlRecords) -> None:
    for generation in (3, 2):
        records.note_observed(generation)
    assert records.load().observed_generation == 3


def test_each_hub_has_its_own_generations_and_addresses_and_names_and_keys_are_unique(
    records: SqlRecords, database: Database
) -> None:
    with database.engine.begin() as connection:
        connection.execute(
            sa.insert(tables.hubs).values(id=2, name="wg1", generation=0, observed_generation=0)
        )
    other = SqlRecords(database, 2)
    first = adding("node-1", "10.0.0.2")
    records.commit(1, 0, [first])
    fine = adding("node-2", "10.0.0.2")
    same_name = adding("node-1", "10.0.0.3")
    same_key = adding("node-3", "10.0.0.4", first.peer.wireguard_public_key)
    other.commit(1, 0, [fine, same_name, same_key])
    assert [type(change.refusal) for change in (fine, same_name, same_key)] == [
        type(None),
        DuplicatePeerError,
        KeyTakenError,
    ]
    other.note_observed(1)
    assert states(database) == {"node-1": PeerState.PENDING, "node-2": PeerState.ACTIVE}
    assert list(records.load().peers) == [first.peer]
    assert list(other.load().peers) == [fine.peer]
    assert (records.load().observed_generation, other.load().observed_generation) == (0, 1)
    other.commit(2, 1, [removing(fine.peer)])
    other.compensate(2, [removing(fine.peer)], "no")
    records.compensate(1, [first], "no")
    assert states(database) == {"node-2": PeerState.ACTIVE}


def test_a_database_that_went_away_is_named_and_nothing_else(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/records.sqlite")
    records = SqlRecords(database)
    try:
        with pytest.raises(RecordsUnavailableError, match="can't be read"):
            records.load()
        writes: list[Callable[[], None]] = [
            lambda: records.commit(1, 0, [adding("node-1", "10.0.0.2")]),
            lambda: records.compensate(1, [], "no"),
            lambda: records.note_observed(1),
        ]
        for write in writes:
            with pytest.raises(RecordsUnavailableError, match="can't be written"):
                write()
    finally:
        database.close()


@dataclass
class Model:
    """What the records hold, as plain dicts. A removed peer stays until the hub is known to be rid of it."""

    generation: int = 0
    # How far the hub has come, and how far the records know of that.
    observed: int = 0
    noted: int = 0
    # In their order.
    peers: dict[str, Peer] = field(default_factory=dict)
    # The generations that added and removed peers, as far as they are pending or removing.
    added: dict[str, int] = field(default_factory=dict)
    removed: dict[str, int] = field(default_factory=dict)

    def commit(self, changes: list[Change]) -> list[Change]:
        """Write a batch; return what a constraint refuses of it."""
        self.generation += 1
        self.noted = self.observed
        for name in [name for name, generation in self.removed.items() if generation <= self.observed]:
            self._delete(name)
        # Removals come first, so that a refused one is found by what was there before.
        refused = [change for change in changes if not change.adds and not self._is_there(change)]
        for change in changes:
            if change not in refused and change.removes:
                self.removed[change.peer.node_id] = self.generation
        for change in changes:
            if change.adds and not self._fits(change.peer):
                refused.append(change)
            elif change.adds:
                self.added[change.peer.node_id] = self.generation
            if change not in refused and change.after is not None:
                self.peers[change.after.node_id] = change.after
        return refused

    def compensate(self, changes: list[Change]) -> None:
        for change in changes:
            if change.before is None:
                self._delete(change.peer.node_id)
            else:
                self.peers[change.peer.node_id] = change.before
            if change.removes:
                del self.removed[change.peer.node_id]
                self.added.pop(change.peer.node_id, None)

    def note_observed(self) -> None:
        self.observed = self.noted = self.generation
        for name in list(self.removed):
            self._delete(name)
        self.added.clear()

    def desired(self) -> list[Peer]:
        return [peer for name, peer in self.peers.items() if name not in self.removed]

    def allows(self, name: str, state: PeerState) -> bool:
        """Say whether a row may be in this state."""
        if name in self.removed:
            return state is PeerState.REMOVING
        if name in self.added and self.added[name] <= self.observed:
            # A commit makes them active where it ends earlier removals.
            return state in {PeerState.PENDING, PeerState.ACTIVE}
        return state is (PeerState.PENDING if name in self.added else PeerState.ACTIVE)

    def _is_there(self, change: Change) -> bool:
        return change.peer.node_id in self.peers and change.peer.node_id not in self.removed

    def _fits(self, new: Peer) -> bool:
        return not any(
            new.node_id == peer.node_id
            or new.address == peer.address
            or new.wireguard_public_key == peer.wireguard_public_key
            for peer in self.peers.values()
        )

    def _delete(self, name: str) -> None:
        del self.peers[name]
        self.added.pop(name, None)
        self.removed.pop(name, None)


# What is done to a peer of a number, with which address and key, and what its node says.
CHANGES: Final = st.tuples(
    st.sampled_from(["add", "add", "remove", "alter"]),
    st.integers(0, 5),
    st.integers(0, 5),
    st.integers(0, 5),
)
STEPS: Final = st.one_of(
    st.tuples(st.lists(CHANGES, max_size=6), st.sampled_from(["apply", "compensate", "die"])),
    st.sampled_from(["observe", "restart"]),
)


def batch(model: Model, asked: list[tuple[str, int, int, int]]) -> list[Change]:
    """Return a batch with at most one change for each node, as the service has it."""
    changes: dict[str, Change] = {}
    for what, number, address, key in asked:
        name = f"node-{number}"
        new = adding(name, f"10.0.0.{address + 2}", KEYS[key])
        known = model.peers.get(name, new.peer)
        if name in changes or (what == "alter" and name in model.removed):
            continue
        if what == "add":
            changes[name] = new
        else:
            changes[name] = removing(known) if what == "remove" else altering(known, version=str(key))
    return list(changes.values())


@pytest.fixture(scope="module")
def memory() -> Iterator[Database]:
    database = Database(IN_MEMORY)
    database.migrate()
    yield database
    database.close()


@tried(100)
@given(steps=st.lists(STEPS, max_size=12))
def test_records_hold_what_plain_dicts_would(
    memory: Database, steps: list[str | tuple[list[tuple[str, int, int, int]], str]]
) -> None:
    database = memory
    with database.engine.begin() as connection:
        for table in (tables.peers, tables.removed_peers):
            connection.execute(sa.delete(table))
        connection.execute(sa.update(tables.hubs).values(generation=0, observed_generation=0))
    records, model = SqlRecords(database), Model()
    for step in steps:
        if step == "observe":
            model.note_observed()
            records.note_observed(model.generation)
        elif isinstance(step, tuple):
            changes = batch(model, step[0])
            refused = model.commit(changes)
            records.commit(model.generation, model.observed, changes)
            assert [change for change in changes if change.refusal is not None] == [
                change for change in changes if change in refused
            ]
            accepted = [change for change in changes if change not in refused]
            if step[1] == "apply":
                model.observed = model.generation
            elif step[1] == "compensate":
                model.compensate(accepted)
                records.compensate(model.generation, accepted, "no")
        if step == "restart" or (isinstance(step, tuple) and step[1] == "die"):
            records, model.observed = SqlRecords(database), model.noted
        state = records.load()
        assert list(state.peers) == model.desired()
        assert (state.generation, state.observed_generation) == (model.generation, model.noted)
        found = states(database)
        assert list(found) == list(model.peers)
        assert [name for name in found if not model.allows(name, found[name])] == []
