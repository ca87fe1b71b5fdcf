"""Measures how long a block takes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def measured(note: Callable[[float], object]) -> Iterator[None]:
    """Call `note` with the seconds that the block took, whether it succeeded or not."""
    began = time.perf_counter()
    try:
        yield
    finally:
        note(time.perf_counter() - began)
