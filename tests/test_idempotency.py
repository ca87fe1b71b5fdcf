"""Who asks at the same time with the same Idempotency-Key: one begins, all get what became of it."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

import pytest

from backend.errors import HubUpdateError, IdempotencyKeyError
from backend.services.access import idempotency
from backend.services.access.idempotency import IdempotencyKey, RecentAnswers

KEY = IdempotencyKey.parse("key-1", b"body")
Begin = Callable[["Future[bytes]"], None]


class Beginner:
    """Begins and leaves it to the test how that ends."""

    def __init__(self) -> None:
        self.begun: list[Future[bytes]] = []

    def __call__(self, answer: "Future[bytes]") -> None:
        self.begun.append(answer)


@pytest.fixture
def begin() -> Beginner:
    return Beginner()


def ask(answers: RecentAnswers, begin: Begin, key: IdempotencyKey = KEY, scope: str = "a") -> "Future[bytes]":
    return answers.once(scope, key, "node-1", begin)


@pytest.mark.parametrize("text", ["", " ", "a b", "a\n", "ä", "a" * 256, "\x7f"])
def test_a_key_is_visible_ascii(text: str) -> None:
    with pytest.raises(IdempotencyKeyError, match="1 to 255 visible ASCII characters"):
        IdempotencyKey.parse(text, b"")


def test_a_key_keeps_neither_itself_nor_the_body() -> None:
    key = IdempotencyKey.parse("~" * 255, b"secret body")
    assert "~" not in repr(key)
    assert "secret" not in repr(key)
    assert {len(key.key_hash), len(key.body_hash)} == {64}


def test_of_many_who_ask_at_once_one_begins_and_all_are_answered(begin: Beginner) -> None:
    answers, barrier = RecentAnswers(), threading.Barrier(32)
    waiting: list[Future[bytes]] = []

    def run() -> None:
        barrier.wait(30)
        waiting.append(ask(answers, begin))

    threads = [threading.Thread(target=run) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(begin.begun) == 1
    assert not any(future.done() for future in waiting)
    begin.begun[0].set_result(b"first")
    assert [future.result(0) for future in waiting] == [b"first"] * 32
    assert ask(answers, begin).result(0) == b"first"
    assert len(begin.begun) == 1


def test_a_key_is_its_scopes_own(begin: Beginner) -> None:
    answers = RecentAnswers()
    ask(answers, begin, scope="a")
    ask(answers, begin, scope="b")
    ask(answers, begin, IdempotencyKey.parse("key-2", b"body"))
    assert len(begin.begun) == 3


def test_a_failure_is_told_to_all_who_waited_and_not_kept(begin: Beginner) -> None:
    answers = RecentAnswers()
    waiting = [ask(answers, begin), ask(answers, begin)]
    begin.begun[0].set_exception(HubUpdateError("not this time"))
    assert [str(future.exception(0)) for future in waiting] == ["not this time"] * 2
    again = ask(answers, begin)
    begin.begun[1].set_result(b"now")
    assert again.result(0) == b"now"


def test_what_can_not_be_begun_is_raised_and_not_kept(begin: Beginner) -> None:
    answers = RecentAnswers()

    def refuse(_: "Future[bytes]") -> None:
        # Somebody else joins before it is refused.
        joined.append(ask(answers, begin))
        raise HubUpdateError("stopping")

    joined: list[Future[bytes]] = []
    with pytest.raises(HubUpdateError, match="stopping"):
        ask(answers, refuse)
    assert str(joined[0].exception(0)) == "stopping"
    assert begin.begun == []
    ask(answers, begin)
    assert len(begin.begun) == 1


def test_one_who_goes_away_takes_nothing_from_the_others(begin: Beginner) -> None:
    answers = RecentAnswers()
    first, second, third = (ask(answers, begin) for _ in range(3))
    assert first.cancel()
    assert third.cancel()
    begin.begun[0].set_result(b"first")
    assert second.result(0) == b"first"
    assert ask(answers, begin).result(0) == b"first"


@pytest.mark.parametrize("done", [False, True])
def test_another_body_with_the_same_key_is_refused_and_changes_nothing(begin: Beginner, done: bool) -> None:
    answers = RecentAnswers()
    waiting = ask(answers, begin)
    if done:
        begin.begun[0].set_result(b"first")
    with pytest.raises(IdempotencyKeyError, match="came with another request before"):
        ask(answers, begin, IdempotencyKey.parse("key-1", b"another body"))
    if not done:
        begin.begun[0].set_result(b"first")
    assert waiting.result(0) == b"first"
    assert len(begin.begun) == 1


def test_what_a_node_was_told_is_forgotten_with_the_node(begin: Beginner) -> None:
    answers = RecentAnswers()
    ask(answers, begin)
    begin.begun[0].set_result(b"first")
    answers.forget("node-2")
    assert ask(answers, begin).result(0) == b"first"
    answers.forget("node-1")
    ask(answers, begin)
    assert len(begin.begun) == 2


def test_a_node_that_comes_again_is_not_forgotten_with_its_earlier_self(begin: Beginner) -> None:
    answers = RecentAnswers()
    waiting = ask(answers, begin)
    answers.forget("node-1")
    joined = ask(answers, begin)
    begin.begun[0].set_result(b"again")
    assert (waiting.result(0), joined.result(0)) == (b"again", b"again")
    assert len(begin.begun) == 1


def test_old_answers_are_dropped_and_what_is_on_its_way_is_not(
    begin: Beginner, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = RecentAnswers()
    waiting = ask(answers, begin)
    for number in range(100):
        ask(answers, begin, IdempotencyKey.parse(f"other-{number}", b"body"))
        begin.begun[-1].set_result(b"done")
    assert len(answers._recent) == 101
    later = time.monotonic() + idempotency._RECENT_SECONDS + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    joined = ask(answers, begin)
    assert len(answers._recent) == 1
    begin.begun[0].set_result(b"first")
    assert (waiting.result(0), joined.result(0)) == (b"first", b"first")
