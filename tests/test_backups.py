"""When a backup is due, which ones are kept, and what a restore does to the peers."""

from dataclasses import replace
from datetime import datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from backend.models.backups import Manifest, Origin
from backend.services.hub.backups import Backup, HubVersion, Retention, compare, expired, is_due
from tests.harness.backups import HUB_KEY, NOON, manifest
from tests.harness.records import adding

QUIET, BUSY = 600.0, 599.0
OLD = timedelta(days=1)


@pytest.mark.parametrize(
    ("newest", "same", "quiet_seconds", "age", "due"),
    [
        (None, True, 0.0, timedelta(), True),
        (manifest(), True, QUIET, timedelta(hours=1), False),
        (manifest(), False, QUIET, timedelta(hours=1), True),
        # A change is under way, or was a moment ago: the backup waits for the quiet.
        (manifest(), False, BUSY, timedelta(hours=1), False),
        (manifest(), False, BUSY, OLD, True),
        (manifest(), True, QUIET, OLD, True),
        (manifest(), True, QUIET, OLD - timedelta(seconds=1), False),
    ],
)
def test_backup_is_due_after_changes_and_a_quiet_time_and_once_a_day(
    newest: Manifest | None, same: bool, quiet_seconds: float, age: timedelta, due: bool
) -> None:
    hub = HubVersion.of(manifest())
    assert (
        is_due(newest, lambda: hub if same else replace(hub, generation=8), quiet_seconds, NOON + age) is due
    )


def test_edit_of_the_file_alone_makes_a_backup_due() -> None:
    hub = replace(HubVersion.of(manifest()), config_sha256="0" * 64)
    assert is_due(manifest(), lambda: hub, QUIET, NOON)


def backup(made_at: datetime, **over: Any) -> Backup:
    return Backup(Path(f"{made_at:%d-%H}"), 1, manifest(made_at=made_at, **over), None)


def test_newest_ones_and_each_days_newest_are_kept() -> None:
    # Every six hours for eight days, the newest first.
    backups = [backup(NOON - timedelta(hours=6 * number)) for number in range(32)]
    gone = {found.path.name for found in expired(backups, HUB_KEY, Retention(3, 5), NOON)}
    kept = [found.path.name for found in backups if found.path.name not in gone]
    assert kept == ["19-12", "19-06", "19-00", "18-18", "17-18", "16-18", "15-18", "14-18"]


def test_last_good_backup_is_kept_however_old() -> None:
    old = backup(NOON)
    assert expired([old], HUB_KEY, Retention(1, 1), NOON + timedelta(days=1000)) == []
    torn = Backup(Path("torn"), 1, None, "torn")
    assert expired([torn, torn, old], HUB_KEY, Retention(1, 1), NOON + timedelta(days=1000)) == []


def test_what_an_operator_made_and_other_hubs_backups_are_never_deleted() -> None:
    others = [
        backup(NOON, origin=Origin.COMMAND),
        backup(NOON, origin=Origin.REPLACED),
        backup(NOON, hub_public_key="a" * 42 + "A="),
        backup(NOON, hub_public_key=None),
        Backup(Path("torn"), 1, None, "torn"),
    ]
    ours = [backup(NOON), backup(NOON - timedelta(hours=1))]
    assert expired([*others, *ours], HUB_KEY, Retention(1, 1), NOON + timedelta(days=99)) == ours[1:]


def test_comparison_names_peers_that_come_go_and_change() -> None:
    stays, goes, comes, changes = (adding(f"node-{n}", f"10.0.0.{n}").peer for n in range(2, 6))
    found = compare(
        [stays, goes, replace(changes, address=IPv4Address("10.0.0.99"))], [stays, comes, changes]
    )
    assert (found.added, found.removed, found.changed) == ([comes], [goes], [changes])
