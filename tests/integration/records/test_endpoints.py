"""The endpoints that peers were seen at last, in each kind of database."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa

from backend.adapters.records import tables
from backend.adapters.records.database import Database
from backend.adapters.records.unit_of_work import SqlRecords
from backend.models.wireguard.health import RecordedEndpoint
from tests.harness.peers import NOON
from tests.harness.records import adding, removing
from tests.harness.requests import new_key

HOME = RecordedEndpoint("198.51.100.7:51820", NOON)
# The longest that `wg` prints.
AWAY = RecordedEndpoint("[fe80:1111:2222:3333:4444:5555:6666:7777%abcdefghijklmno]:65535", NOON)


def test_the_last_endpoint_of_each_peer_is_kept(records: SqlRecords) -> None:
    first, second = adding("node-1", "10.0.0.2"), adding("node-2", "10.0.0.3")
    records.commit(1, 0, [first, second])
    keys = [change.peer.wireguard_public_key for change in (first, second)]
    assert records.load_endpoints() == {}
    records.save_endpoints({keys[0]: HOME, keys[1]: AWAY})
    assert records.load_endpoints() == {keys[0]: HOME, keys[1]: AWAY}
    later = replace(HOME, seen_at=NOON + timedelta(hours=1))
    records.save_endpoints({keys[1]: later})
    assert records.load_endpoints() == {keys[0]: HOME, keys[1]: later}


def test_an_endpoint_that_another_process_has_seen_since_is_not_overwritten(records: SqlRecords) -> None:
    """A process that was overtaken still writes what it knows, when it stops."""
    change = adding("node-1", "10.0.0.2")
    records.commit(1, 0, [change])
    key = change.peer.wireguard_public_key
    records.save_endpoints({key: HOME})
    records.save_endpoints({key: replace(AWAY, seen_at=NOON - timedelta(seconds=1))})
    assert records.load_endpoints() == {key: HOME}
    # From a clock that was wrong.
    future = replace(HOME, seen_at=datetime.now(UTC) + timedelta(days=1))
    records.save_endpoints({key: future})
    records.save_endpoints({key: AWAY})
    assert records.load_endpoints() == {key: AWAY}


def test_the_endpoint_of_an_unknown_key_is_passed_over(records: SqlRecords) -> None:
    change = adding("node-1", "10.0.0.2")
    records.commit(1, 0, [change])
    records.save_endpoints({new_key(): HOME, change.peer.wireguard_public_key: AWAY})
    assert records.load_endpoints() == {change.peer.wireguard_public_key: AWAY}


def test_an_endpoint_goes_with_its_peer_and_does_not_keep_it(records: SqlRecords, database: Database) -> None:
    change = adding("node-1", "10.0.0.2")
    records.commit(1, 0, [change])
    records.save_endpoints({change.peer.wireguard_public_key: HOME})
    records.commit(2, 1, [removing(change.peer)])
    records.note_observed(2)
    with database.engine.connect() as connection:
        for table in (tables.peers, tables.peer_endpoints):
            assert connection.scalar(sa.select(sa.func.count()).select_from(table)) == 0


def test_another_hubs_endpoints_are_not_read(records: SqlRecords, database: Database) -> None:
    change = adding("node-1", "10.0.0.2")
    records.commit(1, 0, [change])
    records.save_endpoints({change.peer.wireguard_public_key: HOME})
    assert SqlRecords(database, 2).load_endpoints() == {}
    SqlRecords(database, 2).save_endpoints({change.peer.wireguard_public_key: AWAY})
    assert records.load_endpoints() == {change.peer.wireguard_public_key: HOME}
