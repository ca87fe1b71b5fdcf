"""Keeps the endpoints that peers were seen at in the records, for an interface that has lost them."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Final

from backend.errors import RecordsUnavailableError
from backend.models.wireguard.health import RecordedEndpoint
from backend.services.hub.health import HealthMonitor
from backend.services.ports import Records

# The endpoints of one transaction, which takes a few milliseconds.
_AT_ONCE: Final = 250


class EndpointKeeper:
    """Reads the endpoints once, at the start, and writes those that are new from time to time."""

    def __init__(self, records: Records, health: HealthMonitor) -> None:
        self._records = records
        self._health = health

    def load(self) -> None:
        """Tell the health monitor the endpoints of the records; raise RecordsUnavailableError."""
        self._health.load(self._records.load_endpoints())

    def save(self, call: Callable[[Callable[[], None]], None]) -> None:
        """Write what is new, some at a time, each in its own `call`; raise RecordsUnavailableError."""
        unrecorded = iter(self._health.unrecorded_endpoints().items())
        while part := dict(islice(unrecorded, _AT_ONCE)):
            call(partial(self._write, part))

    def close(self) -> None:
        """Write what is new; lost where the records are away."""
        with suppress(RecordsUnavailableError):
            self.save(lambda write: write())

    def _write(self, endpoints: dict[str, RecordedEndpoint]) -> None:
        self._records.save_endpoints(endpoints)
        self._health.note_recorded(endpoints)
