"""Work as DBOS workflows: its exception reaches the caller, and recovery leaves running work alone."""

import base64
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from dbos import DBOS
from dbos._dbos import _get_dbos_instance
from dbos._sys_db import db_retry

from backend.adapters import durable_workflow
from backend.adapters.durable_workflow import APPLICATION_VERSION, DurableWorkflow
from backend.adapters.records import peers
from backend.adapters.records.database import Database
from backend.adapters.records.unit_of_work import SqlRecords
from backend.errors import OvertakenError, RecordsUnavailableError, StartRefusedError
from tests.harness.patience import eventually
from tests.harness.records import adding, database_url


@pytest.fixture(params=["file", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return database_url(request, tmp_path)


class Running:
    """A workflow beside its records, as a process has them."""

    def __init__(self, url: str) -> None:
        self.database = Database(url)
        self.database.migrate()
        self.records = SqlRecords(self.database)
        self.workflow = DurableWorkflow(self.database, "wg0")

    def run(self, *generations: int) -> None:
        """Commit batches of one peer each, as one workflow."""
        self.workflow.run(lambda: self.commit(*generations))

    def commit(self, *generations: int) -> None:
        for number in generations:
            change = adding(f"node-{number}", f"10.0.0.{number + 1}")
            self.records.commit(number, number - 1, [change])

    def nodes(self) -> list[str]:
        return [peer.node_id for peer in self.records.load().peers]

    def close(self) -> None:
        self.workflow.close()
        self.database.close()


class Open:
    """Opens one after the other on one database, as processes do."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._running: Running | None = None

    def __call__(self) -> Running:
        self.close()
        self._running = Running(self._url)
        self._running.workflow.launch()
        return self._running

    def close(self) -> None:
        if self._running is not None:
            self._running.close()
        self._running = None


@pytest.fixture
def open_workflow(url: str) -> Iterator[Open]:
    opened = Open(url)
    yield opened
    opened.close()


def fail_at_commit(*_: object) -> None:
    raise sa.exc.OperationalError("INSERT INTO peers", None, Exception("the server went away"))


def test_an_exception_of_the_work_reaches_the_caller(
    open_workflow: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were it swallowed, every change of the batch would be answered with success and be in no record."""
    service = open_workflow()
    # Nothing is written: the database fails.
    with monkeypatch.context() as patch:
        patch.setattr(peers, "write", fail_at_commit)
        with pytest.raises(RecordsUnavailableError):
            service.run(1)
    assert service.nodes() == []
    # Nothing is written: another process has taken that generation.
    with pytest.raises(OvertakenError):
        service.run(7)
    assert service.nodes() == []

    def commit_and_fail() -> None:
        service.commit(1)
        raise ZeroDivisionError("unforeseen")

    # It is written, and the hub's side fails.
    with pytest.raises(ZeroDivisionError, match="unforeseen"):
        service.workflow.run(commit_and_fail)
    # The second batch of a burst fails.
    with pytest.raises(OvertakenError):
        service.run(2, 9)

    def compensate() -> None:
        change = adding("node-3", "10.0.0.4")
        service.records.commit(3, 2, [change])
        service.records.compensate(3, [change], "the interface refused it")

    # It can't be taken back.
    with monkeypatch.context() as patch:
        patch.setattr(peers, "take_back", fail_at_commit)
        with pytest.raises(RecordsUnavailableError):
            service.workflow.run(compensate)
    # An exception belongs to one run: the next one ends well.
    service.run(4)
    assert service.nodes() == ["node-1", "node-2", "node-3", "node-4"]


def test_the_database_keeps_no_words_of_an_exception(open_workflow: Open, url: str) -> None:
    """A driver's error carries a row's values."""

    def fail() -> None:
        raise ValueError("sesame")

    with pytest.raises(ValueError, match="sesame"):
        open_workflow().workflow.run(fail)
    with dbos_tables(url) as connection:
        for table in ("workflow_status", "operation_outputs"):
            assert "sesame" not in str(connection.exec_driver_sql(f"SELECT * FROM {table}").all())  # noqa: S608 - our own


def test_a_burst_of_batches_is_one_workflow_that_ends_and_is_deleted(
    open_workflow: Open, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = open_workflow()

    def compensate() -> None:
        change = adding("node-2", "10.0.0.3")
        service.records.commit(2, 1, [change])
        service.records.compensate(2, [change], "no")

    def burst() -> None:
        service.commit(1)
        compensate()

    service.workflow.run(burst)
    service.workflow.run(lambda: service.commit(3))
    assert service.nodes() == ["node-1", "node-3"]
    state = service.records.load()
    # How far the hub has come is noted with the next commit.
    assert (state.generation, state.observed_generation) == (3, 2)

    def workflows() -> list[tuple[str, ...]]:
        with dbos_tables(url) as connection:
            rows = connection.exec_driver_sql(
                "SELECT status, executor_id, application_version FROM workflow_status"
            )
            return [tuple(row) for row in rows]

    # A later process recovers those that have the same two names.
    assert workflows() == [("SUCCESS", "wg0", "2")] * 2
    service.workflow.delete_finished()
    assert len(workflows()) == 2
    monkeypatch.setattr(durable_workflow, "_KEEP_FINISHED", timedelta(seconds=-60))
    service.workflow.delete_finished()
    assert workflows() == []


def test_dbos_hands_the_loss_of_its_database_on_instead_of_waiting(open_workflow: Open) -> None:
    """A release of DBOS that names this otherwise would keep the one writing thread for a minute or more."""
    attempts: list[int] = []

    @db_retry(initial_backoff=30.0, sys_db=None)
    def ask(_: object) -> None:
        attempts.append(1)
        raise sa.exc.OperationalError(
            None, None, psycopg.OperationalError("gone"), connection_invalidated=True
        )

    open_workflow()
    system_database = _get_dbos_instance()._sys_db
    assert system_database._retry_connection_errors is False
    with pytest.raises(sa.exc.OperationalError):
        ask(system_database)
    assert attempts == [1]


def test_a_second_service_in_a_process_does_not_run_in_the_first_ones_dbos(
    open_workflow: Open, tmp_path: Path
) -> None:
    """It kept its workflows in the first one's database, and couldn't write any more when that one ended."""
    first = open_workflow()
    second = Open(f"sqlite:///{tmp_path}/second/records.sqlite")
    with pytest.raises(StartRefusedError, match="runs once in a process"):
        second()
    second.close()
    # None the worse for it.
    first.run(1)
    assert first.nodes() == ["node-1"]
    open_workflow.close()
    third = second()
    third.run(1)
    assert third.nodes() == ["node-1"]
    second.close()


def test_an_app_that_has_a_dbos_of_its_own_keeps_it(open_workflow: Open, tmp_path: Path) -> None:
    """Ours would run in its database, and at the end destroy it."""
    theirs = DBOS(config={"name": "theirs", "system_database_url": f"sqlite:///{tmp_path}/theirs.sqlite"})
    try:
        with pytest.raises(StartRefusedError, match="runs once in a process"):
            open_workflow()
        open_workflow.close()
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


def test_a_recovered_workflow_does_no_work_of_a_running_one(open_workflow: Open, url: str) -> None:
    """Two threads would write the records, the file and the interface at the same time."""
    open_workflow().run(1)
    open_workflow.close()
    leave_unfinished(url)
    (earlier,) = statuses(url)
    service = open_workflow()
    threads: list[int] = []

    def work() -> None:
        threads.append(threading.get_ident())
        # The recovered one comes to its end while this one runs.
        eventually(lambda: statuses(url)[earlier] == "SUCCESS")
        service.commit(2, 3)

    service.workflow.run(work)
    assert threads == [threading.get_ident()]
    assert service.nodes() == ["node-1", "node-2", "node-3"]


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, made: Path) -> None:
        self._made = made

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return (os.mkdir, (str(self._made),))


def plant(url: str, made: Path, **values: object) -> str:
    """Write a workflow with pickled inputs into DBOS's tables, as any role with INSERT on them can."""
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


def test_a_pickle_inserted_into_the_queue_runs_no_code(open_workflow: Open, url: str, tmp_path: Path) -> None:
    service = open_workflow()
    planted = [
        plant(
            url, tmp_path / name, status="ENQUEUED", queue_name="_dbos_internal_queue", serialization=decoder
        )
        for name, decoder in (("named", "py_pickle"), ("unnamed", None))
    ]
    eventually(lambda: [statuses(url)[workflow] for workflow in planted] == ["ERROR", "ERROR"])
    assert not (tmp_path / "named").exists()
    assert not (tmp_path / "unnamed").exists()
    service.run(1)
    assert service.nodes() == ["node-1"]


def test_pickles_of_earlier_versions_are_deleted_and_never_read(
    open_workflow: Open, url: str, tmp_path: Path
) -> None:
    open_workflow().run(1)
    open_workflow.close()
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
    service = open_workflow()
    assert {planted, ended}.isdisjoint(statuses(url))
    with dbos_tables(url) as connection:
        left = connection.exec_driver_sql("SELECT inputs FROM workflow_input").scalars().all()
    # This version's own stays for a look.
    assert [text for text in left if not text.startswith("{")] == []
    assert len(left) == 1
    service.run(2)
    assert service.nodes() == ["node-1", "node-2"]
    assert not made.exists()
