"""What a batch asks before it touches anything, and what an overtaken process leaves alone."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import pytest

from backend import errors
from backend.services.hub import hub_committer
from backend.services.ports import Batch, Journal
from tests.harness.fakes import FakeHub, FlakyJournal, GatedJournal
from tests.harness.memory_journal import MemoryJournal
from tests.harness.patience import eventually
from tests.harness.requests import new_key
from tests.test_provisioning_service import WAIT, World, request

MakeWorld = Callable[..., World]
# Long enough for nothing to be noticed but by the batch itself.
NEVER = 3600.0
OFTEN = 0.02


@pytest.fixture
def hub() -> FakeHub:
    return FakeHub()


@pytest.fixture
def make_world(tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeWorld]:
    """Start services, which look at the hub as often as the test says, and close them at the end."""
    worlds = list[World]()

    def make(journal: Journal, *, look_every: float) -> World:
        monkeypatch.setattr(hub_committer, "HEAL_INTERVAL_SECONDS", look_every)
        world = World(tmp_path, journal, hub, "10.0.0.0/24")
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


class CountingJournal(FlakyJournal):
    """Records that count the batches that reached them."""

    def __init__(self) -> None:
        super().__init__()
        self.intents = 0

    def intend(self, batch: Batch) -> None:
        self.intents += 1
        super().intend(batch)


def change(world: World, act: str) -> None:
    """Add a peer, or remove node-1."""
    if act == "add":
        world.provision("node-2")
    else:
        world.service.deprovision_peer("node-1", WAIT)


# Before a batch


@pytest.mark.parametrize("act", ["add", "remove"])
def test_records_that_do_not_answer_are_noticed_before_anything_is_written(
    make_world: MakeWorld, hub: FakeHub, act: str
) -> None:
    """A full disk with the records, say: what is begun there has no certain end."""
    journal = CountingJournal()
    world = make_world(journal, look_every=NEVER)
    world.provision("node-1")
    before = journal.intents, version(world.path), dict(hub.table)
    journal.failing_at = {"check"}
    with pytest.raises(errors.RecordsUnavailableError, match="no answer at check"):
        change(world, act)
    assert (journal.intents, version(world.path), hub.table) == before
    journal.failing_at = set()
    change(world, act)


def test_records_that_do_not_answer_are_noticed_in_the_middle_of_a_burst(
    make_world: MakeWorld, hub: FakeHub
) -> None:
    entered, gate = threading.Event(), threading.Event()

    class Checked(GatedJournal):
        away = False

        def check(self) -> None:
            if self.away:
                raise errors.RecordsUnavailableError("no answer at check")

    def enter(_: Batch) -> None:
        entered.set()
        gate.wait(WAIT)

    journal = Checked(enter)
    world = make_world(journal, look_every=NEVER)
    first = world.service.submit_provision(request("node-1"))
    assert entered.wait(WAIT)
    second = world.service.submit_provision(request("node-2"))
    journal.away = True
    gate.set()
    assert first.result(WAIT).node_id == "node-1"
    with pytest.raises(errors.RecordsUnavailableError, match="no answer at check"):
        second.result(WAIT)
    assert set(world.service.list_provisioned_peers()) == {"node-1"}
    assert "node-2" not in world.text


def test_a_process_that_has_lost_its_records_writes_nothing_more(make_world: MakeWorld, hub: FakeHub) -> None:
    class Lost(CountingJournal):
        lost = False

        def check(self) -> None:
            if self.lost:
                raise errors.OvertakenError

    journal = Lost()
    world = make_world(journal, look_every=NEVER)
    world.provision("node-1")
    before = journal.intents, version(world.path), dict(hub.table)
    journal.lost = True
    for _ in range(2):
        with pytest.raises(errors.OvertakenError):
            world.provision("node-2")
        # For good: the new owner has gone on meanwhile.
        journal.lost = False
    assert (journal.intents, version(world.path), hub.table) == before


@pytest.mark.parametrize("act", ["add", "remove"])
def test_a_hub_that_is_known_to_be_out_of_step_is_mended_before_anything_is_recorded(
    make_world: MakeWorld, hub: FakeHub, act: str
) -> None:
    """A retry of what has just failed for a cause that still stands touches nothing."""
    journal = CountingJournal()
    world = make_world(journal, look_every=NEVER)
    key = new_key()
    world.provision("node-1", key)
    hub.broken = "out of order"
    with pytest.raises(errors.HubUpdateError, match="out of order"):
        world.provision("node-9")
    before = journal.intents, version(world.path), dict(hub.table)
    for _ in range(3):
        with pytest.raises(errors.HubUpdateError, match="out of order"):
            change(world, act)
    assert (journal.intents, version(world.path), hub.table) == before
    hub.broken = None
    change(world, act)
    assert "node-9" not in world.text
    assert len(hub.table) == (2 if act == "add" else 0)


@pytest.mark.parametrize("act", ["add", "remove"])
def test_an_interface_that_is_gone_is_noticed_before_the_file_is_replaced(
    make_world: MakeWorld, hub: FakeHub, act: str
) -> None:
    world = make_world(MemoryJournal(), look_every=NEVER)
    world.provision("node-1")
    before = version(world.path)
    hub.vanish()
    with pytest.raises(errors.HubUpdateError, match="interface wg0 does not exist"):
        change(world, act)
    assert version(world.path) == before
    hub.come_back()
    change(world, act)
    assert version(world.path) != before


# After another process has taken over


class IdleQueue(SimpleQueue[Any]):
    """Counts how often the committer waited for work in vain: each time it does what is due."""

    idle = 0

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        try:
            return super().get(block, timeout)
        except Empty:
            type(self).idle += 1
            raise


@pytest.fixture
def idle_turns(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Give the test a function that waits until the committer had so many turns without work."""
    monkeypatch.setattr(IdleQueue, "idle", 0)
    monkeypatch.setattr(hub_committer, "SimpleQueue", IdleQueue)

    def wait(number: int) -> None:
        until = IdleQueue.idle + number
        eventually(lambda: IdleQueue.idle >= until)

    return wait


def test_an_overtaken_process_leaves_file_and_interface_to_the_new_owner(
    make_world: MakeWorld, hub: FakeHub, idle_turns: Callable[[int], None]
) -> None:
    journal = FlakyJournal()
    world = make_world(journal, look_every=OFTEN)
    key = new_key()
    world.provision("node-1", key)
    # While it is the owner it undoes what others do to its blocks; the same wait would show that below.
    ours = world.text
    world.path.write_text(ours.replace("node-1", "node-9"))
    idle_turns(3)
    assert world.text == ours
    journal.overtake()
    with pytest.raises(errors.OvertakenError):
        world.provision("node-2")
    theirs = ours.replace(key, new_key()).replace("10.0.0.2", "10.0.0.7")
    world.path.write_text(theirs)
    hub.table = table = {new_key(): frozenset({"10.0.0.7/32"})}
    before, syncs, changes = version(world.path), hub.syncs, hub.changes
    idle_turns(5)
    # Nor when there is something to do.
    with pytest.raises(errors.OvertakenError):
        world.service.deprovision_peer("node-1", WAIT)
    idle_turns(2)
    hub.come_back()
    hub.table = table
    idle_turns(3)
    assert (version(world.path), world.text) == (before, theirs)
    assert (hub.table, hub.syncs, hub.changes) == (table, syncs, changes)
