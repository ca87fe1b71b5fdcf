"""Keeps a reconciliation from taking many peers off the hub that the records have never known.

Records that were lost, restored from a backup or left behind by a failover look like records from which
peers were removed. A tombstone tells the difference: the records keep the key of each peer that they removed.
"""

import hashlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from backend.errors import PausedError
from backend.models.access.audit import PRUNED
from backend.models.operator_commands import command
from backend.models.wireguard.interface import InterfaceState
from backend.models.wireguard.records import RecordedState
from backend.services.hub.config_text import PeerBlock
from backend.services.hub.mark import Mark

# More than so many, and more than this share of our peers on the hub, are an operator's decision.
_MOST: Final = 5
_LARGEST_SHARE: Final = 0.2


@dataclass(frozen=True, slots=True)
class HubPeer:
    """A peer of ours as the hub has it: AllowedIPs as `wg` prints them, `label` None if it has no block."""

    public_key: str
    label: str | None
    allowed_ips: tuple[str, ...]


def find_peers(
    blocks: Iterable[PeerBlock], interface: InterfaceState | None, operators_keys: Collection[str]
) -> list[HubPeer]:
    """Return our peers on the hub: those in our blocks of the file, and those that only the interface has."""
    found: dict[str, HubPeer] = {
        peer.public_key: HubPeer(peer.public_key, peer.label, peer.allowed_ips) for peer in blocks
    }
    if interface is not None:
        for key, peer in interface.peers.items():
            if key not in operators_keys and key not in found:
                found[key] = HubPeer(key, None, tuple(sorted(peer.allowed_ips)))
    return list(found.values())


def fingerprint(unknown: Iterable[HubPeer]) -> str:
    """Return a hash of these peers' keys: a decision is carried out only for the peers that were shown."""
    return hashlib.sha256(" ".join(sorted(peer.public_key for peer in unknown)).encode()).hexdigest()


def is_many(unknown: int, present: int) -> bool:
    """Say whether an operator has to decide about removing so many of the peers that are present."""
    return unknown > _MOST and unknown > _LARGEST_SHARE * present


def stepped_back(state: RecordedState, mark: Mark, hash_at_mark: str | None) -> str | None:
    """Say how the records are older than what this hub has reached, or return None.

    `hash_at_mark` is that of the audit log's row at the mark's sequence, None where there is no such row.
    PRUNED says that there was one, so the log goes on behind the mark.
    """
    if state.generation < mark.generation:
        return (
            f"the records are at generation {state.generation}, and this hub has reached {mark.generation}: "
            "they are older, as from a backup"
        )
    another = hash_at_mark not in {mark.audit_hash, PRUNED}
    if hash_at_mark is None:
        # Without a later generation the log alone may be older, as when only revocations were lost.
        another = mark.audit_sequence > 0 and state.generation > mark.generation
    if another:
        return (
            f"row {mark.audit_sequence} of the records' audit log is another one than this hub has written: "
            "they are another database, or an older copy that has gone on without it"
        )
    return None


class RemovalGuard:
    """Decides whether a reconciliation may go on. Used by one thread at a time."""

    def __init__(self, removed_keys: Callable[[Collection[str]], Collection[str]]) -> None:
        """`removed_keys` returns those of the given keys that the records know as removed."""
        self._removed_keys = removed_keys
        self._stepped_back: str | None = None
        self._many = False
        # Why the service is paused, as the last check found it; None where it is not.
        self.pause_error: PausedError | None = None

    @property
    def paused(self) -> bool:
        """Whether an operator has to decide before anything is changed, as last found."""
        return self._many or self._stepped_back is not None

    def pause_for(self, reason: str) -> None:
        """Pause until `resume`: the records are older than the hub."""
        self._stepped_back = reason

    def resume(self) -> None:
        """Go on: an operator has decided."""
        self._stepped_back = None

    def unknown(self, found: Sequence[HubPeer], recorded_keys: Collection[str]) -> list[HubPeer]:
        """Return our peers on the hub that the records have never known.

        Where the records are older than the hub, their tombstones don't count: the hub had removed those
        peers, so one that it has again was added since.
        """
        unknown = [peer for peer in found if peer.public_key not in recorded_keys]
        if not unknown or self._stepped_back is not None:
            return unknown
        removed = self._removed_keys([peer.public_key for peer in unknown])
        return [peer for peer in unknown if peer.public_key not in removed]

    def check(self, found: Sequence[HubPeer], recorded_keys: Collection[str]) -> int:
        """Return how many unknown peers a reconciliation would remove; raise PausedError if it must not."""
        unknown, present = len(self.unknown(found, recorded_keys)), len(found)
        self._many = is_many(unknown, present)
        self.pause_error = None
        if self.paused:
            reason = self._stepped_back or "the records don't fit the hub"
            self.pause_error = PausedError(reason, unknown, present, command("reconcile --show"))
            raise self.pause_error
        return unknown
