"""What access control does by itself, and how that ends."""

import threading

import pytest

from backend.errors import RecordsUnavailableError
from backend.services.access import access_loops
from backend.services.access.access_loops import AccessLoops
from tests.harness.patience import eventually


@pytest.fixture(autouse=True)
def _short_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_loops, "INTERVAL_SECONDS", 0.005)
    monkeypatch.setattr(access_loops, "_TURNS_A_MINUTE", 5)


def test_every_function_is_called_again_whatever_one_of_them_raises(
    caplog: pytest.LogCaptureFixture,
) -> None:
    turns: list[int] = []
    minutes: list[int] = []

    def stumble() -> None:
        turns.append(len(turns))
        if len(turns) == 2:
            raise RuntimeError("stumbled")
        if len(turns) == 3:
            raise RecordsUnavailableError("away")

    loops = AccessLoops([stumble], [lambda: minutes.append(len(turns))])
    loops.start()
    assert turns == [0]
    eventually(lambda: len(minutes) >= 2)
    loops.close()
    # The first call is the start's own.
    assert minutes[:2] == [6, 11]
    assert [record.message for record in caplog.records] == ["access_loop_failed"]


def test_turn_under_way_has_ended_when_it_is_closed() -> None:
    """The database is closed behind it."""
    entered, gate, ended = threading.Event(), threading.Event(), threading.Event()

    def slow() -> None:
        entered.set()
        gate.wait(10)
        ended.set()

    loops = AccessLoops([lambda: None, slow])
    loops.start()
    assert entered.wait(10)
    threading.Timer(0.05, gate.set).start()
    loops.close()
    assert ended.is_set()
