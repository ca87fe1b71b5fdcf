"""Waiting for what another thread or process brings about."""

import time
from collections.abc import Callable
from typing import Final

_PATIENCE_SECONDS: Final = 20.0
# For a future that another thread completes: seconds.
WAIT: Final = 10.0


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until it is so; fail when that takes too long."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {_PATIENCE_SECONDS:g} s")
        time.sleep(0.01)
