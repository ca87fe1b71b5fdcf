"""Decides when a backup is due and which ones are kept; compares a backup's peers with the present ones."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from backend.models.backups import CONFIG, Manifest, Origin
from backend.models.wireguard.peer import Peer

# The hub is quiet when nothing has changed for so long: seconds.
QUIET_SECONDS: Final = 600.0
# There is one at least this often, whatever changes.
_LONGEST: Final = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Backup:
    """An archive, with its manifest or, where that can't be read, the reason. `size` is in bytes."""

    path: Path
    size: int
    manifest: Manifest | None
    problem: str | None


@dataclass(frozen=True, slots=True)
class HubVersion:
    """What a backup would hold: the records' generation and the SHA-256 of wg0.conf."""

    generation: int
    config_sha256: str

    @classmethod
    def of(cls, manifest: Manifest) -> "HubVersion":
        """Return what a backup holds."""
        config = manifest.files.get(CONFIG)
        return cls(manifest.generation, "" if config is None else config.sha256)


@dataclass(frozen=True, slots=True)
class Keeping:
    """How many automatic backups are kept, the newest ones; and each day's newest for so many days."""

    count: int
    days: int


def is_due(
    newest: Manifest | None, hub: Callable[[], HubVersion], quiet_seconds: float, now: datetime
) -> bool:
    """Say whether a backup is to be made now.

    One is made when the hub has been quiet and the newest backup has another state of it, so that the state
    before the next change is kept; and one a day. `hub` is called only where it counts.
    """
    if newest is None or now - newest.made_at >= _LONGEST:
        return True
    return quiet_seconds >= QUIET_SECONDS and HubVersion.of(newest) != hub()


def superfluous(
    backups: Sequence[Backup], hub_public_key: str, keeping: Keeping, now: datetime
) -> list[Backup]:
    """Return the backups to delete. They are given the newest first.

    Only this hub's automatic backups are deleted. One that can't be read neither counts nor is deleted.
    """
    ours = [
        (backup, backup.manifest.made_at)
        for backup in backups
        if backup.manifest is not None
        and backup.manifest.origin is Origin.AUTOMATIC
        and backup.manifest.hub_public_key == hub_public_key
    ]
    days = set()
    found = []
    for number, (backup, made_at) in enumerate(ours):
        day = made_at.astimezone(UTC).date()
        is_newest_of_day = day not in days
        days.add(day)
        is_young = now - made_at < timedelta(days=keeping.days)
        if number >= max(1, keeping.count) and not (is_newest_of_day and is_young):
            found.append(backup)
    return found


@dataclass(frozen=True, slots=True)
class PeerComparison:
    """What a restore does to the records' peers."""

    # In the backup and not in the records now.
    come: Sequence[Peer]
    # In the records now and not in the backup.
    go: Sequence[Peer]
    # In both under one name, with another key or address: as the backup has them.
    change: Sequence[Peer]


def compare(present: Collection[Peer], restored: Collection[Peer]) -> PeerComparison:
    """Compare the records now with those of a backup, by name."""
    now = {peer.node_id: _identity(peer) for peer in present}
    then = {peer.node_id: _identity(peer) for peer in restored}
    return PeerComparison(
        come=[peer for peer in restored if peer.node_id not in now],
        go=[peer for peer in present if peer.node_id not in then],
        change=[peer for peer in restored if now.get(peer.node_id, then[peer.node_id]) != then[peer.node_id]],
    )


def _identity(peer: Peer) -> tuple[object, ...]:
    return peer.wireguard_public_key, peer.address
