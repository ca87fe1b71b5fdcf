"""How an endpoint waits for the outcome of a change."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future

import pytest

from backend.api import dependencies
from backend.api.dependencies import applied, outcome
from backend.errors import HubUpdateError, OutcomeUnknownError
from backend.models.wireguard.peer import Change, ChangeUnderWayError


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dependencies, "_CERTAIN_SECONDS", 0.01)
    monkeypatch.setattr(dependencies, "_LOOK_SECONDS", 0.01)


def never() -> bool:
    return False


def waited_for(end: Callable[[Future[int]], None]) -> int:
    """Wait for a change that another thread ends meanwhile."""

    async def main() -> int:
        future: Future[int] = Future()
        threading.Thread(target=end, args=(future,)).start()
        return await outcome(future, never)

    return asyncio.run(main())


def test_outcome_comes_from_another_thread() -> None:
    assert waited_for(lambda future: future.set_result(1)) == 1


def test_error_of_a_change_is_raised_in_its_request() -> None:
    with pytest.raises(HubUpdateError, match="no interface"):
        waited_for(lambda future: future.set_exception(HubUpdateError("no interface")))


@pytest.mark.usefixtures("hasty")
def test_request_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dependencies, "ANSWER_TIMEOUT_SECONDS", 0.01)
    with pytest.raises(OutcomeUnknownError, match=r"no outcome within .* ask again"):
        asyncio.run(outcome(Future(), never))


@pytest.mark.usefixtures("hasty")
def test_request_ends_early_where_the_records_leave_its_outcome_in_doubt() -> None:
    looks = iter([False, False, True])
    with pytest.raises(OutcomeUnknownError, match="the change may yet happen; ask again"):
        asyncio.run(outcome(Future(), looks.__next__))


@pytest.mark.usefixtures("hasty")
def test_change_that_takes_long_is_answered_when_it_has_ended() -> None:
    future: Future[int] = Future()

    def in_doubt() -> bool:
        future.set_result(1)
        return False

    assert asyncio.run(outcome(future, in_doubt)) == 1


def test_change_that_has_ended_is_never_in_doubt() -> None:
    future: Future[int] = Future()
    future.set_result(1)
    assert asyncio.run(outcome(future, lambda: True)) == 1


def test_stopping_server_leaves_the_outcome_unknown_and_the_change_under_way() -> None:
    future: Future[int] = Future()

    async def main() -> None:
        request = asyncio.create_task(outcome(future, never))
        await asyncio.sleep(0)
        request.cancel()
        with pytest.raises(OutcomeUnknownError, match="the service is stopping"):
            await request

    asyncio.run(main())
    # It isn't cancelled with its request, and its event loop may be closed when it ends.
    assert not future.cancelled()
    future.set_result(1)


@pytest.mark.usefixtures("hasty")
def test_request_waits_no_longer_however_many_changes_of_its_peer_come_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dependencies, "ANSWER_TIMEOUT_SECONDS", 0.2)
    earlier: list[Change] = []

    def decide() -> Change:
        # Each ends within the time that a request waits for one change.
        change = Change(None, None)
        earlier.append(change)
        failure = HubUpdateError("`wg` hangs")
        asyncio.get_running_loop().call_later(0.1, change.applied.set_exception, failure)
        if len(earlier) > 20:
            raise failure
        raise ChangeUnderWayError(change)

    with pytest.raises(OutcomeUnknownError, match=r"no outcome within .* ask again"):
        asyncio.run(applied(decide, never))


def test_time_that_a_request_waited_for_another_change_counts_for_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dependencies, "ANSWER_TIMEOUT_SECONDS", 1.0)
    monkeypatch.setattr(dependencies, "_CERTAIN_SECONDS", 0.01)
    monkeypatch.setattr(dependencies, "_LOOK_SECONDS", 0.01)
    own: list[Change] = []

    async def ask() -> float:
        loop = asyncio.get_running_loop()
        began = loop.time()

        def decide() -> Change:
            change = Change(None, None)
            if not own:
                own.append(change)
                loop.call_later(0.9, change.applied.set_result, None)
                raise ChangeUnderWayError(change)
            own.append(change)
            return change

        with pytest.raises(OutcomeUnknownError):
            await applied(decide, never)
        return loop.time() - began

    # Both waits one after the other would take 1.9 s.
    assert asyncio.run(ask()) < 1.6
    assert len(own) == 2
