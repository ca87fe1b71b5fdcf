"""File and interface brought up to the records, and kept so: the whole service, without a real interface."""

import errno
import os
import stat
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import pytest

from backend import errors
from backend.models.wireguard.keys import WireGuardPrivateKey
from backend.models.wireguard.peer import Change
from backend.services.hub.interface_observer import InterfaceObserver
from backend.services.hub.mark import HubMark
from backend.services.hub.operator_peers import OperatorPeers
from backend.services.hub.reconciler import Reconciler
from backend.services.hub.removal_guard import RemovalGuard
from backend.services.ip_pool_manager import IPPoolManager
from backend.services.wireguard_config_manager import WireGuardConfigManager
from tests.harness.core import NEVER, World, Worlds
from tests.harness.fakes import FakeHub, FlakyRecords
from tests.harness.patience import eventually
from tests.harness.requests import new_key


@pytest.fixture
def records() -> FlakyRecords:
    return FlakyRecords()


@pytest.fixture
def undisturbed(make_world: Worlds, records: FlakyRecords) -> World:
    """Start a service that notices by its batches alone what has changed."""
    return make_world(records, look_every=NEVER)


def temporaries(world: World) -> list[Path]:
    return list(world.path.parent.glob(".*.tmp"))


def told(hub: FakeHub) -> tuple[object, ...]:
    """Return what the interface has, and how often it was told anything."""
    return dict(hub.table), hub.syncs, hub.changes


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# What the disk or the records refuse


def test_a_change_that_the_disk_refuses_never_reaches_the_interface_and_its_retry_not_the_records(
    undisturbed: World, fake_hub: FakeHub, records: FlakyRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = undisturbed
    world.provision("node-1")
    before, commits = (told(fake_hub), world.version), len(records.batches)
    with monkeypatch.context() as patch:
        patch.setattr("backend.services.hub.staged_file._make_temporary", no_space)
        for _ in range(3):
            with pytest.raises(errors.HubUpdateError, match="No space left"):
                world.deprovision("node-1")
            assert (told(fake_hub), world.version) == before
            # Only the first had to be written to be taken back.
            assert len(records.batches) <= commits + 1
    world.deprovision("node-1")
    assert fake_hub.table == {}


def test_a_batch_that_the_records_do_not_take_leaves_no_temporary_file(
    undisturbed: World, fake_hub: FakeHub, records: FlakyRecords
) -> None:
    world = undisturbed
    world.provision("node-1")
    before = dict(fake_hub.table), world.version
    records.failing_at = {"commit"}
    with pytest.raises(errors.RecordsUnavailableError):
        world.provision("node-2")
    assert (fake_hub.table, world.version) == before
    assert temporaries(world) == []


def test_an_edit_while_the_records_are_written_is_kept(
    make_world: Worlds, fake_hub: FakeHub, records: FlakyRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same size, and where times can't be set, so that only the text tells."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    with monkeypatch.context() as patch:
        # However slow the machine is: the edit comes within the clock's tick in which the file was written.
        patch.setattr("backend.services.hub.config_reader._SETTLED_NS", 3_600_000_000_000)
        real = os.utime
        patch.setattr(os, "utime", refuse)
        world = make_world(records, look_every=NEVER)
        world.provision("node-1")

        def edit(_: Sequence[Change]) -> None:
            moment = world.path.stat().st_mtime_ns
            text = world.text.replace("51820", "51821")
            with world.path.open("r+") as file:
                file.write(text)
            real(world.path, ns=(moment, moment))

        records.before_commit = edit
        world.provision("node-2")
    assert "ListenPort = 51821\n" in world.text
    assert world.text.count("[Peer]") == 2
    assert fake_hub.port == 51821


def test_readiness_says_what_a_provision_would_meet_now(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("backend.services.hub.staged_file._make_temporary", no_space)
        with pytest.raises(errors.HubUpdateError, match="No space left on device; make room on its disk"):
            world.check()
        with pytest.raises(errors.HubUpdateError, match="No space left"):
            world.provision("node-1")
    world.check()
    world.provision("node-1")


def test_a_full_disk_turns_readiness_red_before_any_request_meets_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_fd: int, _offset: int, size: int) -> None:
        assert size > len(world.text)
        no_space()

    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", full)
        with pytest.raises(errors.HubUpdateError, match="make room on its disk"):
            world.check()
    world.check()
    assert list(world.path.parent.glob("*.tmp")) == []


def test_records_that_cannot_be_read_for_removed_keys_stop_the_reconciliation(
    tmp_path: Path,
) -> None:
    answers = False

    def removed_keys(keys: Collection[str]) -> Collection[str]:
        if not answers:
            raise errors.RecordsUnavailableError("the records can't be read")
        return keys

    keys = [WireGuardPrivateKey(bytes([number] * 32)) for number in (1, 2)]
    path = tmp_path / "wg0.conf"
    path.touch(mode=0o600)
    path.write_text(f"[Interface]\nPrivateKey = {keys[0].reveal()}\n")
    config = WireGuardConfigManager(path)
    config.add_peer(keys[1].public_key(), ["10.0.0.2/32"])
    before = path.read_bytes()
    operator_peers = OperatorPeers(IPPoolManager("10.0.0.0/24"))
    hub = FakeHub()
    reconciler = Reconciler(
        config, hub, operator_peers, InterfaceObserver(hub), guard=RemovalGuard(removed_keys)
    )
    reconciler.set_desired(())
    assert reconciler.reconcile() == "the records can't be read"
    assert reconciler.problem == "the records can't be read"
    assert path.read_bytes() == before
    answers = True
    assert reconciler.reconcile() is None
    assert reconciler.problem is None
    assert path.read_bytes() != before
    reconciler.close()


# An interface that goes


def test_an_interface_that_is_gone_is_noticed_before_the_records_are_written(
    undisturbed: World, fake_hub: FakeHub, records: FlakyRecords
) -> None:
    fake_hub.vanish()
    with pytest.raises(errors.HubUpdateError, match="interface wg0 does not exist"):
        undisturbed.provision("node-1")
    assert records.batches == []


def test_an_interface_that_goes_while_the_records_are_written_leaves_the_file_as_it_was(
    undisturbed: World, fake_hub: FakeHub, records: FlakyRecords
) -> None:
    world = undisturbed
    world.provision("node-1")
    before = world.version
    records.before_commit = lambda _: fake_hub.vanish()
    with pytest.raises(errors.HubUpdateError, match="interface wg0 does not exist"):
        world.provision("node-2")
    assert world.version == before
    assert temporaries(world) == []
    assert [peer.node_id for peer in records.load().peers] == ["node-1"]


def test_a_missing_interface_refuses_and_heals_by_itself(world: World, fake_hub: FakeHub) -> None:
    key = new_key()
    world.provision("node-1", key)
    before = world.path.stat()
    fake_hub.vanish()
    with pytest.raises(errors.HubUpdateError, match="interface wg0 does not exist; bring it up"):
        world.provision("node-2")
    with pytest.raises(errors.HubUpdateError):
        world.check()
    assert world.path.read_text().count("[Peer]") == 1
    fake_hub.come_back()
    eventually(lambda: fake_hub.table == {key: frozenset({"10.0.0.2/32"})})
    world.check()
    assert world.path.stat().st_size == before.st_size


def test_an_interface_that_was_missing_at_the_start_gets_its_peers_when_it_comes(
    make_world: Worlds, fake_hub: FakeHub
) -> None:
    fake_hub.vanish()
    world = make_world()
    with pytest.raises(errors.HubUpdateError):
        world.check()
    fake_hub.come_back()
    eventually(lambda: fake_hub.syncs > 0)
    world.provision("node-1")


# What others do to file and interface


def test_an_edit_by_hand_reaches_the_interface_by_itself(world: World, fake_hub: FakeHub) -> None:
    world.provision("node-1")
    at_the_start = fake_hub.syncs
    world.path.write_text(world.text.replace("51820", "51821"))
    eventually(lambda: fake_hub.syncs > at_the_start)
    key = new_key()
    world.append(key, "192.168.7.0/24")
    eventually(lambda: key in fake_hub.table)


def test_an_operators_edit_reaches_the_interface_with_the_batch_that_notices_it(
    undisturbed: World, fake_hub: FakeHub
) -> None:
    theirs, ours = new_key(), new_key()
    undisturbed.append(theirs, "192.168.7.0/24")
    undisturbed.provision("node-1", ours)
    assert set(fake_hub.table) == {theirs, ours}


def test_a_backup_that_lacks_our_peers_is_completed_by_itself(world: World) -> None:
    without = world.text
    key = new_key()
    world.provision("node-1", key)
    world.path.write_text(without)
    eventually(lambda: key in world.text)
    world.path.unlink()
    with pytest.raises(errors.ConfigFileError):
        world.check()
    world.path.write_text(without)
    eventually(lambda: key in world.text)
    world.look()
    world.check()


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda text: text.replace("PrivateKey", "#PrivateKey"), "PrivateKey"),
        (lambda text: text.replace("[Interface]", "[Interface]\nSaveConfig = true"), "SaveConfig"),
        (lambda text: text.replace("[Interface]", "[Interface]\nnonsense"), "line"),
    ],
)
def test_a_file_that_an_operator_broke_is_refused_until_it_is_mended(
    world: World, fake_hub: FakeHub, edit: Callable[[str], str], says: str
) -> None:
    world.provision("node-1")
    whole, table = world.text, dict(fake_hub.table)
    world.path.write_text(edit(whole))
    broken = world.text
    with pytest.raises(errors.ConfigFileError, match=says):
        world.provision("node-2")
    with pytest.raises(errors.ConfigFileError, match=says):
        world.check()
    assert (world.text, fake_hub.table) == (broken, table)
    world.path.write_text(whole)
    world.provision("node-2")


def test_a_vanished_file_is_not_made_up(world: World) -> None:
    world.provision("node-1")
    text = world.text
    world.path.unlink()
    with pytest.raises(errors.ConfigFileError):
        world.provision("node-2")
    assert not world.path.exists()
    world.path.write_text(text)
    world.provision("node-2")


# Durability, and what is put back


def is_directory(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


@pytest.mark.parametrize("act", ["add", "remove"])
def test_no_change_is_acknowledged_before_the_rename_is_durable(
    undisturbed: World, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    world = undisturbed
    world.provision("node-1")
    durable: list[int] = []
    real = os.fsync

    def sync(descriptor: int) -> None:
        real(descriptor)
        if is_directory(descriptor):
            durable.append(world.path.stat().st_ino)

    monkeypatch.setattr(os, "fsync", sync)
    if act == "add":
        world.provision("node-2")
    else:
        world.deprovision("node-1")
    assert durable[-1:] == [world.path.stat().st_ino]


def test_a_peer_whose_file_could_not_be_made_durable_is_off_the_interface_before_the_answer(
    undisturbed: World, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = undisturbed
    world.provision("node-1")
    before, text = dict(fake_hub.table), world.text
    failures = [OSError(errno.EIO, os.strerror(errno.EIO))]
    real = os.fsync

    def fail_once(descriptor: int) -> None:
        if is_directory(descriptor) and failures:
            raise failures.pop()
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fail_once)
    with pytest.raises(errors.HubUpdateError, match="Input/output error"):
        world.provision("node-2")
    assert failures == []
    assert (fake_hub.table, world.text) == (before, text)


def test_the_mark_beside_the_file_has_the_generation_of_every_acknowledged_change(
    undisturbed: World, records: FlakyRecords
) -> None:
    """Records that step back behind it are noticed, however soon the process died."""
    for number in range(3):
        undisturbed.provision(f"node-{number}")
        assert HubMark(undisturbed.path).read().generation == records.load().generation
