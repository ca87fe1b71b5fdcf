"""Looks at the interface: one at a time, at most one a second, each for everything that needs one."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

from backend.errors import HubUpdateError
from backend.models.wireguard.interface import InterfaceState
from backend.services.hub import interface_observer, interface_sync
from backend.services.hub.interface_observer import InterfaceObserver
from tests.harness.core import NEVER, Worlds
from tests.harness.fakes import FakeHub
from tests.harness.patience import WAIT, eventually
from tests.harness.requests import new_key


class CountingHub(FakeHub):
    """Counts its looks, and how many there are at the same time; a look can be held up."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0
        self.most_at_once = 0
        self._at_once = 0
        self.may_end = Event()
        self.during_a_look: Callable[[], object] = lambda: None
        self.may_end.set()

    def state(self) -> InterfaceState:
        self.looks += 1
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            self.may_end.wait(WAIT)
            self.during_a_look()
            return super().state()
        finally:
            self._at_once -= 1


@pytest.fixture
def hub() -> CountingHub:
    return CountingHub()


def test_there_are_never_two_looks_at_once(hub: CountingHub) -> None:
    observer = InterfaceObserver(hub)
    hub.may_end.clear()
    with ThreadPoolExecutor(4) as threads:
        looks = [threads.submit(observer.look) for _ in range(4)]
        eventually(lambda: hub.looks == 1)
        hub.may_end.set()
        for look in looks:
            look.result(WAIT)
    observer.close()
    assert (hub.looks, hub.most_at_once) == (4, 1)


def test_requests_share_a_look_and_get_at_most_one_a_second(
    hub: CountingHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    observer = InterfaceObserver(hub)
    hub.may_end.clear()
    asked = [observer.ask() for _ in range(50)]
    hub.may_end.set()
    for look in asked:
        look.result(WAIT)
    observer.ask().result(WAIT)
    observer.look_regularly()
    assert hub.looks == 1
    monkeypatch.setattr(interface_observer, "_SHORTEST_SECONDS", 0.0)
    observer.ask().result(WAIT)
    observer.look_regularly()
    observer.close()
    assert hub.looks == 3


def test_looks_that_wait_for_a_slow_one_are_one(hub: CountingHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop's and a request's, behind one of the agent's."""
    monkeypatch.setattr(interface_observer, "_SHORTEST_SECONDS", 0.5)
    observer = InterfaceObserver(hub)
    hub.may_end.clear()
    with ThreadPoolExecutor(2) as threads:
        slow = threads.submit(observer.look)
        eventually(lambda: hub.looks == 1)
        time.sleep(0.6)
        regular = threads.submit(observer.look_regularly)
        asked = observer.ask()
        eventually(lambda: regular.running() and asked.running())
        time.sleep(0.05)
        hub.may_end.set()
        for look in (slow, regular, asked):
            look.result(WAIT)
    observer.close()
    assert hub.looks == 2


def test_a_request_for_a_look_that_fails_gets_no_error(hub: CountingHub) -> None:
    hub.vanish()
    observer = InterfaceObserver(hub)
    observer.ask().result(WAIT)
    with pytest.raises(HubUpdateError):
        observer.look()
    observer.close()


def test_a_look_is_taken_once_and_only_if_it_is_newer_than_the_last_change(hub: CountingHub) -> None:
    observer = InterfaceObserver(hub)
    before = time.monotonic()
    state = observer.look()
    taken = observer.take(since=before)
    assert taken is not None
    assert before <= taken[0] <= time.monotonic()
    assert taken[1] == state
    assert observer.take(since=before) is None
    observer.look()
    assert observer.take(since=time.monotonic()) is None
    observer.close()


def test_a_look_for_the_health_of_peers_serves_the_search_for_drift(
    make_world: Worlds, hub: CountingHub
) -> None:
    world = make_world(hub=hub, look_every=NEVER)
    key = new_key()
    world.provision("node-1", key)
    table = dict(hub.table)
    world.look()
    hub.table = {}
    world.observer.look()
    looks = hub.looks
    # Long before the next comparison is due.
    world.look()
    assert hub.table == table
    # The one that found it is not repeated; three more belong to `wg syncconf` and what it added anew.
    assert hub.looks == looks + 3


def test_a_look_that_has_waited_puts_the_next_comparison_off_no_further(
    make_world: Worlds, hub: CountingHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interface_sync, "_VERIFY_INTERVAL_SECONDS", 0.5)
    world = make_world(hub=hub, look_every=NEVER)
    world.provision("node-1")
    world.look()
    table = dict(hub.table)
    world.observer.look()
    hub.table = {}
    time.sleep(0.4)
    world.look()
    time.sleep(0.2)
    world.look()
    assert hub.table == table


def test_a_look_from_before_a_change_finds_no_drift(make_world: Worlds, hub: CountingHub) -> None:
    world = make_world(hub=hub, look_every=NEVER)
    world.look()
    world.observer.look()
    syncs = hub.syncs
    world.provision("node-1")
    world.look()
    assert hub.syncs == syncs


def test_at_most_one_look_is_held_in_memory(make_world: Worlds, hub: CountingHub) -> None:
    """One of 10,000 peers takes megabytes."""
    world = make_world(hub=hub, look_every=NEVER)
    # Those of the start, which were compared at once.
    assert world.observer.take(since=0) is None
    world.observer.look()
    held: list[object] = []
    hub.during_a_look = lambda: held.append(world.observer.take(since=0))
    world.observer.look()
    assert held == [None]
