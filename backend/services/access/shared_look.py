"""One look into the records for many requests that wait at the same time."""

import asyncio
import time
from collections.abc import Callable
from typing import Final

# The least time between the starts of two looks. A request waits for at most this and the look itself.
INTERVAL_SECONDS: Final = 0.1


class SharedLook:
    """Runs one look at a time, which all callers of `wait` share. Used by one event loop at a time.

    A caller waits for a look that begins after its call. One that is under way, or that ended a moment ago,
    may have missed a later commit: a key that the command line has just printed.
    """

    def __init__(self, look: Callable[[], None]) -> None:
        """`look` blocks, and may raise: it is run in a thread."""
        self._look = look
        self._began_at = float("-inf")
        # The look that hasn't begun yet, which further callers may join, and the one before it.
        self._next: asyncio.Future[None] | None = None
        self._current: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        """Wait for a look that begins after this call; raise what it raises."""
        if self._next is None or self._next.done():
            self._next = asyncio.ensure_future(self._run(self._current))
        # Shielded: others wait for it too.
        await asyncio.shield(self._next)

    async def _run(self, before: asyncio.Future[None] | None) -> None:
        if before is not None and not before.done():
            await asyncio.wait([before])
        await asyncio.sleep(max(0.0, self._began_at + INTERVAL_SECONDS - time.monotonic()))
        self._current, self._next = self._next, None
        self._began_at = time.monotonic()
        await asyncio.to_thread(self._look)
