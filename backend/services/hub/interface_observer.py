"""The one place that reads the interface (`wg show NAME dump`, a "look"), for health and for drift.

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

# The shortest time from a look to the next one that only the peers' health needs: seconds.
_SHORTEST_SECONDS: Final = 1.0


class InterfaceObserver:
    """Reads the interface, and gives the result to the health monitor. Any thread may call it."""

    def __init__(self, hub: Hub, health: HealthMonitor | None = None, metrics: Metrics = NO_METRICS) -> None:
        """Without `health` the looks are for the comparison with the file alone."""
        self.metrics: Final = metrics
        self._hub = hub
        self._health = health
        # Held during a look.
        self._looking = Lock()
        # When the last look began, by time.monotonic().
        self._began = float("-inf")
        # The last look and when it began. `take` deletes it: with many peers it takes much memory.
        self._last: tuple[float, InterfaceState] | None = None
        # Guards _asked; never held during a look.
        self._lock = Lock()
        self._asked: Future[None] | None = None
        self._executor = ThreadPoolExecutor(1, "hub-look")

    def close(self) -> None:
        """Wait for a look that `ask` has started; `ask` raises RuntimeError from then on."""
        self._executor.shutdown()

    def look(self, *, keep: bool = True) -> InterfaceState:
        """Read the interface now; raise HubUpdateError. `keep` leaves the look for `take`."""
        with self._looking:
            state = self._look()
            if not keep:
                self._last = None
            return state

    def look_regularly(self) -> None:
        """Read the interface, unless that was done within the last second; raise HubUpdateError."""
        with self._looking:
            # Asked under the lock: another look may have been made while this one waited for it.
            if time.monotonic() - self._began >= _SHORTEST_SECONDS:
                self._look()

    def take(self, since: float) -> tuple[float, InterfaceState] | None:
        """Return when the last look began, and the look, and delete it; None if it began before `since`.

        Times are time.monotonic()'s.
        """
        last, self._last = self._last, None
        return None if last is None or last[0] < since else last

    def lost_endpoints(self, state: InterfaceState) -> Mapping[str, str]:
        """Return the last endpoint of each peer that has none on the interface; see HealthMonitor."""
        return {} if self._health is None else self._health.lost_endpoints(state)

    def ask(self) -> Future[None]:
        """Start a look in another thread, unless there was one within the last second.

        Calls during a look get the same future. It raises nothing: the health monitor has a look's error.
        """
        with self._lock:
            if self._asked is None or self._asked.done():
                self._asked = self._executor.submit(self._look_quietly)
            return self._asked

    def _look(self) -> InterfaceState:
        self._began = began = time.monotonic()
        # Before the next one, so that there are never two of them in memory.
        self._last = None
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

    def _read(self, ifindex: int | None) -> InterfaceState:
        if ifindex is None:
            raise HubUpdateError("the interface does not exist")
        return self._hub.state()

    def _look_quietly(self) -> None:
        with suppress(HubUpdateError):
            self.look_regularly()
