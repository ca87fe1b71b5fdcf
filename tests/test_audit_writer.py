"""The thread beside the requests: when it writes and tidies up, and how it ends."""

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta

import pytest

from backend.models.access.audit import AuditAction, AuditEvent, AuditOutcome
from backend.services.access import audit_writer as clerk_module
from backend.services.access.audit_writer import Clerk
from tests.harness.fakes import FakeAccessStore
from tests.harness.patience import eventually

NOON = datetime(2026, 2, 19, 12, tzinfo=UTC)
# A power of two, so that the sums below are exact.
INTERVAL = 1 / 128


class WatchedStore(FakeAccessStore):
    """Counts writes, and notes in which of the clerk's turns it is asked to tidy up."""

    def __init__(self) -> None:
        super().__init__()
        self.writes = 0
        self.turn = 0
        self.tidied: list[tuple[int, datetime]] = []

    def next_turn(self) -> None:
        self.turn += 1

    def write(self, events: Sequence[AuditEvent], used: Mapping[str, datetime]) -> None:
        self.writes += 1
        super().write(events, used)

    def tidy(self, now: datetime) -> None:
        self.tidied.append((self.turn, now))
        super().tidy(now)


@pytest.fixture
def store() -> WatchedStore:
    return WatchedStore()


@pytest.fixture
def clerk(store: WatchedStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[Clerk]:
    monkeypatch.setattr(clerk_module, "INTERVAL_SECONDS", INTERVAL)
    monkeypatch.setattr(clerk_module, "_TIDY_INTERVAL_SECONDS", 5 * INTERVAL)
    clerk = Clerk(store)
    yield clerk
    clerk.close()


def event(subject: str) -> AuditEvent:
    return AuditEvent(NOON, AuditAction.AUTHENTICATE, AuditOutcome.REFUSED, "nobody", subject)


def test_answers_and_nonces_that_are_no_longer_needed_are_forgotten_now_and_then(
    clerk: Clerk, store: WatchedStore
) -> None:
    """Otherwise their tables grow for as long as the service runs."""
    clerk.start(store.next_turn)
    eventually(lambda: len(store.tidied) >= 3)
    assert [turn for turn, _ in store.tidied[:3]] == [5, 10, 15]
    assert all(abs(datetime.now(UTC) - now) < timedelta(minutes=1) for _, now in store.tidied)


def test_records_that_are_away_are_tidied_later(
    clerk: Clerk, store: WatchedStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.away = True
    with caplog.at_level(logging.WARNING):
        clerk.start(store.next_turn)
        eventually(lambda: len(store.tidied) >= 2)
    assert caplog.records == []
    assert store.turn >= 10


def test_nothing_is_written_where_nothing_was_noted(clerk: Clerk, store: WatchedStore) -> None:
    """It would be a transaction each second, and a sync of the disk."""
    clerk.start(store.next_turn)
    eventually(lambda: store.turn >= 3)
    assert store.writes == 0
    clerk.note(event("node-1"))
    eventually(lambda: store.events == [event("node-1")])
    after = store.turn
    eventually(lambda: store.turn >= after + 3)
    assert store.writes == 1
    clerk.note_used("key", NOON)
    eventually(lambda: store.used == {"key": NOON})
    assert store.writes == 2


def test_it_has_ended_when_it_is_closed(
    clerk: Clerk, store: WatchedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database is closed behind it."""
    entered, gate = threading.Event(), threading.Event()

    def slow() -> None:
        entered.set()
        gate.wait(10)
        store.next_turn()

    clerk.start(slow)
    assert entered.wait(10)
    thread, join = clerk._thread, clerk._thread.join

    def join_and_go_on(timeout: float | None = None) -> None:
        gate.set()
        join(timeout)

    monkeypatch.setattr(thread, "join", join_and_go_on)
    clerk.note(event("node-1"))
    clerk.close()
    assert not thread.is_alive()
    assert store.turn == 1
    assert store.events == [event("node-1")]


def test_a_write_that_fails_is_made_up_for_at_the_end(store: WatchedStore) -> None:
    clerk = Clerk(store)
    clerk.note(event("node-1"))
    clerk.note_used("key", NOON)
    store.away = True
    clerk.write()
    clerk.note_used("key", NOON + timedelta(seconds=1))
    store.away = False
    clerk.close()
    assert store.events == [event("node-1")]
    assert store.used == {"key": NOON + timedelta(seconds=1)}


def test_a_failure_that_is_none_of_the_records_is_not_hidden() -> None:
    """Only records that are away are waited for."""

    class Broken(WatchedStore):
        def write(self, events: Sequence[AuditEvent], used: Mapping[str, datetime]) -> None:
            raise ZeroDivisionError

    clerk = Clerk(Broken())
    clerk.note(event("node-1"))
    with pytest.raises(ZeroDivisionError):
        clerk.write()
