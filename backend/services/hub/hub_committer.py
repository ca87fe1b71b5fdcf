"""The single writer: takes what is waiting, and commits it batch by batch, in order."""

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Final

from backend.errors import (
    HubUpdateError,
    OutcomeUnknownError,
    OvertakenError,
    ProvisioningError,
    RecordsUnavailableError,
)
from backend.models.wireguard.peer import Peer
from backend.services.batches import settle
from backend.services.hub.history import HubHistory
from backend.services.hub.hub_mirror import HubMirror
from backend.services.hub.operator_peers import OperatorPeers
from backend.services.hub.prepared_changes import PreparedChanges
from backend.services.ports import Action, Batch, Change, Journal

log = logging.getLogger(__name__)

MAX_BATCH: Final = 512
# How often, when nothing else is to do, the hub is looked at: seconds.
HEAL_INTERVAL_SECONDS: Final = 1.0
# From when on a batch under way says that something is wrong: seconds.
_LONG_BATCH_SECONDS: Final = 5.0
# From when on records that don't answer leave the outcome of a change in doubt: seconds.
_DOUBT_SECONDS: Final = 2.0
# How long a workflow waits for more work before it ends, and how long it may go on: seconds.
_LINGER_SECONDS: Final = 0.05
_LONGEST_BURST_SECONDS: Final = 2.0
# How long a stop waits for what was accepted: seconds.
_STOP_SECONDS: Final = 10.0

_LOOKED_UP: Final = "the outcome of an earlier change is still being looked up"
_UNFORESEEN: Final = "the change failed in an unforeseen way; see the service's log"


class HubCommitter:
    """Owns the one thread that writes records, file and interface.

    A change is settled exactly once: with None when it is in all three, or with the error that says
    why it is in none.
    """

    def __init__(
        self, journal: Journal, mirror: HubMirror, hand_made: OperatorPeers, history: HubHistory
    ) -> None:
        self._journal = journal
        self._mirror = mirror
        self._hand_made = hand_made
        self._history = history
        # Told of peers that an operator's decision has taken into the records.
        self._on_adoption: Callable[[Sequence[Peer]], None] = lambda _: None
        self._queue: SimpleQueue[Change | None] = SimpleQueue()
        # Guards _open, so that no change is queued behind the end of the queue.
        self._lock = Lock()
        self._open = False
        self._thread = Thread(target=self._work, name="hub-committer", daemon=True)
        # The generation of the newest intent, how far the hub has come, and how far the records know of it.
        self._generation = 0
        self._reached = 0
        self._noted = 0
        self._running = True
        # The batch that is to be begun with, and the one that is under way.
        self._first: Batch | None = None
        self._batch: Batch | None = None
        self._burst_until = 0.0
        # The batch whose outcome has to be looked up before anything else is written.
        self._doubtful: Batch | None = None
        # What the file is to be for the batch that is under way.
        self._prepared: PreparedChanges | None = None
        # Whether the last batch failed: the next one writes nothing before its file can be written.
        self._cautious = False
        # What was refused last, so that a cause is logged once.
        self._refused: str | None = None
        self._looked_at = float("-inf")
        # Set once, for good: another process writes the records.
        self._overtaken: OvertakenError | None = None
        self._busy_since: float | None = None

    def load(self) -> Sequence[Peer]:
        """Read the records; the first thing to be called."""
        state = self._history.load()
        self._generation, self._noted = state.generation, state.applied_generation
        self._reached = self._noted
        return state.peers

    def start(self, peers: Sequence[Peer], on_adoption: Callable[[Sequence[Peer]], None]) -> None:
        """Bring the hub up to the records once, take up what an earlier process left, and begin.

        `on_adoption` is told of peers that come into the records by an operator's decision.
        """
        self._on_adoption = on_adoption
        self._mirror.assume(peers)
        # `wg` takes as long for many peers as the journal for its launch, and neither needs the other.
        with ThreadPoolExecutor(1, "hub-start") as executor:
            reconciled = executor.submit(self._mirror.reconcile)
            self._journal.launch(self._apply)
        if reconciled.result() is None:
            self._reached = self._generation
            self._history.reach(self._reached)
            self._note_reached()
        self._open = True
        self._thread.start()

    def submit(self, change: Change) -> None:
        """Hand a change over; raise HubUpdateError or RecordsUnavailableError where it can't be taken."""
        if self._mirror.paused:
            # Not even for a moment: it would hold a name or an address that an adopted peer has.
            raise self._paused()
        if self._doubtful is not None:
            raise RecordsUnavailableError(f"{_LOOKED_UP}; nothing was changed, try again in a moment")
        if self.in_doubt():
            raise RecordsUnavailableError(
                "the records do not answer; nothing was changed, try again in a moment"
            )
        with self._lock:
            if not self._open:
                raise HubUpdateError("the service is stopping; try again in a moment")
            self._queue.put(change)

    def stop(self) -> None:
        """Commit what is still waiting, and take nothing more.

        What can't be committed in time is taken up by the next start, as after a crash; nobody is told
        anything about it.
        """
        with self._lock:
            was_open, self._open = self._open, False
            self._queue.put(None)
        if was_open:
            self._thread.join(_STOP_SECONDS)
        if self._doubtful is not None:
            settle(self._doubtful.changes, OutcomeUnknownError("the service has stopped; ask again later"))

    @property
    def live(self) -> bool:
        """False where only the file is kept."""
        return self._mirror.live

    def in_doubt(self) -> bool:
        """Whether the records don't say how the changes under way end. Costs nothing."""
        since = self._journal.busy_since
        return self._doubtful is not None or (since is not None and time.monotonic() - since > _DOUBT_SECONDS)

    @property
    def notices(self) -> tuple[str, ...]:
        """What an operator should know, though the service works."""
        return self._history.notices

    def check(self) -> None:
        """Raise a ProvisioningError where changes wait for something already."""
        if self._overtaken is not None:
            raise self._overtaken
        since = self._busy_since
        if since is not None and time.monotonic() - since > _LONG_BATCH_SECONDS:
            raise HubUpdateError("a batch takes unusually long; its requests are waiting")
        if self._doubtful is not None:
            raise RecordsUnavailableError(_LOOKED_UP)

    def check_records(self) -> None:
        """Raise RecordsUnavailableError unless a change could be written to the records."""
        self._journal.check_writable()

    def check_hub(self) -> None:
        """Raise HubUpdateError unless a change could be brought to file and interface."""
        self._mirror.check()

    def _work(self) -> None:
        while self._running:
            changes = self._take(HEAL_INTERVAL_SECONDS)
            if not self._running and not changes:
                return
            try:
                self._turn(changes)
            except OvertakenError as exc:
                self._overtaken = exc
                log.critical("overtaken", extra={"reason": str(exc)})
                settle(changes, exc)
                self._give_up(exc)
            except Exception:
                # The thread must outlive whatever happened, or every later request would wait for ever.
                log.exception("committer_failed")
                reason = HubUpdateError(_UNFORESEEN)
                settle(changes, reason)
                self._give_up(reason)
            self._busy_since = None

    def _give_up(self, reason: ProvisioningError) -> None:
        """Settle every batch that is not settled yet with this error."""
        self._discard_prepared()
        for batch in (self._first, self._batch, self._doubtful):
            if batch is not None:
                settle(batch.changes, reason)
        self._first = self._batch = self._doubtful = None

    def _turn(self, changes: list[Change]) -> None:
        """Do what is to be done next: find out what became of a batch, commit one, or see to the hub."""
        if self._overtaken is not None:
            settle(changes, self._overtaken)
            return
        if self._doubtful is not None:
            reason = self._resolve(self._doubtful)
            if reason is not None:
                settle(changes, reason)
                return
        if changes:
            self._commit(changes)
        if self._doubtful is None:
            self._look(idle=not changes)
        with contextlib.suppress(RecordsUnavailableError):  # what is left over can wait
            self._journal.tidy()

    def _take(self, patience: float) -> list[Change]:
        """Wait for work, at most so many seconds; return everything that is waiting."""
        changes: list[Change] = []
        with contextlib.suppress(Empty):
            item = self._queue.get(timeout=patience)
            while item is not None:
                changes.append(item)
                if len(changes) >= MAX_BATCH:
                    return changes
                item = self._queue.get_nowait()
            self._running = False
        return changes

    def _commit(self, changes: list[Change]) -> None:
        self._first = self._prepare(changes)
        if self._first is None:
            return
        self._burst_until = time.monotonic() + _LONGEST_BURST_SECONDS
        try:
            self._journal.run(self._next)
        except OvertakenError:
            raise
        except Exception as exc:  # noqa: BLE001 - whatever it was, the records know what became of it
            # Records that are away say so in the log themselves, once.
            if not isinstance(exc, RecordsUnavailableError):
                # Without the traceback: a driver's message may quote a row.
                reason = str(exc) if isinstance(exc, ProvisioningError) else type(exc).__name__
                log.error("burst_failed", extra={"reason": reason})  # noqa: TRY400 - see above
            if self._first is not None:
                # Nothing of it has been begun.
                self._give_up(RecordsUnavailableError("the records can't be written; nothing was changed"))
            elif self._batch is not None:
                self._discard_prepared()
                self._doubtful, self._batch = self._batch, None
                self._resolve(self._doubtful)
        else:
            self._finish()

    def _next(self) -> Batch | None:
        """Return the burst's next batch, or None when there has been nothing to do for a moment.

        What a burst shares is the cost of beginning and ending a workflow; it waits for nothing that isn't
        there already, except after its last batch.
        """
        self._finish()
        batch, self._first = self._first, None
        while batch is None:
            if time.monotonic() > self._burst_until:
                return None
            changes = self._take(_LINGER_SECONDS) if self._running else []
            if not changes:
                return None
            batch = self._prepare(changes)
        self._batch = batch
        return batch

    def _prepare(self, changes: list[Change]) -> Batch | None:
        """Make a batch of what can be done, and refuse the rest at once."""
        self._busy_since = time.monotonic()
        try:
            self._mirror.refresh()
            self._journal.check()
            self._heal()
            self._mirror.require_interface()
            for change in changes:
                if change.action is Action.ADD:
                    change.refusal = self._hand_made.conflict(change.peer)
            batch = Batch(self._generation + 1, self._reached, changes)
            if batch.accepted():
                if self._cautious:
                    # What has just failed may fail again, and then not even the records are touched.
                    self._mirror.check_replaceable()
                self._prepared = self._mirror.prepare(batch.accepted())
        except OvertakenError:
            settle(changes, OvertakenError())
            raise
        except ProvisioningError as exc:
            self._log_refusal(exc, len(changes))
            self._discard_prepared()
            settle(changes, exc)
            return None
        except Exception:
            # In the middle of a burst these changes are known here alone; and nothing of them is written.
            log.exception("committer_failed")
            self._discard_prepared()
            settle(changes, HubUpdateError(_UNFORESEEN))
            return None
        if self._prepared is not None:
            return batch
        for change in changes:
            settle([change], change.refusal)
        return None

    def _finish(self) -> None:
        """End the batch that is under way, which has gone through its sequence."""
        batch, self._batch = self._batch, None
        if batch is None:
            return
        self._generation, self._noted = batch.generation, batch.reached
        failed = None
        if batch.failure is None:
            self._reached = batch.generation
            self._refused = None
        else:
            failed = HubUpdateError(batch.failure)
            self._log_refusal(failed, len(batch.changes))
        self._cautious = failed is not None
        settle(batch.changes, failed)
        self._busy_since = None

    def _heal(self) -> None:
        """See that the hub is in step before more is asked of it; raise HubUpdateError where it can't be."""
        if self._mirror.paused:
            raise self._paused()
        if self._mirror.problem is not None and not self._mirror.heal():
            raise HubUpdateError(self._mirror.problem or "the hub could not be brought up to date")

    def _paused(self) -> HubUpdateError:
        return HubUpdateError(self._mirror.problem or "the service is paused")

    def _resolve(self, batch: Batch) -> ProvisioningError | None:
        """Find out from the records what became of a batch, and bring the hub up to them.

        Not before both have succeeded is anybody told anything: until then neither answer would be true.
        Return what stands in the way.
        """
        try:
            self._journal.check()
            state = self._journal.load()
        except OvertakenError:
            raise
        except ProvisioningError as exc:
            return exc
        if state.generation not in (batch.generation - 1, batch.generation):
            raise OvertakenError
        self._mirror.assume(state.peers)
        problem = self._mirror.reconcile()
        if problem is not None:
            return HubUpdateError(problem)
        self._generation = self._reached = state.generation
        self._history.reach(self._reached)
        self._doubtful = None
        self._note_reached()
        recorded = {peer.node_id: peer for peer in state.peers}
        undone = RecordsUnavailableError("the records could not be written; nothing was changed, try again")
        for change in batch.changes:
            there = recorded.get(change.peer.node_id) == change.peer
            done = not there if change.action is Action.REMOVE else there
            settle([change], None if done else undone)
        return None

    def _look(self, *, idle: bool) -> None:
        """Once a second, whatever the load: see to the hub, and to what was decided about it."""
        if time.monotonic() - self._looked_at < HEAL_INTERVAL_SECONDS:
            return
        self._looked_at = time.monotonic()
        try:
            # Whose records they are, before the hub is made equal to what they were.
            self._journal.check()
        except OvertakenError:
            raise
        except RecordsUnavailableError:
            pass  # what the hub has to be is in memory
        self._mirror.remove_leftovers()
        with contextlib.suppress(HubUpdateError):  # heal() meets it too, and it is logged there once
            self._mirror.refresh()
        with contextlib.suppress(RecordsUnavailableError, HubUpdateError):  # later, then
            self._follow_decision()
        if self._mirror.heal(idle=idle):
            self._reached = self._generation
            self._history.reach(self._reached)
        self._note_reached()

    def _follow_decision(self) -> None:
        state = self._history.look(self._generation)
        if state is None:
            return
        # What was handed over before the pause was seen.
        while changes := self._take(0.0):
            settle(changes, self._paused())
        self._generation = state.generation
        self._on_adoption(state.peers)
        self._mirror.assume(state.peers)
        self._history.go_on()

    def _note_reached(self) -> None:
        """Write down how far the hub has come, where the records don't know; later, if they don't answer."""
        if self._noted < self._reached:
            with contextlib.suppress(RecordsUnavailableError):
                self._journal.mark_applied(self._reached)
                self._noted = self._reached

    def _apply(self, batch: Batch | None) -> str | None:
        """Apply a batch; or, for one that an earlier process left behind, see that the hub is up to date."""
        if batch is None:
            # Each start reconciles the hub with all the records, and goes on until that has succeeded.
            return None
        prepared, self._prepared = self._prepared, None
        accepted = batch.accepted()
        if prepared is not None and list(prepared.changes) != accepted:
            # The records have refused some of them.
            prepared.discard()
            prepared = None
        try:
            batch.failure = self._mirror.apply(prepared or self._mirror.prepare(accepted))
        except HubUpdateError as exc:
            batch.failure = str(exc)
        if batch.failure is None:
            # It's in all three: what is still to be written is the workflow's own bookkeeping.
            self._history.reach(batch.generation)
            settle(batch.changes, None)
        return batch.failure

    def _discard_prepared(self) -> None:
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            prepared.discard()

    def _log_refusal(self, error: ProvisioningError, changes: int) -> None:
        """Log a cause once, however many changes it refuses; not what mirror or records say themselves."""
        reason = str(error)
        if not isinstance(error, RecordsUnavailableError) and reason not in {
            self._refused,
            self._mirror.problem,
        }:
            log.error("changes_refused", extra={"changes": changes, "reason": reason})
        self._refused = reason
