"""What the audit writer writes, when, and what it keeps while the records are away."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from backend.errors import RecordsUnavailableError
from backend.models.access.audit import AuditAction, AuditEvent, AuditOutcome, AuditQuery, AuditRecord
from backend.services.access.audit_writer import AuditWriter
from tests.harness.fakes import FakeAccessStore

NOON = datetime(2026, 2, 19, 12, tzinfo=UTC)
SOMEWHERE = "192.0.2.1"


class WatchedStore(FakeAccessStore):
    """Counts writes."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = 0

    def write(self, events: Sequence[AuditEvent], used: Mapping[str, datetime]) -> None:
        self.writes += 1
        super().write(events, used)


@pytest.fixture
def store() -> WatchedStore:
    return WatchedStore()


@pytest.fixture
def writer(store: WatchedStore) -> AuditWriter:
    return AuditWriter(store)


def event(subject: str | None = None, **over: Any) -> AuditEvent:
    base = AuditEvent(NOON, AuditAction.AUTHENTICATE, AuditOutcome.REFUSED, "nobody", subject)
    return replace(base, **over)


def test_one_event_is_one_row_as_it_was(writer: AuditWriter, store: WatchedStore) -> None:
    whole = event("node-1", source=SOMEWHERE, request_id="r-1", reason="unknown")
    writer.note(whole)
    writer.flush()
    assert store.events == [whole]
    writer.flush()
    assert store.events == [whole]


def test_hundred_equal_refusals_are_counted_in_one_row(writer: AuditWriter, store: WatchedStore) -> None:
    for number in range(100):
        writer.note(event("node-1", at=NOON + timedelta(milliseconds=number), request_id=f"r-{number}"))
    writer.flush()
    # At the time of the first; whose request it was would be true of one alone.
    assert store.events == [event("node-1", count=100)]


@pytest.mark.parametrize("field", ["actor", "source", "reason", "action", "outcome"])
def test_different_events_have_rows_of_their_own(
    writer: AuditWriter, store: WatchedStore, field: str
) -> None:
    other: dict[str, Any] = {"action": AuditAction.PROVISION, "outcome": AuditOutcome.NOTED}
    writer.note(event())
    writer.note(event(**{field: other.get(field, "other")}))
    writer.note(event())
    writer.flush()
    assert [row.count for row in store.events] == [2, 1]


def test_notice_is_logged_as_the_services_own(writer: AuditWriter, store: WatchedStore) -> None:
    writer.notice(AuditAction.CONFIG_EDITED, "our own blocks")
    writer.close()
    (row,) = store.events
    assert (row.actor, row.outcome, row.reason) == ("service", AuditOutcome.NOTED, "our own blocks")


def test_nothing_noted_is_nothing_written(writer: AuditWriter, store: WatchedStore) -> None:
    """It would be a transaction each second, and a sync of the disk."""
    writer.flush()
    assert store.writes == 0
    writer.note(event("node-1"))
    for _ in range(3):
        writer.flush()
    assert store.writes == 1
    writer.note_used("key", NOON)
    writer.flush()
    assert store.used == {"key": NOON}
    assert store.writes == 2


def test_records_that_are_away_lose_nothing_and_make_no_more_rows_of_it(
    writer: AuditWriter, store: WatchedStore
) -> None:
    store.away = True
    for turn in range(20):
        for number in range(300):
            writer.note(event(f"node-{turn}-{number}", source=SOMEWHERE))
        writer.note_used("key", NOON + timedelta(seconds=turn))
        with pytest.raises(RecordsUnavailableError):
            writer.flush()
    assert store.events == []
    store.away = False
    writer.flush()
    assert sum(row.count for row in store.events) == 20 * 300
    assert len(store.events) <= 100 + 2
    assert store.used == {"key": NOON + timedelta(seconds=19)}


def test_use_during_a_failed_write_is_kept() -> None:
    class Interrupted(FakeAccessStore):
        writer: AuditWriter
        interrupts = True

        def write(self, events: Sequence[AuditEvent], used: Mapping[str, datetime]) -> None:
            if self.interrupts:
                self.interrupts = False
                self.writer.note_used("key", NOON + timedelta(seconds=1))
                raise RecordsUnavailableError("away")
            super().write(events, used)

    store = Interrupted()
    writer = store.writer = AuditWriter(store)
    writer.note_used("key", NOON)
    with pytest.raises(RecordsUnavailableError):
        writer.flush()
    writer.flush()
    assert store.used == {"key": NOON + timedelta(seconds=1)}


def test_failed_write_is_made_up_for_at_the_end(writer: AuditWriter, store: WatchedStore) -> None:
    writer.note(event("node-1"))
    writer.note_used("key", NOON)
    store.away = True
    with pytest.raises(RecordsUnavailableError):
        writer.flush()
    writer.note_used("key", NOON + timedelta(seconds=1))
    store.away = False
    writer.close()
    assert store.events == [event("node-1")]
    assert store.used == {"key": NOON + timedelta(seconds=1)}


def test_records_that_are_away_at_the_end_do_not_keep_the_process(
    writer: AuditWriter, store: WatchedStore
) -> None:
    writer.note(event("node-1"))
    store.away = True
    writer.close()
    assert store.events == []


def test_failure_that_is_none_of_the_records_is_not_hidden() -> None:
    """Only records that are away are waited for."""

    class Broken(FakeAccessStore):
        def write(self, events: Sequence[AuditEvent], used: Mapping[str, datetime]) -> None:
            raise ZeroDivisionError

    writer = AuditWriter(Broken())
    writer.note(event("node-1"))
    with pytest.raises(ZeroDivisionError):
        writer.flush()


class PagedStore(FakeAccessStore):
    """Shows what was written, as pages of the log do."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def write(self, events: Sequence[AuditEvent], used: Mapping[str, datetime]) -> None:
        self.begun.set()
        self.go_on.wait(10)
        super().write(events, used)

    def audit_page(self, query: AuditQuery) -> list[AuditRecord]:
        rows = enumerate(self.events[-query.limit :], start=1)
        return [AuditRecord(sequence, row, "", "") for sequence, row in rows]


def test_page_shows_what_was_noted_a_moment_ago() -> None:
    writer = AuditWriter(PagedStore())
    writer.note(event("node-1"))
    assert [row.event for row in writer.page(AuditQuery(limit=10))] == [event("node-1")]


def test_page_waits_for_rows_that_another_thread_is_writing() -> None:
    store = PagedStore()
    store.go_on.clear()
    writer = AuditWriter(store)
    writer.note(event("node-1"))
    flushing = threading.Thread(target=writer.flush)
    flushing.start()
    assert store.begun.wait(10)
    seen: list[AuditRecord] = []
    reading = threading.Thread(target=lambda: seen.extend(writer.page(AuditQuery(limit=10))))
    reading.start()
    reading.join(0.2)
    store.go_on.set()
    flushing.join(10)
    reading.join(10)
    assert [row.event for row in seen] == [event("node-1")]


def test_page_is_shown_while_the_records_can_only_be_read() -> None:
    store = PagedStore()
    store.events.append(event("node-1"))
    writer = AuditWriter(store)
    writer.note(event("node-2"))
    store.away = True
    assert [row.event for row in writer.page(AuditQuery(limit=10))] == [event("node-1")]
