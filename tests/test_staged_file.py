"""wg0.conf is replaced durably, and no operator's edit is lost to a clock that ticks too slowly.

What is looked at is the file and the system calls, not how the manager is built.
"""

import errno
import os
import stat
import time
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from backend.models.wireguard.keys import WireGuardPrivateKey
from backend.services.wireguard_config_manager import WireGuardConfigManager
from tests.harness.peers import block
from tests.harness.requests import new_key

HEAD = f"[Interface]\nPrivateKey = {WireGuardPrivateKey.generate().reveal()}\nListenPort = 51820\n".encode()
PEERS = [block(f"node-{number}", new_key(), IPv4Address("10.0.0.2") + number) for number in range(200)]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "wg0.conf"
    path.write_bytes(HEAD)
    path.chmod(0o600)
    return path


@pytest.fixture
def manager(config: Path) -> WireGuardConfigManager:
    return WireGuardConfigManager(config)


@dataclass
class Sync:
    """What a descriptor held when it was synced, and whether it was the config's file or directory then."""

    inode: int
    # None for a directory.
    content: bytes | None
    # The inode that the config's path led to at that moment.
    in_place: int


class Syncs:
    """Records what is synced, by fsync(2) or fdatasync(2)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
        self.seen: list[Sync] = []
        self._path = path
        for name in ("fsync", "fdatasync"):
            self._watch(monkeypatch, name)

    def _watch(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        real = getattr(os, name)

        def sync(descriptor: int) -> None:
            real(descriptor)
            status = os.fstat(descriptor)
            content = None if stat.S_ISDIR(status.st_mode) else os.pread(descriptor, 1 << 20, 0)
            self.seen.append(Sync(status.st_ino, content, self._path.stat().st_ino))

        monkeypatch.setattr(os, name, sync)


@pytest.mark.parametrize("count", [1, 200])  # less than a buffer, and more
def test_the_whole_file_is_synced_before_it_takes_the_old_ones_place(
    config: Path, manager: WireGuardConfigManager, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Otherwise a power cut after the rename leaves an empty wg0.conf: the hub's key is gone."""
    syncs = Syncs(monkeypatch, config)
    for peers in (PEERS[:count], PEERS[: count - 1]):
        syncs.seen.clear()
        assert manager.write(peers)
        new = config.stat().st_ino
        complete = [
            sync
            for sync in syncs.seen
            if sync.inode == new and sync.content == config.read_bytes() and sync.in_place != new
        ]
        assert complete, "the new file was not synced with all of its text before it was renamed"
        assert config.read_bytes() == HEAD + b"".join(peer.text for peer in peers)


def test_the_directory_is_synced_after_the_rename(
    config: Path, manager: WireGuardConfigManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a power cut brings the old file back, without an acknowledged peer."""
    syncs = Syncs(monkeypatch, config)
    manager.write(PEERS[:1])
    directory, new = config.parent.stat().st_ino, config.stat().st_ino
    last = syncs.seen[-1]
    assert (last.inode, last.content, last.in_place) == (directory, None, new)


# Edits within a tick of the clock


def edit(config: Path, modified_ns: int) -> bytes:
    """Edit the file, as an editor does that keeps inode and size, and give it this modification time."""
    before = config.read_bytes()
    after = before.replace(b"51820", b"51821")
    with config.open("r+b") as file:
        file.write(after)
    os.utime(config, ns=(modified_ns, modified_ns))
    status = config.stat()
    assert (status.st_size, status.st_mtime_ns) == (len(before), modified_ns)
    assert before != after
    return after


def write_and_note_the_tick(
    config: Path, manager: WireGuardConfigManager, monkeypatch: pytest.MonkeyPatch
) -> int:
    """Write the file; return the modification time that the clock gave it, in nanoseconds."""
    ticks: list[int] = []
    real = os.utime

    def utime(descriptor: int, *, ns: tuple[int, int]) -> None:
        ticks.append(os.fstat(descriptor).st_mtime_ns)
        real(descriptor, ns=ns)

    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", utime)
        assert manager.write(PEERS[:1])
    return ticks[0] if ticks else config.stat().st_mtime_ns


def test_an_edit_in_the_tick_of_our_own_write_is_kept(
    config: Path, manager: WireGuardConfigManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    tick = write_and_note_the_tick(config, manager, monkeypatch)
    after = edit(config, tick)
    assert manager.refresh()
    assert manager.write(PEERS[:2])
    assert config.read_bytes() == after + PEERS[1].text


def test_an_edit_in_the_tick_of_our_own_write_is_kept_where_times_can_not_be_set(
    config: Path, manager: WireGuardConfigManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", refuse)
        assert manager.write(PEERS[:1])
    after = edit(config, config.stat().st_mtime_ns)
    assert manager.refresh()
    assert manager.write(PEERS[:2])
    assert config.read_bytes() == after + PEERS[1].text


def test_an_edit_in_the_tick_of_our_own_write_is_kept_where_times_are_cut_off(
    config: Path, manager: WireGuardConfigManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems keep whole seconds, and say nothing of what they were asked for beyond that."""
    real = os.utime

    def in_seconds(descriptor: int, *, ns: tuple[int, int]) -> None:
        second = ns[1] - ns[1] % 10**9
        real(descriptor, ns=(second, second))

    with monkeypatch.context() as patch:
        patch.setattr(os, "utime", in_seconds)
        assert manager.write(PEERS[:1])
    after = edit(config, config.stat().st_mtime_ns)
    assert manager.refresh()
    assert manager.write(PEERS[:2])
    assert config.read_bytes() == after + PEERS[1].text


@pytest.mark.parametrize("age_ms", [-1000, 0, 40])
def test_an_edit_in_the_tick_of_the_edit_that_was_just_read_is_kept(
    config: Path, manager: WireGuardConfigManager, monkeypatch: pytest.MonkeyPatch, age_ms: int
) -> None:
    manager.write(PEERS[:1])
    moment = time.time_ns()
    config.write_bytes(config.read_bytes() + b"# edited\n")
    os.utime(config, ns=(moment, moment))
    with monkeypatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: moment + age_ms * 1_000_000)
        assert manager.refresh()
    after = edit(config, moment)
    assert manager.refresh()
    manager.write(PEERS[:2])
    assert b"ListenPort = 51821\n" in config.read_bytes()
    assert config.read_bytes().startswith(after.partition(b"\n\n")[0])


@pytest.mark.parametrize("settled", ["by our mark", "by its age"])
def test_a_file_that_is_known_is_not_read_again(
    config: Path, manager: WireGuardConfigManager, monkeypatch: pytest.MonkeyPatch, settled: str
) -> None:
    """Ten thousand peers take longer to read than a whole batch."""
    manager.write(PEERS[:1])
    if settled == "by its age":
        os.utime(config, (1_000_000_000, 1_000_000_000))
        assert not manager.refresh()

    def read_again(*_: object, **__: object) -> None:
        raise AssertionError("the file was read again")

    monkeypatch.setattr("builtins.open", read_again)
    assert not manager.refresh()
