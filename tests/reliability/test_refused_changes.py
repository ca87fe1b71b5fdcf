"""A change that the disk refuses never touches a tunnel, however often it is repeated."""

import itertools
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.harness.patience import eventually
from tests.harness.requests import AUDIT, PEERS, PROVISION, provision_body
from tests.harness.requirements import require
from tests.harness.service import StartService
from tests.harness.three_places import assert_in_step, listed, settings_for
from tests.harness.wireguard import HubInterface


class Disk:
    """A small file system for the config, which can be spoilt and mended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        options = "size=256k,nr_inodes=32,mode=700"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", path], check=True)

    def spoil(self, how: str) -> None:
        if how == "full":
            with suppress(OSError), (self.path / "filler").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        elif how == "out of inodes":
            with suppress(OSError):
                for number in itertools.count():
                    (self.path / f"filler{number}").touch()
        else:
            subprocess.run(["chattr", "+i", self.path], check=True)

    def mend(self) -> None:
        subprocess.run(["chattr", "-i", self.path], check=True)
        for path in self.path.glob("filler*"):
            path.unlink()

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", self.path], check=True)


@pytest.fixture
def disk(hub_interface: HubInterface, tmp_path: Path) -> Iterator[Disk]:
    """Move the hub's config to a disk of its own."""
    require("mount", "chattr")
    disk = Disk(tmp_path / "disk")
    path = disk.path / hub_interface.config_path.name
    shutil.copy(hub_interface.config_path, path)
    hub_interface.config_path = path
    yield disk
    disk.close()


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    """Put a `wg` in front of the real one that writes each call down; return the list's path."""
    directory = tmp_path / "bin"
    directory.mkdir()
    script = directory / "wg"
    script.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/calls\nexec {shutil.which("wg")} "$@"\n')
    script.chmod(0o755)
    return tmp_path / "calls"


def written(calls: Path) -> list[str]:
    return [call for call in calls.read_text().split() if call in {"set", "syncconf", "setconf"}]


@pytest.mark.parametrize("how", ["full", "out of inodes", "immutable directory"])
def test_full_disk_refuses_a_change_without_touching_the_interface(
    hub_interface: HubInterface, start_service: StartService, disk: Disk, calls: Path, how: str
) -> None:
    path = hub_interface.config_path
    service = start_service(settings_for(hub_interface, calls.parent), path_prefix=calls.parent / "bin")
    bodies = [provision_body(f"node-{number}") for number in range(2)]
    for body in bodies:
        service.client.post(PROVISION, json=body).raise_for_status()
    before = (listed(service), path.read_bytes(), hub_interface.peers())
    told = written(calls)
    audited = service.client.get(AUDIT).json()["entries"][0]["sequence"]
    disk.spoil(how)
    red = service.client.get("/readyz")
    assert red.status_code == 503
    assert "could not be replaced" in red.json()["detail"]
    for _ in range(5):
        for refused in (
            service.client.delete(f"{PEERS}/node-0"),
            service.client.post(PROVISION, json=provision_body("node-2")),
        ):
            assert refused.status_code == 503
            assert "could not be replaced" in refused.json()["detail"]
    assert written(calls) == told
    assert (listed(service), path.read_bytes(), hub_interface.peers()) == before
    # The cause is one line in the log, and what is tried again writes nothing into the records.
    assert service.log.count("could not be replaced") == 1
    later = service.client.get(AUDIT).json()["entries"]
    fresh = [entry for entry in later if entry["sequence"] > audited]
    assert sum(entry["action"] == "revert" for entry in fresh) <= 1
    disk.mend()
    assert service.client.get("/readyz").status_code == 200
    assert service.client.delete(f"{PEERS}/node-0").status_code == 200
    service.client.post(PROVISION, json=provision_body("node-2")).raise_for_status()
    eventually(lambda: list(path.parent.glob(".*.tmp")) == [])
    assert set(assert_in_step(service, hub_interface)) == {"node-1", "node-2"}


def test_immutable_config_is_reported_without_touching_the_interface(
    hub_interface: HubInterface, start_service: StartService, disk: Disk, calls: Path
) -> None:
    path = hub_interface.config_path
    service = start_service(settings_for(hub_interface, calls.parent), path_prefix=calls.parent / "bin")
    service.client.post(PROVISION, json=provision_body("node-0")).raise_for_status()
    told = written(calls)
    subprocess.run(["chattr", "+i", path], check=True)
    try:
        red = service.client.get("/readyz").json()["detail"]
        assert "chattr -i" in red
        assert service.client.delete(f"{PEERS}/node-0").status_code == 503
        assert written(calls) == told
    finally:
        subprocess.run(["chattr", "-i", path], check=True)
    assert service.client.get("/readyz").status_code == 200
    assert service.client.delete(f"{PEERS}/node-0").status_code == 200
