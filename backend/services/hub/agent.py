"""The agent beside the hub: one thread that commits what was decided, applies it, and keeps the hub so.

It takes the changes that wait as one batch. The batch is committed under the hub's next generation, then
applied to wg0.conf and the interface; what can't be applied is taken back. Between batches the agent does
what loops.py asks of it.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from threading import Thread
from typing import Final

from backend.errors import (
    HubUpdateError,
    OutcomeUnknownError,
    OvertakenError,
    ProvisioningError,
    RecordsUnavailableError,
)
from backend.models.wireguard.peer import Change, accepted
from backend.services.hub.history import HubHistory
from backend.services.hub.operator_peers import OperatorPeers
from backend.services.hub.reconciler import PreparedChanges, Reconciler
from backend.services.hub.writer import Writer
from backend.services.no_metrics import NO_METRICS
from backend.services.peer_directory import PeerDirectory
from backend.services.ports import Metrics
from backend.services.stopwatch import measured

log = logging.getLogger(__name__)

# A batch that takes longer makes `/readyz` red: seconds.
_LONG_BATCH_SECONDS: Final = 5.0
# A burst ends when no change comes for the first, and at the latest after the second: seconds.
_LINGER_SECONDS: Final = 0.05
_LONGEST_BURST_SECONDS: Final = 2.0
# A stop waits so long for changes that were accepted: seconds.
_STOP_SECONDS: Final = 10.0
_UNFORESEEN: Final = "the change failed in an unforeseen way; see the service's log"

Run = Callable[[Callable[[], None]], None]


class Agent:
    """Owns the one thread that writes records, file and interface.

    Each change ends exactly once: when it is in all three, or with the error that says why it is in none.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the parts that it brings together
        self,
        writer: Writer,
        reconciler: Reconciler,
        directory: PeerDirectory,
        operator_peers: OperatorPeers,
        history: HubHistory,
        run: Run,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        """`run` runs a function in this thread; a durable service makes a workflow of it."""
        self._writer = writer
        self._reconciler = reconciler
        self._directory = directory
        self._operator_peers = operator_peers
        self._history = history
        self._run = run
        self._metrics = metrics
        self._thread = Thread(target=self._work, name="hub-agent", daemon=True)
        # Work that loops.py hands over by `call`, with the future that the caller waits for.
        self._tasks: deque[tuple[Callable[[], object], Future[object]]] = deque()
        # Whether a batch was applied since the last `maintain`.
        self._busy = False
        # Whether the last batch failed: the next one checks that the file can be replaced before it commits.
        self._cautious = False
        # The reason for the last refusal, so that a cause is logged once.
        self._refused: str | None = None
        # Set once, for good: another process writes the records.
        self._overtaken: OvertakenError | None = None
        self._batch_since: float | None = None

    def start(self, launch: Callable[[], None] = lambda: None) -> None:
        """Load the records, reconcile once, and begin to take changes.

        `launch` runs at the same time as the reconciliation, because both take long and are independent.
        """
        state = self._writer.load()
        if self._history.compare(state):
            state = self._writer.load()
        self._directory.load(state.peers)
        self._reconciler.set_desired(state.peers)
        with ThreadPoolExecutor(1, "hub-start") as executor:
            reconciled = executor.submit(self._reconciler.reconcile)
            launch()
        if reconciled.result() is None:
            self._observe()
            with suppress(RecordsUnavailableError):
                self._writer.note_observed()
        self._writer.open()
        self._thread.start()

    def stop(self) -> None:
        """Take no more changes; commit and apply those that wait.

        The next start applies what was committed and not applied in time, as after a crash.
        """
        self._writer.close()
        if self._thread.is_alive():
            self._thread.join(_STOP_SECONDS)
        while self._tasks:
            self._tasks.popleft()[1].cancel()
        # Taken from the agent's thread, which may still look them up: each change ends once.
        changes, self._writer.doubtful = self._writer.doubtful, ()
        self._end(changes, OutcomeUnknownError("the service has stopped; ask again later"))

    def call(self, task: Callable[[], object]) -> None:
        """Run a task in the agent's thread, between two batches; wait for its end and raise its error."""
        done: Future[object] = Future()
        self._tasks.append((task, done))
        self._writer.wake()
        with suppress(CancelledError):
            done.result()

    def maintain(self) -> None:
        """Resolve changes in doubt, carry out an operator's decision, reconcile after drift or an edit.

        A loop calls this each second.
        """
        self.call(self._maintain)

    def check(self) -> None:
        """Raise the ProvisioningError that a change would meet now."""
        if self._overtaken is not None:
            raise self._overtaken
        since = self._batch_since
        if since is not None and time.monotonic() - since > _LONG_BATCH_SECONDS:
            raise HubUpdateError("a batch takes unusually long; its requests are waiting")
        self._writer.check()

    def _work(self) -> None:
        while not self._writer.is_drained:
            changes = self._writer.take(None)
            if changes:
                self._begin(changes)
            while self._tasks:
                task, done = self._tasks.popleft()
                self._do(task, done)
        with suppress(RecordsUnavailableError):
            self._writer.note_observed()

    def _do(self, task: Callable[[], object], done: Future[object]) -> None:
        try:
            task()
        except Exception as exc:  # noqa: BLE001 - raised where it is waited for
            self._note_overtaken(exc)
            done.set_exception(exc)
        else:
            done.set_result(None)

    def _begin(self, changes: list[Change]) -> None:
        """Run these changes, and those that come meanwhile, as one burst."""
        try:
            self._require_certainty()
            # Before the workflow's own write, whose error would not say that a disk is full.
            self._writer.require_records()
            # A workflow writes when it begins and when it ends; the batches in it count their own waits.
            with self._writer.waiting():
                self._run(partial(self._burst, changes))
        except ProvisioningError as exc:
            self._note_overtaken(exc)
            self._end(self._untouched(changes), exc)
        except Exception as exc:  # noqa: BLE001 - the workflow's own: its work ends its changes itself
            # Without the traceback: a driver's message may quote a row.
            log.error("burst_failed", extra={"reason": type(exc).__name__})  # noqa: TRY400 - no traceback
            self._end(
                self._untouched(changes),
                RecordsUnavailableError("the records can't be written; nothing was changed"),
            )

    def _require_certainty(self) -> None:
        """Resolve changes in doubt; raise the ProvisioningError that keeps all others from a commit."""
        if self._overtaken is not None:
            raise self._overtaken
        if self._writer.doubtful:
            self._resolve_doubt()

    def _untouched(self, changes: list[Change]) -> list[Change]:
        """Return the changes of a failed burst that were not begun."""
        return [
            change for change in changes if not change.applied.done() and change not in self._writer.doubtful
        ]

    def _burst(self, changes: list[Change]) -> None:
        """Commit and apply batches until none is queued for a moment, or the burst is at its longest.

        All batches of a burst run in one workflow, whose cost they share.
        """
        until = time.monotonic() + _LONGEST_BURST_SECONDS
        with self._writer.working():
            while changes:
                self._carry_out(changes)
                if self._writer.doubtful or time.monotonic() > until:
                    return
                changes = self._writer.take(_LINGER_SECONDS)

    def _carry_out(self, changes: list[Change]) -> None:
        """Commit one batch and apply it; each of its changes ends here, unless the records don't answer."""
        self._batch_since = time.monotonic()
        self._busy = True
        self._metrics.batch_begun(len(changes))
        try:
            with measured(partial(self._metrics.stage_ended, "prepare")):
                prepared = self._prepare(changes)
            if prepared is None:
                self._end(changes, None)
            else:
                self._commit_and_apply(changes, prepared)
        except ProvisioningError as exc:
            self._log_refusal(exc, len(changes))
            self._end(changes, exc)
            if isinstance(exc, OvertakenError):
                raise
        except Exception:
            log.exception("agent_failed")
            self._end(changes, HubUpdateError(_UNFORESEEN))
        finally:
            self._batch_since = None

    def _prepare(self, changes: list[Change]) -> PreparedChanges | None:
        """Refuse changes that can't be applied; write the file for the rest. None if none is left."""
        self._reconciler.refresh()
        self._writer.require_records()
        self._require_reconciled()
        self._reconciler.require_interface()
        for change in changes:
            if change.adds:
                change.refusal = self._operator_peers.conflict(change.peer)
        left = accepted(changes)
        if not left:
            return None
        # The last batch failed, and this one may fail in the same way: find out before the commit.
        return self._reconciler.prepare(left, cautious=self._cautious)

    def _commit_and_apply(self, changes: list[Change], prepared: PreparedChanges) -> None:
        try:
            with measured(partial(self._metrics.stage_ended, "commit")):
                self._writer.commit(accepted(changes))
            with measured(partial(self._metrics.stage_ended, "apply")):
                failure = self._apply(accepted(changes), prepared)
            self._cautious = failure is not None
            if failure is not None:
                self._writer.compensate(accepted(changes), failure)
        except OvertakenError:
            prepared.staged.discard()
            raise
        except Exception as exc:  # noqa: BLE001 - the records are asked what was committed
            prepared.staged.discard()
            # An outage of the records is logged once by Availability.
            if not isinstance(exc, RecordsUnavailableError):
                # Without the traceback: a driver's message may quote a row.
                log.error("batch_failed", extra={"reason": type(exc).__name__})  # noqa: TRY400 - no traceback
            self._writer.doubtful = changes
            with suppress(ProvisioningError):
                self._resolve_doubt()
            return
        if failure is not None:
            raise HubUpdateError(failure)
        self._refused = None
        self._end(changes, None)

    def _apply(self, changes: list[Change], prepared: PreparedChanges) -> str | None:
        """Apply what was committed; return why it could not be done, or None."""
        try:
            if list(prepared.changes) != changes:
                # The records have refused some of them.
                prepared.staged.discard()
                prepared = self._reconciler.prepare(changes)
            failure = self._reconciler.apply(prepared)
        except HubUpdateError as exc:
            return str(exc)
        if failure is None:
            self._observe()
        return failure

    def _end(self, changes: Sequence[Change], error: ProvisioningError | None) -> None:
        """End changes: each with its own refusal, or else the error, or None for success."""
        for change in changes:
            failure = change.refusal or error
            self._directory.end(change, applied=failure is None)
            if failure is not None:
                change.applied.set_exception(failure)
                continue
            peer = change.peer
            if change.adds:
                log.info("peer_provisioned", extra={"node_id": peer.node_id, "address": str(peer.address)})
            elif change.removes:
                log.info("peer_deprovisioned", extra={"node_id": peer.node_id})
            change.applied.set_result(None)

    def _resolve_doubt(self) -> None:
        """Read from the records whether the changes in doubt were committed, and reconcile.

        No change ends before both have succeeded: until then neither success nor failure would be true.
        Raises ProvisioningError where that isn't possible yet.
        """
        state = self._writer.look_up()
        self._reconciler.set_desired(state.peers)
        problem = self._reconciler.reconcile()
        if problem is not None:
            raise HubUpdateError(problem)
        changes, self._writer.doubtful = self._writer.doubtful, ()
        self._observe()
        recorded = {peer.node_id: peer for peer in state.peers}
        undone = RecordsUnavailableError("the records could not be written; nothing was changed, try again")
        for change in changes:
            done = recorded.get(change.peer.node_id) == change.after
            self._end([change], None if done else undone)

    def _maintain(self) -> None:
        idle, self._busy = not self._busy, False
        if self._overtaken is not None:
            return
        try:
            # Checked first: another process may have the records now, and its peers don't belong on this hub.
            self._writer.require_records()
            if self._writer.doubtful:
                self._resolve_doubt()
        except OvertakenError:
            raise
        except ProvisioningError:
            if self._writer.doubtful:
                return
        self._reconciler.remove_leftovers()
        with suppress(HubUpdateError):  # reconcile_if_needed() meets it too, and logs it once
            self._reconciler.refresh()
        with suppress(RecordsUnavailableError, HubUpdateError):  # the next call tries again
            self._follow_decision()
        if self._reconciler.reconcile_if_needed(idle=idle):
            self._observe()
        self._reconciler.restore_endpoints()
        with suppress(RecordsUnavailableError):
            self._writer.note_observed()

    def _follow_decision(self) -> None:
        """Carry out what an operator has decided about peers that the records don't know."""
        if not self._history.follow_decision(self._writer.generation):
            return
        # These changes were queued before the pause was known.
        self._end(self._writer.drain(), self._paused())
        state = self._writer.load()
        self._directory.load(state.peers)
        self._reconciler.set_desired(state.peers)
        self._history.end_pause()

    def _require_reconciled(self) -> None:
        """Raise HubUpdateError where the hub doesn't equal the records, and a reconciliation fails."""
        if self._reconciler.paused:
            raise self._paused()
        if self._reconciler.problem is not None:
            if not self._reconciler.reconcile_if_needed():
                raise HubUpdateError(self._reconciler.problem or "the hub could not be brought up to date")
            self._observe()

    def _paused(self) -> HubUpdateError:
        return HubUpdateError(self._reconciler.problem or "the service is paused")

    def _observe(self) -> None:
        """Note that the hub has reached the newest generation."""
        self._writer.observed = self._writer.generation
        self._history.note_reached(self._writer.observed)

    def _note_overtaken(self, error: Exception) -> None:
        if not isinstance(error, OvertakenError) or self._overtaken is not None:
            return
        self._overtaken = error
        log.critical("overtaken", extra={"reason": str(error)})
        changes, self._writer.doubtful = self._writer.doubtful, ()
        self._end(changes, error)

    def _log_refusal(self, error: ProvisioningError, changes: int) -> None:
        """Log a cause once, however many changes it refuses; leave out a cause that is logged elsewhere."""
        reason = str(error)
        known = {self._refused, self._reconciler.problem}
        if not isinstance(error, RecordsUnavailableError) and reason not in known:
            log.error("changes_refused", extra={"changes": changes, "reason": reason})
        self._refused = reason
