"""Writes down what nobody waits for: refusals, what was noticed, and when keys were used last."""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from threading import Event, Lock, Thread
from typing import Final

from backend.errors import RecordsUnavailableError
from backend.models.access.audit import AuditAction, AuditEvent, AuditOutcome
from backend.models.access.callers import SERVICE
from backend.services.audit_pruning import KEPT, AuditPruning
from backend.services.ports import AccessStore

log = logging.getLogger(__name__)

INTERVAL_SECONDS: Final = 1.0
_TIDY_INTERVAL_SECONDS: Final = 60.0
# From so many rows of one interval on, equal refusals are counted together whoever they were of: a flood
# from many addresses, with many names, must not become as many rows.
_ROWS_APART: Final = 100
_STOP_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class _Kind:
    """What two events must share to be counted into one row."""

    action: AuditAction
    outcome: AuditOutcome
    reason: str | None
    actor: str
    source: str | None
    subject: str | None


class Clerk:
    """One thread that writes once a second what was noted since, and does what else is due that often.

    What is accepted is not its affair: that is logged in the transaction in which it happens.
    """

    def __init__(self, store: AccessStore, keep: timedelta = KEPT) -> None:
        """`keep` is how long rows of the audit log are kept."""
        self._store = store
        self._pruning = AuditPruning(store, keep)
        # Orders those who write: who has written knows that nothing is still on its way from another.
        self._writing = Lock()
        # Guards the two below; never held across I/O.
        self._lock = Lock()
        self._events: dict[_Kind, AuditEvent] = {}
        self._used: dict[str, datetime] = {}
        self._stop = Event()
        self._thread = Thread(target=self._work, name="clerk", daemon=True)
        self._every_turn: Callable[[], object] = lambda: None
        self._untidied_seconds = 0.0

    def start(self, every_turn: Callable[[], object]) -> None:
        """Begin; `every_turn` is called about once a second."""
        self._every_turn = every_turn
        self._thread.start()

    def close(self) -> None:
        """Write down what is left, and stop."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_SECONDS)
        self.write()

    def note(self, event: AuditEvent) -> None:
        """Have an event logged within a second; equal ones are counted into one row."""
        kind = _Kind(event.action, event.outcome, event.reason, event.actor, event.source, event.subject)
        with self._lock:
            known = self._events.get(kind)
            if known is None and len(self._events) >= _ROWS_APART:
                actor = event.actor.partition(":")[0]
                kind = replace(kind, actor=actor, source=None, subject=None)
                event = replace(event, actor=actor, source=None, subject=None, request_id=None)
                known = self._events.get(kind)
            if known is not None:
                # Whose request it was would be true of the first alone.
                event = replace(known, count=known.count + event.count, request_id=None)
            self._events[kind] = event

    def notice(self, action: AuditAction, reason: str | None) -> None:
        """Have something logged that nobody asked for."""
        self.note(SERVICE.event(datetime.now(UTC), action, AuditOutcome.NOTED, reason=reason))

    def note_used(self, credential_id: str, at: datetime) -> None:
        """Have it noted within a second when a credential was used last."""
        with self._lock:
            self._used[credential_id] = at

    def write(self) -> None:
        """Write what was noted; what can't be written now stays for the next time."""
        with self._writing:
            self._write()

    def _write(self) -> None:
        with self._lock:
            events, self._events = self._events, {}
            used, self._used = self._used, {}
        if not events and not used:
            return
        try:
            self._store.write(list(events.values()), used)
        except RecordsUnavailableError:
            with self._lock:
                self._used = used | self._used
            for event in events.values():
                self.note(event)

    def _work(self) -> None:
        while not self._stop.wait(INTERVAL_SECONDS):
            try:
                with contextlib.suppress(RecordsUnavailableError):
                    self._every_turn()
                self.write()
                with contextlib.suppress(RecordsUnavailableError):
                    self._tidy()
                    self._pruning.step()
            except Exception:
                # It must outlive whatever happened, or nothing would be logged from then on.
                log.exception("clerk_failed")

    def _tidy(self) -> None:
        self._untidied_seconds += INTERVAL_SECONDS
        if self._untidied_seconds >= _TIDY_INTERVAL_SECONDS:
            self._untidied_seconds = 0.0
            self._store.tidy(datetime.now(UTC))
