"""What runs by itself: how often, what a failure does to it, and how it ends."""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest

from backend import loops as loops_module
from backend.errors import RecordsUnavailableError
from backend.loops import Loop, Loops, list_access_loops, list_hub_loops
from tests.harness.access import Access
from tests.harness.core import World
from tests.harness.fakes import FakeAccessStore
from tests.harness.patience import WAIT, eventually

INTERVAL = 0.01
NEVER = 3600.0

Start = Callable[..., Loops]


class Calls:
    """Counts its calls and notes when each came; raises what it is told to."""

    def __init__(self, *errors: Exception | None) -> None:
        self.times: list[float] = []
        self._errors = list(errors)

    def __call__(self) -> None:
        self.times.append(time.monotonic())
        if self._errors and (error := self._errors.pop(0)) is not None:
            raise error

    @property
    def count(self) -> int:
        return len(self.times)


@pytest.fixture
def start() -> Iterator[Start]:
    """Start loops, and stop them at the end of the test."""
    started: list[Loops] = []

    def begin(*rows: Loop) -> Loops:
        loops = Loops(rows)
        started.append(loops)
        loops.start()
        return loops

    yield begin
    for loops in started:
        loops.stop()


def test_each_row_is_called_again_and_again_after_its_interval(start: Start) -> None:
    often, never = Calls(), Calls()
    began = time.monotonic()
    start(Loop("often", INTERVAL, often), Loop("never", NEVER, never))
    eventually(lambda: often.count >= 5)
    assert never.count == 0
    moments = [began, *often.times]
    # A call may come a tenth of its interval early, never sooner.
    assert all(later - earlier >= 0.9 * INTERVAL for earlier, later in itertools.pairwise(moments))


def test_first_call_may_come_before_an_interval_is_over(start: Start) -> None:
    soon = Calls()
    start(Loop("soon", NEVER, soon, first_seconds=0.0))
    eventually(lambda: soon.count == 1)


def test_row_that_has_more_to_do_is_called_again_without_waiting_for_its_interval(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loops_module, "_MORE_SECONDS", INTERVAL)
    left = [3, 2, 1, 0]

    def step() -> bool:
        return left.pop(0) > 0

    (row,) = start(Loop("steps", NEVER, step, first_seconds=0.0)).rows
    eventually(lambda: not left)
    eventually(lambda: row.succeeded_at is not None)


def test_slow_row_delays_no_other(start: Start) -> None:
    gate, begun = threading.Event(), threading.Event()
    others = Calls()

    def hang() -> None:
        begun.set()
        gate.wait(WAIT)

    start(Loop("slow", INTERVAL, hang), Loop("others", INTERVAL, others))
    assert begun.wait(WAIT)
    after = others.count
    eventually(lambda: others.count >= after + 5)
    gate.set()


def test_error_is_logged_once_for_each_cause_and_ends_no_loop(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = ValueError("first"), ValueError("second")
    calls = Calls(first, first, second, second, None, second)
    start(Loop("unlucky", INTERVAL, calls))
    eventually(lambda: calls.count >= 8)
    logged = [
        (record.message, record.__dict__["loop"], record.__dict__["reason"], record.exc_info is not None)
        for record in caplog.records
    ]
    # The last one comes again after a success.
    assert logged == [("loop_failed", "unlucky", repr(error), True) for error in (first, second, second)]


def test_records_that_are_away_are_no_error_of_the_loop(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    calls = Calls(RecordsUnavailableError("away"), RecordsUnavailableError("away"))
    with caplog.at_level(logging.DEBUG):
        start(Loop("reading", INTERVAL, calls))
        eventually(lambda: calls.count >= 3)
    assert caplog.records == []


def test_last_success_and_its_duration_are_kept(start: Start) -> None:
    gate = threading.Event()
    calls = Calls(ValueError("not yet"))

    def work() -> None:
        calls()
        gate.wait(WAIT)

    before = time.time(), time.monotonic()
    (row,) = start(Loop("row", INTERVAL, work)).rows
    eventually(lambda: calls.count == 2)
    # One call has failed, and one is under way.
    assert (row.succeeded_at, row.succeeded_monotonic, row.duration_seconds) == (None, None, None)
    gate.set()
    eventually(lambda: row.duration_seconds is not None)
    assert row.succeeded_at is not None
    assert row.succeeded_monotonic is not None
    assert before[0] <= row.succeeded_at <= time.time()
    assert before[1] <= row.succeeded_monotonic <= time.monotonic()


def test_stop_wakes_every_row_and_waits_for_the_call_under_way(start: Start) -> None:
    begun, gate = threading.Event(), threading.Event()
    ended: list[str] = []

    def work() -> None:
        begun.set()
        gate.wait(WAIT)
        ended.append("work")

    loops = start(Loop("work", 0.0, work), Loop("waiting", NEVER, lambda: None))
    assert begun.wait(WAIT)
    stopper = threading.Thread(target=loops.stop)
    stopper.start()
    gate.set()
    stopper.join(WAIT)
    assert not stopper.is_alive()
    # No call begins once it has been stopped.
    calls = len(ended)
    assert calls >= 1
    assert not any(thread.name in {"loop-work", "loop-waiting"} for thread in threading.enumerate())
    assert len(ended) == calls


def test_stop_gives_a_call_that_hangs_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops_module, "_STOP_SECONDS", 0.05)
    begun, gate = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        gate.wait(WAIT)

    loops = start(Loop("one", 0.0, hang), Loop("two", 0.0, hang))
    assert begun.wait(WAIT)
    began = time.monotonic()
    loops.stop()
    assert time.monotonic() - began < WAIT / 2
    gate.set()


def test_loops_that_never_started_can_be_stopped() -> None:
    """As when a start is refused halfway."""
    Loops([Loop("row", INTERVAL, lambda: None)]).stop()


def test_list_says_what_keeps_access_up_to_date_and_how_often() -> None:
    store = FakeAccessStore()
    access = Access(store)
    rows = list_access_loops(access.control, access.cache, store, timedelta(days=1))
    assert {row.name: row.interval_seconds for row in rows} == {
        "credentials": 1.0,
        "audit": 1.0,
        "limited_requests": 1.0,
        "answers_and_nonces": 60.0,
        "audit_pruning": 3600.0,
    }
    # Each can be called without arguments; only pruning says whether it has left something to do.
    assert [row.run() for row in rows] == [None, None, None, None, False]


def test_list_says_what_keeps_hub_and_records_and_how_often(world: World) -> None:
    rows = list_hub_loops(world.agent, world.records, None)
    assert {row.name: row.interval_seconds for row in rows} == {"hub": 1.0, "tombstones": 3600.0}
    assert [row.run() for row in rows] == [None, None]
