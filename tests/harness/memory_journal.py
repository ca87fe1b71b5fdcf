"""Records that live as long as the process, for ENABLE_DBOS=false."""

from collections.abc import Callable, Sequence

from backend.services.hub_committer import run_sequence
from backend.services.ports import Action, Batch, NextBatch, Peer, RecordedState


class MemoryJournal:
    """Keeps the records in a dict, behind the same port and through the same sequence as the durable one.

    It begins with the peers that an earlier process left in the file: they work, so they're still there.
    """

    def __init__(self, peers: Sequence[Peer] = ()) -> None:
        self._records = {peer.node_id: peer for peer in peers}
        self._generation = 0
        self._applied_generation = 0
        self._undo: dict[str, Peer] = {}
        self._apply: Callable[[Batch | None], str | None] = lambda _: None

    @property
    def busy_since(self) -> float | None:
        """Memory keeps nobody waiting."""
        return None

    def load(self) -> RecordedState:
        """Return everything."""
        return RecordedState(tuple(self._records.values()), self._generation, self._applied_generation)

    def launch(self, apply: Callable[[Batch | None], str | None]) -> None:
        """Remember how a batch gets to the hub."""
        self._apply = apply

    def run(self, next_batch: NextBatch) -> None:
        """Take batches through their sequence until there is none."""
        run_sequence(next_batch, self)

    def mark_applied(self, generation: int) -> None:
        """Note that the hub has reached `generation`."""
        self._applied_generation = generation

    def tidy(self) -> None:
        """Nothing is left over here."""

    def check(self) -> None:
        """Memory always answers."""

    def check_writable(self) -> None:
        """Memory can always be written."""

    def close(self) -> None:
        """Nothing is to be closed."""

    def intend(self, batch: Batch) -> None:
        """Write the batch's records."""
        self._undo = dict(self._records)
        self._generation, self._applied_generation = batch.generation, batch.reached
        for change in batch.accepted():
            if change.action is Action.ADD:
                self._records[change.peer.node_id] = change.peer
            else:
                del self._records[change.peer.node_id]

    def apply(self, batch: Batch) -> str | None:
        """Bring the batch to the hub."""
        return self._apply(batch)

    def revoke(self, batch: Batch) -> None:
        """Go back to what was there before the batch."""
        self._records = self._undo
