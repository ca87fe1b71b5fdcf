"""The single writer: takes what is waiting, and commits it batch by batch, in order."""

import contextlib
import logging
import uuid
from collections.abc import Iterable, Sequence
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Final

from backend.errors import HubUpdateError, ProvisioningError, RecordsUnavailableError
from backend.services.hand_made_peers import HandMadePeers
from backend.services.hub_mirror import HubMirror
from backend.services.ports import Action, Batch, BatchSteps, Change, Journal, Peer

log = logging.getLogger(__name__)

MAX_BATCH: Final = 512
# How often, when nothing else is to do, the hub is looked at: seconds.
HEAL_INTERVAL_SECONDS: Final = 1.0


def run_sequence(steps: BatchSteps, batch_id: str) -> None:
    """Take one batch through intent, apply and applied; or, where apply fails for good, take it back."""
    steps.intend(batch_id)
    if steps.apply(batch_id) is None:
        steps.confirm(batch_id)
    else:
        steps.revoke(batch_id)


class HubCommitter:
    """Owns the one thread that writes records, file and interface.

    A change is settled exactly once: with None when it is in all three, or with the error that says
    why it is in none.
    """

    def __init__(self, journal: Journal, mirror: HubMirror, hand_made: HandMadePeers) -> None:
        self._journal = journal
        self._mirror = mirror
        self._hand_made = hand_made
        self._queue: SimpleQueue[Change | None] = SimpleQueue()
        # Guards _open, so that no change is queued behind the end of the queue.
        self._lock = Lock()
        self._open = False
        self._thread = Thread(target=self._work, name="hub-committer", daemon=True)
        self._generation = 0
        # The batch whose outcome has to be looked up before anything else is written.
        self._doubtful: Batch | None = None
        self._unmarked = False

    def load(self) -> Sequence[Peer]:
        """Read the records; the first thing to be called."""
        state = self._journal.load()
        self._generation = state.generation
        return state.peers

    def start(self, peers: Sequence[Peer]) -> None:
        """Bring the hub up to the records once, take up what an earlier process left, and begin."""
        if self._mirror.replace(peers) is None:
            self._mark_applied()
        self._journal.launch(self._apply)
        self._open = True
        self._thread.start()

    def submit(self, change: Change) -> None:
        """Hand a change over; raise HubUpdateError when the service is stopping."""
        with self._lock:
            if not self._open:
                raise HubUpdateError("the service is stopping; try again in a moment")
            self._queue.put(change)

    def close(self) -> None:
        """Commit what is still waiting, then stop."""
        with self._lock:
            was_open, self._open = self._open, False
            self._queue.put(None)
        if was_open:
            self._thread.join()
        self._journal.close()

    @property
    def live(self) -> bool:
        """False where only the file is kept."""
        return self._mirror.live

    def check(self) -> None:
        """Raise a ProvisioningError unless a change could be committed now."""
        self._journal.check()
        self._mirror.check()
        if self._doubtful is not None:
            raise RecordsUnavailableError("the outcome of an earlier change is still being looked up")

    def _work(self) -> None:
        running = True
        while running:
            changes, running = self._take()
            try:
                if self._doubtful is not None and not self._resolve(self._doubtful):
                    reason = "the records don't answer; nothing was changed, try again in a moment"
                    _settle(changes, RecordsUnavailableError(reason))
                elif changes:
                    self._commit(changes)
                else:
                    self._idle()
                self._journal.tidy()
            except Exception:
                # The thread must outlive whatever happened, or every later request would wait for ever.
                log.exception("committer_failed")
                _settle(
                    changes, HubUpdateError("the change failed in an unforeseen way; see the service's log")
                )

    def _take(self) -> tuple[list[Change], bool]:
        """Wait for work; return everything that is waiting, and whether there will be more."""
        changes: list[Change] = []
        try:
            item = self._queue.get(timeout=HEAL_INTERVAL_SECONDS)
            while item is not None:
                changes.append(item)
                if len(changes) >= MAX_BATCH:
                    return changes, True
                item = self._queue.get_nowait()
        except Empty:
            return changes, True
        return changes, False

    def _commit(self, changes: list[Change]) -> None:
        try:
            self._mirror.refresh()
        except HubUpdateError as exc:
            _settle(changes, exc)
            return
        for change in changes:
            if change.action is Action.ADD:
                change.refusal = self._hand_made.conflict(change.peer)
        batch = Batch(uuid.uuid4().hex, self._generation + 1, changes)
        if batch.accepted():
            try:
                self._journal.run(batch)
            except Exception as exc:  # noqa: BLE001 - whatever it was, the records know what became of it
                # Without the traceback: a driver's message may quote a row.
                reason = str(exc) if isinstance(exc, ProvisioningError) else type(exc).__name__
                log.error("batch_in_doubt", extra={"batch": batch.batch_id, "reason": reason})  # noqa: TRY400 - see above
                self._doubtful = batch
                self._resolve(batch)
                return
            self._generation = batch.generation
        if batch.failure is not None:
            log.error("batch_failed", extra={"changes": len(changes), "reason": batch.failure})
        for change in changes:
            failed = None if batch.failure is None else HubUpdateError(batch.failure)
            change.settle(change.refusal or failed)

    def _resolve(self, batch: Batch) -> bool:
        """Find out from the records what became of a batch, and bring the hub up to them.

        Not before both have succeeded is anybody told anything: until then neither answer would be true.
        """
        try:
            state = self._journal.load()
        except ProvisioningError:
            return False
        if self._mirror.replace(state.peers) is not None:
            return False
        self._generation = state.generation
        self._doubtful = None
        self._mark_applied()
        recorded = {peer.node_id: peer for peer in state.peers}
        for change in batch.changes:
            there = recorded.get(change.peer.node_id) == change.peer
            done = there if change.action is Action.ADD else not there
            undone = RecordsUnavailableError(
                "the records could not be written; nothing was changed, try again"
            )
            change.settle(change.refusal or (None if done else undone))
        return True

    def _idle(self) -> None:
        with contextlib.suppress(HubUpdateError):  # heal() meets it too, and it is logged there once
            self._mirror.refresh()
        if self._mirror.heal() or self._unmarked:
            self._mark_applied()

    def _mark_applied(self) -> None:
        """Note that the hub has reached the newest generation; or that this remains to be noted."""
        try:
            self._journal.mark_applied(self._generation)
        except ProvisioningError:
            self._unmarked = True
        else:
            self._unmarked = False

    def _apply(self, batch: Batch | None) -> str | None:
        """Apply a batch; or, for one that an earlier process left behind, see that the hub is up to date."""
        failure = self._mirror.apply(batch.accepted() if batch is not None else ())
        if batch is not None:
            batch.failure = failure
        return failure


def _settle(changes: Iterable[Change], error: ProvisioningError) -> None:
    for change in changes:
        change.settle(change.refusal or error)
