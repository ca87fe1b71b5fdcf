"""Records that live as long as the process, for ENABLE_DBOS=false."""

from collections.abc import Callable, Collection, Sequence

from backend.models.access.audit import GENESIS
from backend.models.wireguard.peer import Peer
from backend.services.batches import run_sequence
from backend.services.ports import Action, Batch, Decision, HubStatus, NewGeneration, NextBatch, RecordedState


class MemoryJournal:
    """Keeps the records in a dict, behind the same port and through the same sequence as the durable one.

    It begins with the peers that an earlier process left in the file: they work, so they're still there.
    """

    def __init__(self, peers: Sequence[Peer] = ()) -> None:
        self._records = {peer.node_id: peer for peer in peers}
        self._generation = 0
        self._applied_generation = 0
        self._undo: dict[str, Peer] = {}
        # What an operator has decided, and the keys of removed peers.
        self.decision: Decision | None = None
        self.basis: str | None = None
        self.removed: set[str] = set()
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

    @property
    def durable(self) -> bool:
        """It lives as long as the process."""
        return False

    def hub_status(self) -> HubStatus:
        """Return what changes beside the peers."""
        return HubStatus(self.decision, self.basis, (), (0, GENESIS))

    def add_generation(self, new: NewGeneration) -> None:
        """Write a new."""
        self._generation, self.decision = new.generation, None
        self._records |= {peer.node_id: peer for peer in new.peers}
        self.removed |= {key for key, _ in new.removed}

    def dismiss_decision(self) -> None:
        """Forget a decision that nothing waits for."""
        self.decision = None

    def removed_keys(self, keys: Collection[str]) -> set[str]:
        """Return those of the keys whose peers were removed."""
        return self.removed.intersection(keys)

    def audit_hash(self, sequence: int) -> str | None:
        """There is no audit log here."""
        return None

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
            if change.action is Action.REMOVE:
                del self._records[change.peer.node_id]
                self.removed.add(change.peer.wireguard_public_key)
            else:
                self._records[change.peer.node_id] = change.peer

    def apply(self, batch: Batch) -> str | None:
        """Bring the batch to the hub."""
        return self._apply(batch)

    def revoke(self, batch: Batch) -> None:
        """Go back to what was there before the batch."""
        self._records = self._undo
        self.removed.update(
            change.peer.wireguard_public_key for change in batch.accepted() if change.action is Action.ADD
        )
