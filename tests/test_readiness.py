"""Whether a provision would succeed, asked without waiting for what hangs."""

import threading

import pytest

from backend.errors import HubUpdateError
from backend.services.readiness import Readiness
from tests.harness.patience import WAIT


def test_the_first_check_that_fails_is_the_answer() -> None:
    looked = []

    def fail() -> None:
        raise HubUpdateError("broken")

    ready = Readiness(
        [("a", lambda: looked.append("a")), ("b", fail), ("c", lambda: looked.append("c"))], live=True
    )
    with pytest.raises(HubUpdateError, match="broken"):
        ready.ask().result(WAIT)
    assert looked == ["a"]


def test_requests_during_a_check_that_hangs_share_one_thread_and_learn_its_name() -> None:
    gate, begun = threading.Event(), threading.Event()
    calls = []

    def hang() -> None:
        calls.append(1)
        begun.set()
        gate.wait(WAIT)

    ready = Readiness([("the pool", lambda: None), ("the database", hang)], live=True)
    answers = [ready.ask() for _ in range(50)]
    assert begun.wait(WAIT)
    assert str(ready.hangs()).startswith("the database takes unusually long")
    assert len({id(answer) for answer in answers}) == 1
    assert not answers[0].done()
    gate.set()
    answers[0].result(WAIT)
    ready.ask().result(WAIT)
    assert len(calls) == 2


def test_thread_that_could_not_be_started_does_not_block_the_next_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    ready = Readiness([("the pool", lambda: None)], live=True)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            ready.ask()
    ready.ask().result(WAIT)
