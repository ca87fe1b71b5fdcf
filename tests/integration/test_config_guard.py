"""The hub's config must be trusted: owner, mode, links, and one process at a time."""

import logging
import os
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from backend.adapters.host.locks import ConfigGuard
from backend.errors import ConfigFileError, InUseError
from backend.models.wireguard.keys import WireGuardPrivateKey
from backend.services.hub.config_text import PeerBlock
from backend.services.wireguard_config_manager import WireGuardConfigManager
from tests.harness.command_line import hub_settings, invoke
from tests.harness.patience import eventually
from tests.harness.peers import block
from tests.harness.requests import PROVISION, new_key, provision_body
from tests.harness.service import StartService
from tests.harness.three_places import in_file

# Nobody of this host's.
STRANGER = 54321


def peer(number: int) -> PeerBlock:
    return block(f"node-{number}", new_key(), IPv4Address("10.0.0.2") + number)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "etc" / "wg0.conf"
    path.parent.mkdir(mode=0o700)
    path.touch(mode=0o600)
    path.write_text(f"[Interface]\nPrivateKey = {WireGuardPrivateKey.generate().reveal()}\n")
    return path


@pytest.fixture
def manager(path: Path) -> Iterator[WireGuardConfigManager]:
    with ConfigGuard(path) as guard:
        manager = WireGuardConfigManager(path, require_trusted=guard.require_trusted)
        manager.refresh()
        yield manager


def moved_to(path: Path, directory: Path) -> Path:
    """Move the file and put a link in its place, as an operator does; return where it is now."""
    directory.mkdir(mode=0o700, exist_ok=True)
    target = directory / "hub.conf"
    path.rename(target)
    path.symlink_to(target)
    return target


@pytest.mark.parametrize("mode", [0o602, 0o666])
def test_config_that_others_may_write_is_refused_until_that_is_mended(
    manager: WireGuardConfigManager, path: Path, mode: int
) -> None:
    manager.write([peer(0)])
    before = path.read_bytes()
    path.chmod(mode)
    for act in (manager.refresh, lambda: manager.write([peer(0), peer(1)]), manager.validate_config):
        with pytest.raises(ConfigFileError, match=rf"within other users' reach.*`chmod go-w {path}`"):
            act()
    assert path.read_bytes() == before
    assert path.stat().st_mode & 0o777 == mode
    path.chmod(0o600)
    assert manager.write([peer(0), peer(1)])


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a file away")
def test_config_that_belongs_to_a_stranger_is_refused(manager: WireGuardConfigManager, path: Path) -> None:
    os.chown(path, STRANGER, -1)
    with pytest.raises(ConfigFileError, match=f"belongs to {STRANGER}; run `chown root {path}`"):
        manager.refresh()
    os.chown(path, 0, STRANGER)
    manager.refresh()
    path.chmod(0o620)
    with pytest.raises(ConfigFileError, match=f"they can write to {path}"):
        manager.refresh()


@pytest.mark.parametrize("mode", [0o640, 0o604])
def test_config_that_others_may_read_is_warned_about_once_and_its_mode_stays(
    manager: WireGuardConfigManager, path: Path, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    peers = [peer(number) for number in range(3)]
    path.chmod(mode)
    for number in range(3):
        manager.refresh()
        assert manager.write(peers[: number + 1])
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert [(record.message, record.__dict__["mode"]) for record in warnings] == [
        ("private_key_readable", f"{mode:04o}")
    ]
    assert path.stat().st_mode & 0o777 == mode
    path.chmod(0o600)
    manager.refresh()
    path.chmod(0o644)
    manager.refresh()
    assert [record.__dict__["mode"] for record in caplog.records] == [f"{mode:04o}", "0644"]


def test_config_that_becomes_a_link_while_it_is_managed_stays_one(
    manager: WireGuardConfigManager, path: Path, tmp_path: Path
) -> None:
    manager.write([peer(0)])
    # The same inode: nothing but the name tells that it was moved.
    target = moved_to(path, tmp_path / "elsewhere")
    manager.write([peer(0), peer(1)])
    assert path.readlink() == target
    assert set(in_file(target)) == {"node-0", "node-1"}
    assert target.stat().st_mode & 0o777 == 0o600
    # And to another copy.
    other = tmp_path / "elsewhere" / "other.conf"
    other.touch(mode=0o600)
    other.write_bytes(target.read_bytes())
    path.unlink()
    path.symlink_to("../elsewhere/other.conf")
    manager.write([peer(2)])
    assert path.is_symlink()
    assert set(in_file(other)) == {"node-2"}
    assert set(in_file(target)) == {"node-0", "node-1"}
    assert [entry.name for entry in target.parent.iterdir() if entry.name.endswith(".tmp")] == []
    # And back.
    path.unlink()
    other.rename(path)
    manager.write([peer(3)])
    assert not path.is_symlink()
    assert set(in_file(path)) == {"node-3"}


def test_link_that_takes_the_files_place_during_a_write_is_not_replaced(
    manager: WireGuardConfigManager, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync
    targets: list[Path] = []

    def sync_late(descriptor: int) -> None:
        sync(descriptor)
        if not targets:
            targets.append(moved_to(path, tmp_path / "elsewhere"))

    monkeypatch.setattr(os, "fsync", sync_late)
    manager.write([peer(0)])
    assert path.is_symlink()
    assert set(in_file(targets[0])) == {"node-0"}


def test_link_to_a_place_within_others_reach_is_refused(
    manager: WireGuardConfigManager, path: Path, tmp_path: Path
) -> None:
    target = moved_to(path, tmp_path / "elsewhere")
    target.parent.chmod(0o777)
    with pytest.raises(ConfigFileError, match=rf"{target}: .*they can write to {target.parent} "):
        manager.write([peer(0)])
    assert in_file(target) == {}
    assert [entry.name for entry in target.parent.iterdir()] == ["hub.conf"]


def test_two_processes_never_write_one_file_by_two_names(
    manager: WireGuardConfigManager, path: Path, tmp_path: Path
) -> None:
    # So that the file's own identity is known, which goes with it to the other place.
    manager.write([peer(1)])
    target = moved_to(path, tmp_path / "elsewhere")
    with ConfigGuard(target), pytest.raises(ConfigFileError, match="already managed by another process"):
        manager.write([peer(0)])
    assert set(in_file(target)) == {"node-1"}
    manager.write([peer(0)])
    for name in (path, target):
        with pytest.raises(InUseError, match="already managed by another process"), ConfigGuard(name):
            pass
    # The lock beside the old place is kept: the file may come back.
    path.unlink()
    target.rename(path)
    with pytest.raises(InUseError, match="already managed by another process"), ConfigGuard(path):
        pass


def test_running_service_is_red_while_others_may_write_its_config(
    start_service: StartService, tmp_path: Path
) -> None:
    settings = hub_settings(tmp_path)
    assert invoke("hub", "init", directory=tmp_path, settings=settings).returncode == 0
    path = tmp_path / "wg0.conf"
    service = start_service(settings)
    path.chmod(0o666)
    for answer in (
        service.client.post(PROVISION, json=provision_body("node-1")),
        service.client.get("/readyz"),
    ):
        assert answer.status_code == 503
        assert f"run `chmod go-w {path}`" in answer.json()["detail"]
    assert in_file(path) == {}
    path.chmod(0o644)
    eventually(lambda: service.client.post(PROVISION, json=provision_body("node-1")).status_code == 200)
    assert path.stat().st_mode & 0o777 == 0o644
    assert service.log.count(f"private_key_readable path={path} mode=0644") == 1
