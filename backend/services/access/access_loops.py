"""Runs what access control does by itself, in one thread: some functions each second, some each minute."""

import contextlib
import logging
from collections.abc import Callable, Sequence
from threading import Event, Thread
from typing import Final

from backend.errors import RecordsUnavailableError

log = logging.getLogger(__name__)

INTERVAL_SECONDS: Final = 1.0
_TURNS_A_MINUTE: Final = 60
_STOP_SECONDS: Final = 10.0


class AccessLoops:
    """Calls its functions in order. One that fails is called again in the next turn, and stops no other."""

    def __init__(
        self,
        each_second: Sequence[Callable[[], object]] = (),
        each_minute: Sequence[Callable[[], object]] = (),
    ) -> None:
        self._each_second = each_second
        self._each_minute = each_minute
        self._stop = Event()
        self._thread = Thread(target=self._work, name="access", daemon=True)

    def start(self) -> None:
        """Call the first function, which may raise RecordsUnavailableError, and begin with the turns."""
        for function in self._each_second[:1]:
            function()
        self._thread.start()

    def close(self) -> None:
        """End the turn that is under way."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_SECONDS)

    def _work(self) -> None:
        turn = 0
        while not self._stop.wait(INTERVAL_SECONDS):
            turn += 1
            due = self._each_minute if turn % _TURNS_A_MINUTE == 0 else ()
            for function in (*self._each_second, *due):
                try:
                    with contextlib.suppress(RecordsUnavailableError):
                        function()
                except Exception:
                    log.exception("access_loop_failed")
