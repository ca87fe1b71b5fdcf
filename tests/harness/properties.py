"""How often Hypothesis tries a property: a little in each run, much under `make torture`."""

from collections.abc import Callable
from typing import Any, Final, TypeVar

import pytest
from hypothesis import HealthCheck, settings

_TIMES_UNDER_TORTURE: Final = 20
_factor = [1]

_Test = TypeVar("_Test", bound=Callable[..., Any])


def try_more() -> None:
    """Have the properties of test modules that are imported from now on tried more often."""
    _factor[0] = _TIMES_UNDER_TORTURE


def tried(times: int, *suppressed: HealthCheck) -> Callable[[_Test], _Test]:
    """Decorate a property that takes its time: say how many examples of it are tried, in a usual run."""

    def decorate(test: _Test) -> _Test:
        many = settings(
            max_examples=times * _factor[0],
            deadline=None,
            suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, *suppressed],
        )
        marked: _Test = pytest.mark.torture(many(test))
        return marked

    return decorate
