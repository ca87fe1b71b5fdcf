"""The long forms of tests, and how long they take: `make torture MINUTES=...`."""

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import pytest
from hypothesis import HealthCheck, settings

_Test = TypeVar("_Test", bound=Callable[..., Any])


class Torture:
    """The time that is left for all tests, and for the one that runs."""

    def __init__(self) -> None:
        self.is_on = False
        self._end = self._end_of_test = self._seconds_each = 0.0

    def divide(self, seconds: float, tests: int, workers: int) -> None:
        """Give each test its share; the time begins now."""
        self._end = time.monotonic() + seconds
        self._seconds_each = seconds * min(1.0, workers / max(1, tests))

    def begin_test(self) -> bool:
        """Begin the time of the next test; say whether there is any left."""
        now = time.monotonic()
        self._end_of_test = min(self._end, now + self._seconds_each)
        return now < self._end

    def goes_on(self) -> bool:
        """Say whether the test that runs has time left; outside of `make torture` it has none."""
        return self.is_on and time.monotonic() < self._end_of_test

    def rounds(self, fewest: int) -> Iterator[int]:
        """Count the rounds of a test: so many in a usual run, and as many more as there is time for."""
        for number in itertools.count():
            if number >= fewest and not self.goes_on():
                return
            yield number


TORTURE: Final = Torture()


def tried(times: int, *suppressed: HealthCheck) -> Callable[[_Test], _Test]:
    """Decorate a property: so many examples are tried in a usual run, and as many as there is time for."""

    def decorate(test: _Test) -> _Test:
        few = settings(
            max_examples=times,
            deadline=None,
            suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, *suppressed],
        )(test)

        @functools.wraps(few)
        def again_and_again(*arguments: Any, **named: Any) -> None:
            for _ in TORTURE.rounds(1):
                few(*arguments, **named)

        marked: _Test = pytest.mark.torture(again_and_again)
        return marked

    return decorate
