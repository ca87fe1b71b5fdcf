"""Keeps the peers' last endpoints in the records, so that a new interface can get them after a restart."""

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
    """Reads the endpoints at the start, and writes the new ones when `save` is called."""

    def __init__(self, records: Records, health: HealthMonitor) -> None:
        self._records = records
        self._health = health

    def load(self) -> None:
        """Give the endpoints of the records to the health monitor; raise RecordsUnavailableError."""
        self._health.load(self._records.load_endpoints())

    def save(self, call: Callable[[Callable[[], None]], None]) -> None:
        """Write the new endpoints, one `call` for each transaction; raise RecordsUnavailableError.

        `call` runs the function that it is given.
        """
        unrecorded = iter(self._health.unrecorded_endpoints().items())
        while part := dict(islice(unrecorded, _AT_ONCE)):
            call(partial(self._write, part))

    def close(self) -> None:
        """Write the new endpoints. They are lost if the database doesn't answer."""
        with suppress(RecordsUnavailableError):
            self.save(lambda write: write())

    def _write(self, endpoints: dict[str, RecordedEndpoint]) -> None:
        # Waits two seconds for a database that another program has locked. A write waits for 30, and with it
        # the agent's changes, or a stop.
        self._records.check_writable()
        self._records.save_endpoints(endpoints)
        self._health.note_recorded(endpoints)
