"""What reaches file and interface, and what never does: the whole service, without a real interface."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from backend import errors
from backend.models.wireguard.interface_state import InterfaceState
from backend.models.wireguard.keys import WireGuardPrivateKey
from backend.services.hub import hub_committer, hub_mirror
from backend.services.hub.drift import Drift
from backend.services.hub.mark import HubMark
from backend.services.ports import Batch, Journal
from tests.harness.fakes import FakeHub, FlakyJournal
from tests.harness.requests import new_key
from tests.test_provisioning_service import WAIT, World, request

MakeWorld = Callable[..., World]
# Long enough for nothing to be noticed but by the batch itself.
NEVER = 3600.0
OFTEN = 0.02
OTHER_VPN = WireGuardPrivateKey.generate().public_key()


class HookedJournal(FlakyJournal):
    """Records that count the batches, and let something happen while one is being written."""

    def __init__(self) -> None:
        super().__init__()
        self.intents = 0
        self.meanwhile: Callable[[Batch], object] = lambda _: None

    def intend(self, batch: Batch) -> None:
        self.intents += 1
        self.meanwhile(batch)
        super().intend(batch)


@pytest.fixture
def hub() -> FakeHub:
    return FakeHub()


@pytest.fixture
def journal() -> HookedJournal:
    return HookedJournal()


@pytest.fixture
def make_world(
    tmp_path: Path, hub: FakeHub, journal: HookedJournal, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MakeWorld]:
    """Start services, which look at the hub as often as the test says, and close them at the end."""
    worlds = list[World]()

    def make(look_every: float = NEVER, *, records: Journal = journal, on: FakeHub = hub) -> World:
        monkeypatch.setattr(hub_committer, "HEAL_INTERVAL_SECONDS", look_every)
        world = World(tmp_path, records, on, "10.0.0.0/24")
        worlds.append(world)
        world.service.start()
        return world

    yield make
    for world in worlds:
        world.service.close()


def version(path: Path) -> tuple[int, int, int]:
    """Return what is another one whenever the file was replaced or written."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def temporaries(world: World) -> list[Path]:
    return list(world.path.parent.glob(".*.tmp"))


def told(hub: FakeHub) -> tuple[object, ...]:
    """Return what the interface has, and how often it was told anything."""
    return dict(hub.table), hub.syncs, hub.changes


# What the disk or the records refuse


def test_a_change_that_the_disk_refuses_never_reaches_the_interface_and_its_retry_not_the_records(
    make_world: MakeWorld, hub: FakeHub, journal: HookedJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world()
    world.provision("node-1")
    before, intents = (told(hub), version(world.path)), journal.intents

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("backend.services.hub.staged_file._make_temporary", full)
        for _ in range(3):
            with pytest.raises(errors.HubUpdateError, match="No space left"):
                world.service.deprovision_peer("node-1", WAIT)
            assert (told(hub), version(world.path)) == before
            # Only the first had to be written to be taken back.
            assert journal.intents <= intents + 1
    world.service.deprovision_peer("node-1", WAIT)
    assert hub.table == {}


def test_a_batch_that_the_records_do_not_take_leaves_no_temporary_file(
    make_world: MakeWorld, hub: FakeHub, journal: HookedJournal
) -> None:
    world = make_world()
    world.provision("node-1")
    before = told(hub), version(world.path)
    journal.failing_at = {"intend"}
    with pytest.raises(errors.RecordsUnavailableError):
        world.provision("node-2")
    assert (dict(hub.table), version(world.path)) == (before[0][0], before[1])
    assert temporaries(world) == []


def test_a_change_that_the_records_refuse_is_left_out_of_file_and_interface(
    make_world: MakeWorld, hub: FakeHub, journal: HookedJournal
) -> None:
    """The new file is begun before the records have said which of a batch's changes they take."""
    world = make_world()
    refused, taken = new_key(), new_key()

    def refuse(batch: Batch) -> None:
        for change in batch.changes:
            if change.peer.wireguard_public_key == refused:
                change.refusal = errors.AddressTakenError(str(change.peer.address))

    # A batch that both go into together: they come while the first is being written.
    answers: list[Any] = []

    def enqueue(_: Batch) -> None:
        journal.meanwhile = refuse
        answers.extend(
            world.service.submit_provision(request(f"node-{number}", key))
            for number, key in enumerate((refused, taken))
        )

    journal.meanwhile = enqueue
    world.provision("node-9", first_key := new_key())
    first, second = answers
    with pytest.raises(errors.AddressTakenError):
        first.result(WAIT)
    second.result(WAIT)
    assert set(hub.table) == {first_key, taken}
    assert refused not in world.text
    assert temporaries(world) == []


def test_an_edit_while_the_records_are_written_is_kept(
    make_world: MakeWorld, hub: FakeHub, journal: HookedJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same size, and where times can't be set, so that only the text tells."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    with monkeypatch.context() as patch:
        real = os.utime
        patch.setattr(os, "utime", refuse)
        world = make_world()
        world.provision("node-1")

        def edit(_: Batch) -> None:
            moment = world.path.stat().st_mtime_ns
            text = world.text.replace("51820", "51821")
            with world.path.open("r+") as file:
                file.write(text)
            real(world.path, ns=(moment, moment))

        journal.meanwhile = edit
        world.provision("node-2")
    assert "ListenPort = 51821\n" in world.text
    assert world.text.count("[Peer]") == 2
    assert hub.port == 51821


# The interface


def test_an_interface_that_is_gone_is_noticed_before_the_records_are_written(
    make_world: MakeWorld, hub: FakeHub, journal: HookedJournal
) -> None:
    world = make_world()
    hub.vanish()
    with pytest.raises(errors.HubUpdateError, match="interface wg0 does not exist"):
        world.provision("node-1")
    assert journal.intents == 0


def test_an_interface_that_goes_while_the_records_are_written_leaves_the_file_as_it_was(
    make_world: MakeWorld, hub: FakeHub, journal: HookedJournal
) -> None:
    world = make_world()
    world.provision("node-1")
    before = version(world.path)
    journal.meanwhile = lambda _: hub.vanish()
    with pytest.raises(errors.HubUpdateError, match="interface wg0 does not exist"):
        world.provision("node-2")
    assert version(world.path) == before
    assert temporaries(world) == []
    assert [peer.node_id for peer in journal.load().peers] == ["node-1"]


@pytest.mark.parametrize("key", [OTHER_VPN, None], ids=["another key", "no key"])
def test_an_interface_with_another_key_or_with_peers_but_no_key_is_never_written_to(
    make_world: MakeWorld, hub: FakeHub, key: str | None
) -> None:
    hub.key = key
    hub.table = {new_key(): frozenset({"10.9.0.2/32"})}
    before = told(hub)
    world = make_world(OFTEN)
    with pytest.raises(errors.HubUpdateError, match="another private key"):
        world.provision("node-1")
    with pytest.raises(errors.HubUpdateError, match="another private key"):
        world.service.check()
    assert (told(hub), hub.key) == (before, key)


def test_an_interface_of_another_program_that_came_between_two_batches_is_never_written_to(
    make_world: MakeWorld, hub: FakeHub
) -> None:
    world = make_world()
    world.provision("node-1")
    hub.vanish()
    hub.come_back()
    hub.key, hub.table = OTHER_VPN, {new_key(): frozenset({"10.9.0.2/32"})}
    before = told(hub)
    for _ in range(2):
        with pytest.raises(errors.HubUpdateError, match="another private key"):
            world.provision("node-2")
    assert told(hub) == before
    assert world.text.count("[Peer]") == 1


def test_an_operators_edit_reaches_the_interface_with_the_batch_that_notices_it(
    make_world: MakeWorld, hub: FakeHub
) -> None:
    world = make_world()
    theirs, ours = new_key(), new_key()
    with world.path.open("a") as file:
        file.write(f"\n[Peer]\nPublicKey = {theirs}\nAllowedIPs = 192.168.7.0/24\n")
    world.provision("node-1", ours)
    assert set(hub.table) == {theirs, ours}


def test_what_a_sync_leaves_behind_is_cleared(make_world: MakeWorld) -> None:
    class Marked(FakeHub):
        mark = 5

        def state(self) -> InterfaceState:
            return replace(super().state(), fwmark=self.mark)

        def clear(self, drift: Drift) -> None:
            assert drift.fwmark
            self.mark = 0

    hub = Marked()
    world = make_world(on=hub)
    world.service.check()
    assert hub.mark == 0


def test_a_link_problem_turns_readiness_red(
    make_world: MakeWorld, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world()
    with monkeypatch.context() as patch:
        patch.setattr(hub, "link_problem", lambda: "the link of wg0 is down")
        with pytest.raises(errors.HubUpdateError, match="link of wg0 is down"):
            world.service.check()
    world.service.check()


# Durability, and what is put back


def is_directory(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


@pytest.mark.parametrize("act", ["add", "remove"])
def test_nothing_is_acknowledged_before_the_rename_is_durable(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    world = make_world()
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
        world.service.deprovision_peer("node-1", WAIT)
    assert durable[-1:] == [world.path.stat().st_ino]


def test_a_peer_whose_file_could_not_be_made_durable_is_off_the_interface_before_the_answer(
    make_world: MakeWorld, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make_world()
    world.provision("node-1")
    before, text = dict(hub.table), world.text
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
    assert (hub.table, world.text) == (before, text)


def test_the_mark_beside_the_file_has_the_generation_of_every_acknowledged_change(
    make_world: MakeWorld, journal: HookedJournal
) -> None:
    """Records that step back behind it are noticed, however soon the process died."""
    world = make_world()
    for number in range(3):
        world.provision(f"node-{number}")
        assert HubMark(world.path).read().generation == journal.load().generation


# Load


def test_a_drift_is_mended_while_changes_never_pause(
    make_world: MakeWorld, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_mirror, "_VERIFY_INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(hub_committer, "_LONGEST_BURST_SECONDS", 0.02)
    world = make_world(0.5)
    key = new_key()
    world.provision("node-1", key)
    del hub.table[key]
    for number in range(5000):
        world.provision("node-2") if number % 2 == 0 else world.service.deprovision_peer("node-2", WAIT)
        if key in hub.table:
            break
    assert hub.table[key] == {"10.0.0.2/32"}


def test_a_batch_is_bounded(
    make_world: MakeWorld, journal: HookedJournal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`wg set` takes its peers as arguments, and those have an end."""
    monkeypatch.setattr(hub_committer, "MAX_BATCH", 8)
    world = make_world()
    sizes: list[int] = []
    answers: list[Any] = []

    def enqueue_more(batch: Batch) -> None:
        sizes.append(len(batch.changes))
        if len(sizes) == 1:
            answers.extend(world.service.submit_provision(request(f"node-{n}")) for n in range(1, 21))

    journal.meanwhile = enqueue_more
    world.provision("node-0")
    assert len({answer.result(WAIT).address for answer in answers}) == 20
    assert sizes == [1, 8, 8, 4]
