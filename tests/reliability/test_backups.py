"""Backups under load, kills in the middle of them, and a hub that a restore cuts no peer from."""

import asyncio
import itertools
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.harness.backups import Place
from tests.harness.command_line import ROOT
from tests.harness.crowds import post_all
from tests.harness.lost_records import is_ready, names, provision, reconcile
from tests.harness.patience import eventually
from tests.harness.requests import PEERS, provision_body
from tests.harness.service import ServiceProcess, StartService
from tests.harness.three_places import assert_in_step, in_file, listed, settings_for
from tests.harness.torture import TORTURE
from tests.harness.wireguard import HubInterface

CLIENTS = 16
LONG = pytest.mark.torture(only=True)


def back_up(service: ServiceProcess) -> Path:
    made = service.command("backup", "create")
    assert made.returncode == 0, made.stderr
    return Path(made.stdout.strip())


def test_older_backup_cuts_no_peer_from_the_hub(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path))
    provision(service, *names(0, 2))
    archive = back_up(service)
    provision(service, *names(2, 12))
    assert service.client.delete(f"{PEERS}/node-0").status_code == 200
    before = assert_in_step(service, hub_interface)
    refused = service.command("backup", "restore", str(archive), "--yes")
    assert (refused.returncode, f"(PID {service.pid})" in refused.stderr) == (1, True)
    service.terminate()
    done = service.command("backup", "restore", str(archive), "--yes")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("goes:     node-") == 10
    assert "comes:    node-0 " in done.stdout
    assert "config:   stays as it is" in done.stdout
    service.ready = "/healthz"
    service.start()
    assert "10 of 11 peers on the hub are in no record" in service.client.get("/readyz").text
    assert len(hub_interface.peers()) == 11
    assert {node: address for node, (_, address) in in_file(hub_interface.config_path).items()} == before
    assert reconcile(service, "--adopt").returncode == 0
    eventually(lambda: is_ready(service))
    assert set(assert_in_step(service, hub_interface)) == {*before, "node-0"}


def test_guard_holds_where_the_hubs_mark_was_lost(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path))
    provision(service, *names(0, 4))
    archive = back_up(service)
    provision(service, "node-4")
    service.terminate()
    hub_interface.config_path.with_name(f".{hub_interface.config_path.name}.mark").unlink()
    assert service.command("backup", "restore", str(archive), "--yes").returncode == 0
    service.ready = "/healthz"
    service.start()
    # One of five is too few to be held by its share.
    assert "1 of 5 peers on the hub are in no record" in service.client.get("/readyz").text
    assert len(hub_interface.peers()) == 5


@pytest.mark.torture
def test_every_peer_acknowledged_before_a_backup_began_is_restored_elsewhere(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path, WIREGUARD_IP_POOL="10.0.0.0/16"))
    for number in TORTURE.rounds(1):
        archive, acknowledged, later = _back_up_under_load(service, number)
        elsewhere = Place(tmp_path / f"elsewhere{number}")
        elsewhere.config = elsewhere.directory / hub_interface.config_path.name
        elsewhere.settings |= {"WIREGUARD_CONFIG_PATH": elsewhere.config, "WIREGUARD_IP_POOL": "10.0.0.0/16"}
        elsewhere.restore(archive)
        restored = start_service(elsewhere.settings)
        found = {node: peer["assigned_ip"] for node, peer in listed(restored).items()}
        assert {node: found.get(node) for node in acknowledged} == acknowledged
        assert found.keys() <= later.keys()
        assert {node: address for node, (_, address) in in_file(elsewhere.config).items()} == found
        restored.terminate()


def _back_up_under_load(service: ServiceProcess, number: int) -> tuple[Path, dict[str, str], dict[str, str]]:
    """Return a backup, the peers that were acknowledged before it began, and those of the end."""
    stop, numbers = threading.Event(), itertools.count()

    def bodies() -> Iterator[dict[str, Any]]:
        while not stop.is_set():
            yield provision_body(f"node-{number}-{next(numbers)}")

    def load() -> None:
        for answer in asyncio.run(post_all(service, bodies(), CLIENTS)):
            answer.raise_for_status()

    before = {node: peer["assigned_ip"] for node, peer in listed(service).items()}
    crowd = threading.Thread(target=load)
    crowd.start()
    try:
        eventually(lambda: len(listed(service)) > len(before) + 100)
        # What a read answers is committed, as what a client was told.
        acknowledged = {node: peer["assigned_ip"] for node, peer in listed(service).items()}
        archive = _command(service, "backup", "create")
        assert len(listed(service)) > len(acknowledged)
    finally:
        stop.set()
        crowd.join()
    return archive, acknowledged, {node: peer["assigned_ip"] for node, peer in listed(service).items()}


def _command(service: ServiceProcess, *arguments: str) -> Path:
    """Run a command as a process of its own: the clients are threads of this one."""
    done = subprocess.run(
        [sys.executable, "-m", "backend", *arguments],
        cwd=service.directory,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **service.settings},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def dying(place: Place, moment: str, *arguments: object) -> int:
    """Run a command that dies at this moment, and return its status."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    environment |= {name: str(value) for name, value in place.settings.items()}
    command = [sys.executable, "-m", "tests.harness.dying_backup", moment, "backup", *map(str, arguments)]
    return subprocess.run(
        command, cwd=place.directory, env=environment, capture_output=True, check=False, timeout=60
    ).returncode


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("before-the-copy", marks=LONG),
        pytest.param("after-the-copy", marks=LONG),
        "while-writing",
        "before-the-name",
        pytest.param("after-the-name", marks=LONG),
    ],
)
def test_killed_backup_leaves_a_whole_one_or_none_and_is_swept(tmp_path: Path, moment: str) -> None:
    place = Place(tmp_path / "hub")
    place.init()
    place.commit(1, 2)
    assert dying(place, moment, "create") == -signal.SIGKILL
    found = place.run("backup", "list").stdout.splitlines()
    assert len(found) == (1 if moment == "after-the-name" else 0)
    place.back_up()
    listed = place.run("backup", "list").stdout
    assert (len(listed.splitlines()), "can't be read" in listed) == (len(found) + 1, False)
    left = {path.name for path in place.backups.iterdir()}
    assert left == {line.split("  ")[0] for line in listed.splitlines()}
    assert not (place.state / "backup.scratch").exists()


@pytest.mark.parametrize(
    ("moment", "restored"),
    [
        pytest.param("before-the-swap", False, marks=LONG),
        ("within-the-swap", False),
        ("after-the-swap", True),
        pytest.param("before-the-config", True, marks=LONG),
        pytest.param("after-the-config", True, marks=LONG),
    ],
)
def test_killed_restore_leaves_the_old_records_or_the_new_ones(
    tmp_path: Path, moment: str, restored: bool
) -> None:
    place = Place(tmp_path / "hub")
    place.init()
    _die_and_try_again(place, moment, restored=restored)


@pytest.mark.parametrize(
    ("moment", "restored"),
    [
        pytest.param("before-postgresql", False, marks=LONG),
        ("within-postgresql", False),
        pytest.param("after-the-swap", True, marks=LONG),
    ],
)
def test_killed_restore_into_postgresql_leaves_the_old_records_or_the_new_ones(
    tmp_path: Path, postgres_database: str, moment: str, restored: bool
) -> None:
    place = Place(tmp_path / "hub", postgres_database)
    place.init()
    _die_and_try_again(place, moment, restored=restored)


def _die_and_try_again(place: Place, moment: str, *, restored: bool) -> None:
    place.commit(1, 2, 3)
    archive, then, config = place.back_up(), place.records(), place.config.read_bytes()
    place.commit(2, 4)
    now = place.records()
    place.config.write_bytes(config + b"# by hand\n")
    assert dying(place, moment, "restore", archive, "--yes", "--config") == -signal.SIGKILL
    eventually(lambda: place.run("backup", "list").returncode == 0)
    assert place.records() == (then if restored else now)
    # The present state was saved by then.
    assert place.saved()
    place.restore(archive, "--config")
    assert place.records() == then
    assert place.config.read_bytes() == config
    assert list(place.directory.glob(".*.tmp")) == []


@pytest.mark.torture(only=True)
def test_restore_killed_at_any_moment_leaves_the_old_records_or_the_new_ones(
    tmp_path: Path, chance: random.Random
) -> None:
    place = Place(tmp_path / "hub")
    place.init()
    place.commit(1, *range(2, 200))
    old = place.back_up()
    place.commit(2, 200)
    new = place.back_up()
    states = [place.records()]
    place.restore(old)
    states.append(place.records())
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    environment |= {name: str(value) for name, value in place.settings.items()}
    for number in TORTURE.rounds(1):
        archive = (old, new)[number % 2]
        command = [sys.executable, "-m", "backend", "backup", "restore", str(archive), "--yes"]
        with subprocess.Popen(
            command, cwd=place.directory, env=environment, stdout=subprocess.DEVNULL
        ) as process:
            time.sleep(chance.uniform(0.4, 2.5))
            process.kill()
        with closing(sqlite3.connect(place.state / "provisioning.sqlite")) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert place.records() in states
        for path in place.saved():
            path.unlink()
    place.restore(new)
    assert place.records() == states[0]
