"""Decides when a backup is due and which ones are kept; compares a backup's peers with the present ones."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from backend.models.backups import CONFIG, Manifest, Origin
from backend.models.wireguard.peer import Peer

# A change is backed up when nothing else has changed for so long: seconds.
QUIET_SECONDS: Final = 600.0
# A backup is made this often even if nothing has changed.
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
class Retention:
    """Which automatic backups are kept: the newest `count`, and for `days` also the newest of each day."""

    count: int
    days: int


def is_due(
    newest: Manifest | None, hub: Callable[[], HubVersion], quiet_seconds: float, now: datetime
) -> bool:
    """Say whether a backup is to be made now: once a day, and ten minutes after the last change.

    The second so that the state before the next change is kept. `quiet_seconds` is the time since the last
    change. `hub` returns what a backup would hold now; it may read a file, so it is called only if needed.
    """
    if newest is None or now - newest.made_at >= _LONGEST:
        return True
    return quiet_seconds >= QUIET_SECONDS and HubVersion.of(newest) != hub()


def expired(
    backups: Sequence[Backup], hub_public_key: str, retention: Retention, now: datetime
) -> list[Backup]:
    """Return the backups to delete. `backups` has the newest first.

    Only this hub's automatic backups are deleted. One that can't be read is neither counted nor deleted.
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
        is_young = now - made_at < timedelta(days=retention.days)
        if number >= retention.count and not (is_newest_of_day and is_young):
            found.append(backup)
    return found


@dataclass(frozen=True, slots=True)
class PeerComparison:
    """What a restore does to the records' peers."""

    # In the backup and not in the records.
    added: Sequence[Peer]
    # In the records and not in the backup.
    removed: Sequence[Peer]
    # In both under one name, with another key or address. These are the backup's.
    changed: Sequence[Peer]


def compare(present: Collection[Peer], restored: Collection[Peer]) -> PeerComparison:
    """Compare the present records with those of a backup, by node_id."""
    now = {peer.node_id: _identity(peer) for peer in present}
    then = {peer.node_id: _identity(peer) for peer in restored}
    return PeerComparison(
        added=[peer for peer in restored if peer.node_id not in now],
        removed=[peer for peer in present if peer.node_id not in then],
        changed=[
            peer for peer in restored if now.get(peer.node_id, then[peer.node_id]) != then[peer.node_id]
        ],
    )


def _identity(peer: Peer) -> tuple[object, ...]:
    return peer.wireguard_public_key, peer.address
