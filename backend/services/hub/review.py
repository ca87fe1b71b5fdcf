"""Compares records and hub for `reconcile --show`, before an operator decides about unknown peers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from backend.errors import HubUpdateError
from backend.models.wireguard.peer import Peer
from backend.services.hub.history import Adoption, adopt
from backend.services.hub.mark import Mark
from backend.services.hub.reconciler import Reconciler
from backend.services.hub.removal_guard import HubPeer, RemovalGuard, is_many, stepped_back
from backend.services.ports import Records


@dataclass(frozen=True, slots=True)
class HubReview:
    """The records beside the hub. `unknown` are the hub's peers that the records have never known."""

    generation: int
    recorded: int
    # The generation that the hub has reached, and how many of our peers it has.
    reached: int
    present: int
    unknown: Sequence[HubPeer]
    # Peers of the records that the hub doesn't have: either decision brings them to it.
    missing: Sequence[Peer]
    # What `reconcile --adopt` would do with them.
    adoption: Adoption
    # Why the service is paused, or would be at its start; None where it isn't.
    paused: str | None
    # True before the first peer: the next start takes the file's.
    new_records: bool
    # Why the interface could not be read; None where it could.
    unseen: str | None
    notices: Sequence[str]

    @classmethod
    def make(cls, records: Records, reconciler: Reconciler, mark: Mark) -> Self:
        """Look at records, file and interface, and change nothing; raise ProvisioningError."""
        unseen = None
        try:
            found = reconciler.find_peers()
        except HubUpdateError as exc:
            # An error of the file itself is raised again here.
            found, unseen = reconciler.find_peers(in_file=True), str(exc)
        # After the hub: what comes to it meanwhile is in the records first.
        state = records.load()
        keys = {peer.wireguard_public_key for peer in state.peers}
        hash_there = records.audit_hash(mark.audit_sequence) if mark.audit_sequence else None
        paused = stepped_back(state, mark, hash_there)
        guard = RemovalGuard(records.removed_keys)
        if paused is not None:
            guard.pause_for(paused)
        unknown = guard.unknown(found, keys)
        if paused is None and is_many(len(unknown), len(found)):
            paused = "many peers on the hub are in no record"
        present = {peer.public_key for peer in found}
        # Only what the config has is taken in without a decision.
        new = state.generation == 0 and any(peer.label is not None for peer in unknown)
        return cls(
            generation=state.generation,
            recorded=len(state.peers),
            reached=mark.generation,
            present=len(found),
            unknown=unknown,
            missing=[peer for peer in state.peers if peer.wireguard_public_key not in present],
            adoption=adopt(unknown, state.peers),
            paused=None if new else paused,
            new_records=new,
            unseen=unseen,
            notices=records.status().notices,
        )

    @property
    def verdict(self) -> str:
        """Say what the service does about it, and what the operator can do."""
        count = len(self.unknown)
        if self.new_records and count:
            return f"the records are new: the next start takes the {count} peers of the config into them"
        if self.paused is not None:
            return (
                f"the service pauses: {self.paused}. `--adopt` takes {len(self.adoption.peers)} of the "
                f"{count} unknown peers into the records and the others off the hub; `--force` takes all of "
                "them off the hub"
            )
        if count:
            return f"the service takes the {count} unknown peers off the hub: they are few"
        return "the records know every peer of ours on the hub; nothing is to be decided"
