"""The one list of what runs by itself. Each row has a thread: one that takes long delays no other."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from random import uniform
from threading import Event, Thread
from typing import Final

from backend.adapters.backups.automatic import AutomaticBackups
from backend.adapters.durable_workflow import DurableWorkflow
from backend.adapters.records.unit_of_work import SqlRecords
from backend.errors import HubUpdateError, RecordsUnavailableError
from backend.services.access.access_control import AccessControl
from backend.services.access.credential_cache import CredentialCache
from backend.services.hub.agent import Agent
from backend.services.hub.endpoint_keeper import EndpointKeeper
from backend.services.hub.interface_observer import InterfaceObserver
from backend.services.ports import AccessStore

log = logging.getLogger(__name__)

# Each call is up to this share of its interval early, so that the loops don't all run at the same moment.
_JITTER: Final = 0.1
# The longest pause before a loop that has more to do goes on.
_MORE_SECONDS: Final = 1.0
_STOP_SECONDS: Final = 10.0


@dataclass(eq=False, slots=True)
class Loop:
    """Calls `run` every `interval_seconds`, counted from the end of one call to the beginning of the next.

    `run` returns True where it has left something to do: the next call then follows within a second.
    """

    name: str
    interval_seconds: float
    run: Callable[[], bool | None]
    # Seconds before the first call; by default an interval.
    first_seconds: float | None = None
    # When the last call without an error ended, by time.monotonic() and by time.time(); and its seconds.
    succeeded_monotonic: float | None = field(default=None, init=False)
    succeeded_at: float | None = field(default=None, init=False)
    duration_seconds: float | None = field(default=None, init=False)
    _failure: str | None = field(default=None, init=False)

    def work(self, stopping: Event) -> None:
        """Call `run` again and again until `stopping` is set."""
        delay = self.interval_seconds if self.first_seconds is None else self.first_seconds
        while not stopping.wait(delay * uniform(1 - _JITTER, 1)):  # noqa: S311 - no secret
            has_more = self._call()
            delay = min(self.interval_seconds, _MORE_SECONDS) if has_more else self.interval_seconds

    def _call(self) -> bool | None:
        began = time.monotonic()
        try:
            has_more = self.run()
        except (RecordsUnavailableError, HubUpdateError):
            # Whether the database and the interface are there is logged where it changes.
            return False
        except Exception as exc:
            # Logged once for each cause, and never the end of the loop.
            failure = repr(exc)
            if failure != self._failure:
                log.exception("loop_failed", extra={"loop": self.name, "reason": failure})
            self._failure = failure
            return False
        self._failure = None
        self.succeeded_monotonic, self.succeeded_at = time.monotonic(), time.time()
        self.duration_seconds = self.succeeded_monotonic - began
        return has_more


class Loops:
    """Runs its rows from `start` to `stop`."""

    def __init__(self, rows: Sequence[Loop]) -> None:
        self.rows: Final = tuple(rows)
        self._stopping = Event()
        self._threads = [
            Thread(target=row.work, args=(self._stopping,), name=f"loop-{row.name}", daemon=True)
            for row in self.rows
        ]

    def start(self) -> None:
        """Begin. No row is called before its first interval is over."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End every loop; wait for calls under way, at most 10 s for all of them together."""
        self._stopping.set()
        until = time.monotonic() + _STOP_SECONDS
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, until - time.monotonic()))


def list_access_loops(
    access: AccessControl, cache: CredentialCache, store: AccessStore, audit_keep: timedelta
) -> list[Loop]:
    """Return the loops for credentials, audit log, stored answers and nonces."""
    return [
        # The command line makes and revokes credentials, too.
        Loop("credentials", 1.0, cache.refresh),
        Loop("audit", 1.0, access.audit.flush),
        Loop("limited_requests", 1.0, access.limited.report_in_time),
        Loop("answers_and_nonces", 60.0, store.tidy),
        # First after a second: a service that is restarted within each hour would otherwise never prune.
        Loop("audit_pruning", 3600.0, partial(access.audit.prune, audit_keep), first_seconds=1.0),
    ]


def list_health_loops(
    observer: InterfaceObserver, keeper: EndpointKeeper, agent: Agent, interval_seconds: float
) -> list[Loop]:
    """Return the loops that watch the peers: none for an interval of 0."""
    if interval_seconds == 0:
        return []
    return [
        Loop("health", interval_seconds, observer.look_regularly),
        # In the agent's thread, between two batches: SQLite lets one thread write at a time.
        Loop("endpoints", 60.0, partial(keeper.save, agent.call)),
    ]


def list_backup_loops(backups: AutomaticBackups | None) -> list[Loop]:
    """Return the loop that makes backups, where the service makes any."""
    return [] if backups is None else [Loop("backups", 60.0, backups.run)]


def list_hub_loops(agent: Agent, records: SqlRecords, workflow: DurableWorkflow | None) -> list[Loop]:
    """Return the loops that keep the hub equal to the records, and the records small."""
    rows = [
        Loop("hub", 1.0, agent.maintain),
        Loop("tombstones", 3600.0, records.expire_tombstones),
    ]
    if workflow is not None:
        # In the agent's thread, between two batches: SQLite lets one thread write at a time.
        rows.append(Loop("workflows", 10.0, partial(agent.call, workflow.delete_finished)))
    return rows
