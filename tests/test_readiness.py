"""A look at whether a provision would succeed, which nothing can hold up."""

import threading

import pytest

from backend.errors import HubUpdateError
from backend.services.readiness import Readiness

WAIT = 10.0


def test_the_first_check_that_fails_is_the_answer() -> None:
    looked = []

    def fail() -> None:
        raise HubUpdateError("broken")

    ready = Readiness([("a", lambda: looked.append("a")), ("b", fail), ("c", lambda: looked.append("c"))])
    with pytest.raises(HubUpdateError, match="broken"):
        ready.ask().result(WAIT)
    assert looked == ["a"]


def test_all_who_ask_while_a_check_hangs_share_one_thread_and_hear_what_hangs() -> None:
    gate, begun = threading.Event(), threading.Event()
    calls = []

    def hang() -> None:
        calls.append(1)
        begun.set()
        gate.wait(WAIT)

    ready = Readiness([("the pool", lambda: None), ("the database", hang)])
    answers = [ready.ask() for _ in range(50)]
    assert begun.wait(WAIT)
    assert str(ready.hangs()).startswith("the database takes unusually long")
    assert len({id(answer) for answer in answers}) == 1
    assert not answers[0].done()
    gate.set()
    answers[0].result(WAIT)
    ready.ask().result(WAIT)
    assert len(calls) == 2


def test_a_look_for_which_no_thread_could_be_started_does_not_stand_in_the_way_of_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    ready = Readiness([("the pool", lambda: None)])
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            ready.ask()
    ready.ask().result(WAIT)
