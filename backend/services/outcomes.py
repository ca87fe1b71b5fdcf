"""How an outcome gets into the future that a caller waits for, whatever has become of the caller."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_S = TypeVar("_S")
_T = TypeVar("_T")


def succeed(answer: Future[_T], value: _T) -> None:
    """Set the result, unless the caller has gone away: what it asked for has happened all the same."""
    if answer.set_running_or_notify_cancel():
        answer.set_result(value)


def fail(answer: Future[_T], error: BaseException) -> None:
    """Set the error, unless the caller has gone away."""
    if answer.set_running_or_notify_cancel():
        answer.set_exception(error)


def after(undecided: Future[None], answer: Future[_T], again: Callable[[], None]) -> None:
    """Try again as soon as the change in the way is decided; `answer` gets what that raises."""

    def judge(_: Future[None]) -> None:
        try:
            again()
        except Exception as exc:  # noqa: BLE001 - the caller is told, whatever it was
            fail(answer, exc)

    undecided.add_done_callback(judge)


def pass_on(source: Future[_S], render: Callable[[_S], _T], answer: Future[_T]) -> None:
    """Give `answer` the outcome of `source`, which is done."""
    if source.cancelled():
        answer.cancel()
        return
    error = source.exception()
    if error is None:
        succeed(answer, render(source.result()))
    else:
        fail(answer, error)
