"""The durable journal: a burst's exception reaches the caller, and recovery leaves a running burst alone."""

import base64
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
import sqlalchemy as sa
from dbos import DBOS

from backend.adapters.dbos_journal import APPLICATION_VERSION, DbosJournal
from backend.adapters.records import tables
from backend.adapters.records.database import Database
from backend.errors import OvertakenError, RecordsUnavailableError, StartRefusedError
from backend.services.ports import Batch
from tests.harness.patience import eventually
from tests.integration.test_records import adding

WAIT: Final = 20.0

Apply = Callable[["Batch | None"], "str | None"]


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/state/records.sqlite"
    address: str = request.getfixturevalue("postgres_database")
    return address


class Open:
    """Opens journals on one database, one after the other, as processes do."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._journal: DbosJournal | None = None

    def __call__(self, apply: Apply) -> DbosJournal:
        self.close()
        database = Database(self._url)
        database.migrate()
        self._journal = DbosJournal(database, "wg0")
        self._journal.launch(apply)
        return self._journal

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
        self._journal = None


@pytest.fixture
def open_journal(url: str) -> Iterator[Open]:
    opened = Open(url)
    yield opened
    opened.close()


def batch(generation: int) -> Batch:
    node_id, address = f"node-{generation}", f"10.0.0.{generation + 1}"
    return Batch(generation, generation - 1, [adding(node_id, address)])


def nodes(journal: DbosJournal) -> list[str]:
    return [peer.node_id for peer in journal.load().peers]


def fail_at_commit(*_: object) -> None:
    raise sa.exc.OperationalError("INSERT INTO peers", None, Exception("the server went away"))


def test_an_exception_of_the_burst_reaches_the_caller(
    open_journal: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were it swallowed, every change of the batch would be answered with success and be in no record."""
    unforeseen = ZeroDivisionError("unforeseen")
    outcome: list[str | Exception | None] = []

    def apply(_: Batch | None) -> str | None:
        result = outcome.pop()
        if isinstance(result, Exception):
            raise result
        return result

    journal = open_journal(apply)

    def run(*batches: Batch) -> None:
        journal.run(iter([*batches, None]).__next__)

    # Nothing is written: the database fails.
    with monkeypatch.context() as patch:
        patch.setattr(tables, "write_intent", fail_at_commit)
        with pytest.raises(RecordsUnavailableError):
            run(batch(1))
    assert nodes(journal) == []
    # Nothing is written: another process has taken that generation.
    with pytest.raises(OvertakenError):
        run(batch(7))
    assert nodes(journal) == []
    # It is written, and the hub's side fails.
    outcome.append(unforeseen)
    with pytest.raises(ZeroDivisionError):
        run(batch(1))
    # The second batch of a burst fails.
    outcome.append(None)
    with pytest.raises(OvertakenError):
        run(batch(2), batch(9))
    # It can't be taken back.
    with monkeypatch.context() as patch:
        patch.setattr(tables, "revoke_intent", fail_at_commit)
        outcome.append("the interface refused it")
        with pytest.raises(RecordsUnavailableError):
            run(batch(3))

    # The next batch of the next burst fails itself.
    def fail_to_take() -> Batch | None:
        raise unforeseen

    with pytest.raises(ZeroDivisionError):
        journal.run(fail_to_take)
    # An exception is the burst's own: the next one is none the worse for it.
    outcome.append(None)
    run(batch(4))
    assert nodes(journal) == ["node-1", "node-2", "node-3", "node-4"]


def test_a_second_service_in_a_process_does_not_run_in_the_first_ones_dbos(
    open_journal: Open, tmp_path: Path
) -> None:
    """It kept its workflows in the first one's database, and couldn't write any more when that one ended."""
    first = open_journal(lambda _: None)
    second = Open(f"sqlite:///{tmp_path}/second/records.sqlite")
    with pytest.raises(StartRefusedError, match="runs once in a process"):
        second(lambda _: None)
    second.close()
    # None the worse for it.
    first.run(iter([batch(1), None]).__next__)
    assert nodes(first) == ["node-1"]
    open_journal.close()
    third = second(lambda _: None)
    third.run(iter([batch(1), None]).__next__)
    assert nodes(third) == ["node-1"]
    second.close()


def test_an_app_that_has_a_dbos_of_its_own_keeps_it(open_journal: Open, tmp_path: Path) -> None:
    """Ours would run in its database, and at the end destroy it."""
    theirs = DBOS(config={"name": "theirs", "system_database_url": f"sqlite:///{tmp_path}/theirs.sqlite"})
    try:
        with pytest.raises(StartRefusedError, match="runs once in a process"):
            open_journal(lambda _: None)
        open_journal.close()
        assert DBOS(config={"name": "ours"}) is theirs
    finally:
        DBOS.destroy(destroy_registry=True)


@contextmanager
def dbos_tables(url: str) -> Iterator[sa.Connection]:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql("SET search_path TO dbos")
        yield connection
    engine.dispose()


def leave_unfinished(url: str) -> None:
    """Make the workflows on record look as those of a process that died in the middle of them."""
    with dbos_tables(url) as connection:
        connection.exec_driver_sql("DELETE FROM operation_outputs")
        connection.exec_driver_sql("UPDATE workflow_status SET status = 'PENDING', output = NULL")


def test_a_recovered_workflow_takes_no_batch_of_a_running_burst(open_journal: Open, url: str) -> None:
    """Two threads would write the records, the file and the interface at the same time."""
    first = open_journal(lambda _: None)
    first.run(iter([batch(1), None]).__next__)
    open_journal.close()
    leave_unfinished(url)

    recovered = threading.Event()
    waiting = [batch(2), batch(3)]
    taken: list[tuple[int, int]] = []

    def apply(applied: Batch | None) -> str | None:
        if applied is None:
            # All that is left to a workflow of an earlier process: to see that the hub is up to the records.
            recovered.set()
        else:
            assert recovered.wait(WAIT)
        return None

    def take() -> Batch | None:
        thread = threading.get_ident()
        if taken and thread != taken[0][0]:
            recovered.set()
        taken.append((thread, len(waiting)))
        return waiting.pop(0) if waiting else None

    second = open_journal(apply)
    second.run(take)
    assert taken == [(threading.get_ident(), left) for left in (2, 1, 0)]
    assert recovered.is_set()
    assert nodes(second) == ["node-1", "node-2", "node-3"]


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, made: Path) -> None:
        self._made = made

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return (os.mkdir, (str(self._made),))


def plant(url: str, made: Path, **values: object) -> str:
    """Write a workflow with pickled inputs into DBOS's tables, as whoever may INSERT there can."""
    row = {
        "workflow_uuid": f"planted-{made.name}",
        "name": "commit_burst",
        "recovery_attempts": 0,
        "priority": 0,
        "created_at": 1,
        "updated_at": 1,
        **values,
    }
    pickled = base64.b64encode(pickle.dumps(Malicious(made))).decode()
    payload = {"workflow_uuid": row["workflow_uuid"], "inputs": pickled, "retention_timestamp": 1}
    with dbos_tables(url) as connection:
        for name, planted in (("workflow_status", row), ("workflow_input", payload)):
            table = sa.table(name, *map(sa.column, planted))
            connection.execute(sa.insert(table).values(planted))
    return str(row["workflow_uuid"])


def statuses(url: str) -> dict[str, str]:
    with dbos_tables(url) as connection:
        rows = connection.exec_driver_sql("SELECT workflow_uuid, status FROM workflow_status")
        return {row[0]: row[1] for row in rows}


def test_a_pickle_inserted_into_the_queue_runs_no_code(open_journal: Open, url: str, tmp_path: Path) -> None:
    journal = open_journal(lambda _: None)
    planted = [
        plant(
            url, tmp_path / name, status="ENQUEUED", queue_name="_dbos_internal_queue", serialization=decoder
        )
        for name, decoder in (("named", "py_pickle"), ("unnamed", None))
    ]
    eventually(lambda: [statuses(url)[workflow] for workflow in planted] == ["ERROR", "ERROR"])
    assert not (tmp_path / "named").exists()
    assert not (tmp_path / "unnamed").exists()
    journal.run(iter([batch(1), None]).__next__)
    assert nodes(journal) == ["node-1"]


def test_pickles_of_earlier_versions_are_deleted_and_never_read(
    open_journal: Open, url: str, tmp_path: Path
) -> None:
    open_journal(lambda _: None).run(iter([batch(1), None]).__next__)
    open_journal.close()
    made = tmp_path / "made"
    # What recovery would take up, and what has ended.
    earlier = {
        "executor_id": "wg0",
        "application_version": APPLICATION_VERSION,
        "serialization": "py_pickle",
    }
    planted = plant(url, made, status="PENDING", **earlier)
    ended = plant(url, tmp_path / "ended", status="SUCCESS", **earlier)
    assert {planted, ended} < set(statuses(url))
    journal = open_journal(lambda _: None)
    assert {planted, ended}.isdisjoint(statuses(url))
    with dbos_tables(url) as connection:
        left = connection.exec_driver_sql("SELECT inputs FROM workflow_input").scalars().all()
    # This version's own stays for a look.
    assert [text for text in left if not text.startswith("{")] == []
    assert len(left) == 1
    journal.run(iter([batch(2), None]).__next__)
    assert nodes(journal) == ["node-1", "node-2"]
    assert not made.exists()
