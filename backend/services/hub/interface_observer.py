"""Every look at the interface (`wg show NAME dump`). Each serves the peers' health and the search for drift.

At 10,000 peers a look takes some 0.1 s, so there is never more than one at a time.
"""

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from threading import Lock
from typing import Final

from backend.errors import HubUpdateError
from backend.models.wireguard.interface import InterfaceState
from backend.services.hub.health import HealthMonitor
from backend.services.no_metrics import NO_METRICS
from backend.services.ports import Hub, Metrics

# The shortest time from one look to the next that isn't needed to apply a change: seconds.
_SHORTEST_SECONDS: Final = 1.0


class InterfaceObserver:
    """Looks at the interface, and hands what it sees to the health monitor. Any thread may call it."""

    def __init__(self, hub: Hub, health: HealthMonitor | None = None, metrics: Metrics = NO_METRICS) -> None:
        """Look at nothing yet. Without `health` the looks serve the search for drift alone."""
        self.metrics: Final = metrics
        self._hub = hub
        self._health = health
        # Held during a look.
        self._looking = Lock()
        # When the last look began, by time.monotonic().
        self._began = float("-inf")
        # The last look and when it began, until `take`: an interface with many peers takes much memory.
        self._last: tuple[float, InterfaceState] | None = None
        # Guards _asked; never held during a look.
        self._lock = Lock()
        self._asked: Future[None] | None = None
        self._executor = ThreadPoolExecutor(1, "hub-look")

    def close(self) -> None:
        """Wait for a look that was asked for, and take no more requests."""
        self._executor.shutdown()

    def look(self) -> InterfaceState:
        """Look now; raise HubUpdateError."""
        with self._looking:
            self._began = began = time.monotonic()
            ifindex = self._hub.ifindex()
            try:
                state = self._read(ifindex)
            except HubUpdateError as exc:
                self.metrics.look_failed()
                if self._health is not None:
                    self._health.note_failure(str(exc), is_away=ifindex is None)
                raise
            if self._health is not None:
                self._health.observe(state, ifindex)
            self._last = began, state
            return state

    def look_regularly(self) -> None:
        """Look, unless that was done within the last second; raise HubUpdateError. For a loop."""
        if time.monotonic() - self._began >= _SHORTEST_SECONDS:
            self.look()

    def take(self, since: float) -> InterfaceState | None:
        """Return the last look if it began after `since`, by time.monotonic(), once; or else None."""
        last, self._last = self._last, None
        return None if last is None or last[0] < since else last[1]

    def lost_endpoints(self, state: InterfaceState) -> Mapping[str, str]:
        """Return the last endpoint of each peer that has none on the interface; see HealthMonitor."""
        return {} if self._health is None else self._health.lost_endpoints(state)

    def ask(self) -> Future[None]:
        """Have a look made in another thread, unless there was one within the last second.

        Requests that come meanwhile share it. The future ends without an error, also when the look fails.
        """
        with self._lock:
            if self._asked is None or self._asked.done():
                self._asked = self._executor.submit(self._look_quietly)
            return self._asked

    def _read(self, ifindex: int | None) -> InterfaceState:
        if ifindex is None:
            raise HubUpdateError("the interface does not exist")
        return self._hub.state()

    def _look_quietly(self) -> None:
        with suppress(HubUpdateError):  # the health monitor has it
            self.look_regularly()
