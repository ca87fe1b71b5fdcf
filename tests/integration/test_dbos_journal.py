"""The durable journal: a burst's exception reaches the caller, and recovery leaves a running burst alone."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
import sqlalchemy as sa

from backend.adapters import records
from backend.adapters.database import Database
from backend.adapters.dbos_journal import DbosJournal
from backend.errors import OvertakenError, RecordsUnavailableError
from backend.services.ports import Batch
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
        patch.setattr(records, "write_intent", fail_at_commit)
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
        patch.setattr(records, "revoke_intent", fail_at_commit)
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


def leave_unfinished(url: str) -> None:
    """Make the workflows on record look as those of a process that died in the middle of them."""
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql("SET search_path TO dbos")
        connection.exec_driver_sql("DELETE FROM operation_outputs")
        connection.exec_driver_sql("UPDATE workflow_status SET status = 'PENDING', output = NULL")
    engine.dispose()


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
