"""Writes down what nobody waits for: refusals, what was noticed, and when keys were used last."""

import contextlib
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from threading import Event, Lock, Thread
from typing import Final

from backend.errors import RecordsUnavailableError
from backend.models.access.audit import AuditAction, AuditEvent, AuditOutcome
from backend.models.access.callers import SERVICE
from backend.services.access.audit_pruning import KEPT, AuditPruning
from backend.services.access.audit_rows import AuditRows
from backend.services.access.limited_requests import LimitedRequests
from backend.services.ports import AccessStore

log = logging.getLogger(__name__)

INTERVAL_SECONDS: Final = 1.0
_TIDY_INTERVAL_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 10.0


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
        self._rows = AuditRows()
        self._used: dict[str, datetime] = {}
        self._stop = Event()
        self._thread = Thread(target=self._work, name="clerk", daemon=True)
        self._every_turn: Callable[[], object] = lambda: None
        self._untidied_seconds = 0.0
        self._limited = LimitedRequests()

    def start(self, every_turn: Callable[[], object]) -> None:
        """Begin; `every_turn` is called about once a second."""
        self._every_turn = every_turn
        self._thread.start()

    def close(self) -> None:
        """Write down what is left, and stop."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_SECONDS)
        with self._writing:
            self._write(all_of_them=True)
        self._limited.report(now_too=True)

    def note(self, event: AuditEvent, credential: str | None = None) -> None:
        """Have an event logged, within a second unless its source has come so often that its rows wait.

        `credential` is the ID of a real one that it is about. AuditRows says what is merged.
        """
        with self._lock:
            self._rows.add(event, credential)

    def count_limited(self, source: str | None) -> None:
        """Count a request that came too often."""
        self._limited.count(source)

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

    def _write(self, *, all_of_them: bool = False) -> None:
        with self._lock:
            rows = self._rows.take(all_of_them=all_of_them)
            used, self._used = self._used, {}
        if not rows and not used:
            return
        try:
            self._store.write([event for _, event in rows], used)
        except RecordsUnavailableError:
            with self._lock:
                self._used = used | self._used
                self._rows.put_back(rows)

    def _work(self) -> None:
        while not self._stop.wait(INTERVAL_SECONDS):
            try:
                with contextlib.suppress(RecordsUnavailableError):
                    self._every_turn()
                self.write()
                self._limited.report()
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
