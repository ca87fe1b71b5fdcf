"""Commits changes to the records, in batches, each under the hub's next generation.

It knows nothing of wg0.conf and the interface: the agent applies what is committed.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Final

from backend.errors import (
    HubUpdateError,
    OvertakenError,
    PausedError,
    RecordsUnavailableError,
)
from backend.models.wireguard.peer import Change
from backend.models.wireguard.records import RecordedState
from backend.services.hub.removal_guard import RemovalGuard
from backend.services.ports import Records

MAX_BATCH: Final = 512
# Records that don't answer for so many seconds leave the outcome of a change in doubt.
_DOUBT_SECONDS: Final = 2.0
_LOOKED_UP: Final = "the outcome of an earlier change is still being looked up"


class Writer:
    """The queue of changes, and the one place that commits them. Used by the agent's thread.

    Any thread may call `submit`, `close`, `in_doubt` and the checks.
    """

    def __init__(self, records: Records, guard: RemovalGuard) -> None:
        self._records = records
        self._guard = guard
        self._queue: SimpleQueue[Change | None] = SimpleQueue()
        # Guards _open, so that no change is queued after `close`.
        self._lock = Lock()
        self._open = False
        # The newest generation; the one that the hub has reached; and the one that the records have as
        # observed_generation.
        self.generation = 0
        self.observed = 0
        self._noted = 0
        # Changes that may or may not be committed: the records have to be asked before anything else.
        self.doubtful: Sequence[Change] = ()
        # Since when the agent has been waiting for the records, by time.monotonic(), or None.
        self._waiting_since: float | None = None

    def load(self) -> RecordedState:
        """Read the desired state; raise RecordsUnavailableError."""
        with self.waiting():
            state = self._records.load(wait_for_commit=bool(self.doubtful))
        self.generation = state.generation
        self.observed = self._noted = state.observed_generation
        return state

    def open(self) -> None:
        """Begin to take changes."""
        self._open = True

    def submit(self, change: Change) -> None:
        """Queue a change; raise HubUpdateError or RecordsUnavailableError where none can be taken."""
        if self._guard.pause_error is not None:
            # Refused at once: a queued change would hold a name or an address that an adopted peer may have.
            raise PausedError(*self._guard.pause_error.args)
        if self.doubtful:
            raise RecordsUnavailableError(f"{_LOOKED_UP}; nothing was changed, try again in a moment")
        if self.in_doubt():
            raise RecordsUnavailableError(
                "the records do not answer; nothing was changed, try again in a moment"
            )
        with self._lock:
            if not self._open:
                raise HubUpdateError("the service is stopping; try again in a moment")
            self._queue.put(change)

    def close(self) -> None:
        """Take no more changes; those in the queue are still committed."""
        with self._lock:
            self._open = False
        self.wake()

    def wake(self) -> None:
        """End the wait of `take`."""
        self._queue.put(None)

    @property
    def queued(self) -> int:
        """About how many changes wait to be taken: a call of `wake` counts until `take` has seen it."""
        return self._queue.qsize()

    @property
    def is_drained(self) -> bool:
        """Whether nothing is queued, and nothing will be."""
        return not self._open and self._queue.empty()

    def take(self, patience: float | None) -> list[Change]:
        """Wait for a change, at most `patience` seconds; return all that are queued, none after `wake`."""
        changes: list[Change] = []
        with suppress(Empty):
            change = self._queue.get(timeout=patience)
            while change is not None:
                changes.append(change)
                if len(changes) == MAX_BATCH:
                    break
                change = self._queue.get_nowait()
        return changes

    def drain(self) -> list[Change]:
        """Return everything that is queued."""
        changes: list[Change] = []
        while not self._queue.empty():
            changes += self.take(0)
        return changes

    def commit(self, changes: Sequence[Change]) -> None:
        """Write changes to the records as the next generation. One that is refused has its `refusal`.

        Raises OvertakenError. After any other error it is not known whether they are committed.
        """
        generation = self.generation + 1
        with self.waiting():
            self._records.commit(generation, self.observed, changes)
        self.generation, self._noted = generation, self.observed

    def compensate(self, changes: Sequence[Change], reason: str) -> None:
        """Undo the newest generation, which could not be applied."""
        with self.waiting():
            self._records.compensate(self.generation, changes, reason)

    def note_observed(self) -> None:
        """Note in the records how far the hub has come; raise RecordsUnavailableError."""
        if self._noted < self.observed:
            with self.waiting():
                self._records.note_observed(self.observed)
            self._noted = self.observed

    def require_records(self) -> None:
        """Raise RecordsUnavailableError unless the records answer; OvertakenError if they are another's."""
        with self.waiting():
            self._records.check()

    def look_up(self) -> RecordedState:
        """Read what became of the changes in doubt; raise RecordsUnavailableError or OvertakenError."""
        self.require_records()
        before = self.generation
        state = self.load()
        # The batch in doubt was to become the next generation, or the newest one was to be compensated.
        if state.generation not in {before, before + 1}:
            raise OvertakenError
        return state

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measure the time in here: `in_doubt` is True when the records take too long."""
        self._waiting_since = time.monotonic()
        try:
            yield
        finally:
            self._waiting_since = None

    @contextmanager
    def working(self) -> Iterator[None]:
        """Stop that measurement inside of `waiting`, while the agent doesn't wait for the records."""
        self._waiting_since = None
        try:
            yield
        finally:
            self._waiting_since = time.monotonic()

    def in_doubt(self) -> bool:
        """Whether the outcome of changes can't be known now: the records are slow, or lost an answer."""
        since = self._waiting_since
        return bool(self.doubtful) or (since is not None and time.monotonic() - since > _DOUBT_SECONDS)

    def check(self) -> None:
        """Raise RecordsUnavailableError where changes are in doubt."""
        if self.doubtful:
            raise RecordsUnavailableError(_LOOKED_UP)
