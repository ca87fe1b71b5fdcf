"""Metrics that count nothing: with WIREGUARD_METRICS=false, for commands, and for parts used alone."""

from collections.abc import Iterator
from typing import Final

from backend.services.ports import Metrics


class NoMetrics:
    """Does nothing at each event."""

    def render(self) -> Iterator[bytes]:
        """Return no piece."""
        return iter(())

    def _ignore(self, *_: object, **__: object) -> None:
        """Do nothing."""

    request_answered = provision_ended = deprovision_ended = authentication_failed = _ignore
    batch_begun = stage_ended = database_used = drift_found = drift_mended = reloaded = _ignore
    look_failed = first_handshake = endpoints_restored = endpoint_flapped = _ignore


NO_METRICS: Final[Metrics] = NoMetrics()
