"""Backing up and restoring the records of a service, and reconciling its hub with them."""

import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

from tests.harness.requests import PROVISION, provision_body
from tests.harness.service import ServiceProcess


def provision(service: ServiceProcess, *node_ids: str) -> list[dict[str, Any]]:
    """Provision these nodes; return the bodies of the requests."""
    bodies = [provision_body(node_id) for node_id in node_ids]
    for body in bodies:
        service.client.post(PROVISION, json=body).raise_for_status()
    return bodies


def names(start: int, stop: int) -> list[str]:
    """Return the node IDs with these numbers."""
    return [f"node-{number}" for number in range(start, stop)]


def back_up(state: Path) -> Path:
    """Copy the database as it is now, with what is still in its write-ahead log."""
    copy = state.parent / "backup.sqlite"
    with (
        closing(sqlite3.connect(state / "provisioning.sqlite")) as source,
        closing(sqlite3.connect(copy)) as target,
    ):
        source.backup(target)
    return copy


def restore(state: Path, copy: Path) -> None:
    """Put the copy in the place of the database; the service must be stopped."""
    for suffix in ("-wal", "-shm"):
        (state / f"provisioning.sqlite{suffix}").unlink(missing_ok=True)
    (state / "provisioning.sqlite").write_bytes(copy.read_bytes())


def reconcile(service: ServiceProcess, *options: str) -> subprocess.CompletedProcess[str]:
    """Run `reconcile` beside the service."""
    return service.command("reconcile", *options)


def is_ready(service: ServiceProcess) -> bool:
    """Say whether /readyz answers 200."""
    return service.client.get("/readyz").status_code == 200
