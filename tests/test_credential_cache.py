"""When memory has the recorded credentials, and how often the records are asked for them."""

import asyncio
import threading
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from backend.errors import RecordsUnavailableError, UnauthenticatedError
from backend.models.access.callers import Caller
from backend.models.access.credentials import KeyRequest, Role, Secret
from backend.services.access import credential_cache
from backend.services.access.credential_cache import SharedLook
from tests.harness.access import SOMEWHERE, Access, CommandLine, CountingStore

INTERVAL = 0.02


@pytest.fixture(autouse=True)
def _short_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credential_cache, "INTERVAL_SECONDS", INTERVAL)


class GatedStore(CountingStore):
    """Reads its version, and gives it out when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.read = threading.Event()

    def credentials_version(self) -> int:
        version = super().credentials_version()
        self.read.set()
        self.gate.wait(10)
        return version


class GatedWorld(Access):
    """Access control whose looks into the records can be held up."""

    def __init__(self) -> None:
        self.gated = GatedStore()
        super().__init__(self.gated)
        self.command_line = CommandLine(self.gated)
        self.cache.refresh()

    def new_key(self) -> Secret:
        return self.command_line.make(KeyRequest(role=Role.READ))

    def asks(self, secret: Secret) -> Coroutine[Any, Any, Caller]:
        return self.authenticator.authenticate(f"Bearer {secret.reveal()}", SOMEWHERE, "r-1")


@pytest.fixture
def world() -> GatedWorld:
    return GatedWorld()


def test_revocation_counts_from_the_next_refresh(world: GatedWorld) -> None:
    secret = world.new_key()
    world.cache.refresh()
    world.command_line.revoke(secret)
    assert world.authenticate(secret).credential is not None
    world.cache.refresh()
    assert world.refused(secret) == ("revoked", secret.id)


def test_refresh_loads_the_credentials_only_where_there_are_others(world: GatedWorld) -> None:
    loads = world.gated.loads
    for _ in range(5):
        world.cache.refresh()
    assert world.gated.loads == loads
    world.new_key()
    for _ in range(5):
        world.cache.refresh()
    assert world.gated.loads == loads + 1


def test_key_made_during_a_look_is_found_by_all_requests(world: GatedWorld) -> None:
    """The look began before the key was made, so its result must not refuse the key."""
    world.new_key()
    world.cache.refresh()
    before = world.gated.looks

    async def race() -> list[Caller]:
        world.gated.read.clear()
        world.gated.gate.clear()
        stranger = asyncio.ensure_future(world.asks(Secret.generate()))
        assert await asyncio.to_thread(world.gated.read.wait, 10)
        secret = world.new_key()
        first = [asyncio.ensure_future(world.asks(secret)) for _ in range(96)]
        # Every one of them has come as far as it can.
        await asyncio.sleep(0)
        world.gated.gate.set()
        with pytest.raises(UnauthenticatedError):
            await stranger
        return await asyncio.gather(*first)

    assert len({caller.name for caller in asyncio.run(race())}) == 1
    assert world.gated.looks == before + 2


def test_key_made_right_after_a_look_is_found_by_all_requests(world: GatedWorld) -> None:
    world.new_key()
    world.cache.refresh()
    before = world.gated.looks

    async def race() -> list[Caller]:
        with pytest.raises(UnauthenticatedError):
            await world.asks(Secret.generate())
        secret = world.new_key()
        return await asyncio.gather(*(world.asks(secret) for _ in range(96)))

    assert len({caller.name for caller in asyncio.run(race())}) == 1
    assert world.gated.looks == before + 2


def test_a_flood_of_unknown_credentials_asks_the_records_once_in_an_interval(world: GatedWorld) -> None:
    world.new_key()
    world.cache.refresh()
    before, began = world.gated.looks, time.monotonic()

    async def guess() -> None:
        for _ in range(20):
            with pytest.raises(UnauthenticatedError):
                await world.asks(Secret.generate())

    async def flood() -> None:
        await asyncio.gather(*(guess() for _ in range(50)))

    asyncio.run(flood())
    assert world.gated.looks - before <= (time.monotonic() - began) / INTERVAL + 1


def test_a_look_that_takes_long_is_not_joined_by_another_thread() -> None:
    """Each would hold a thread of the pool for as long as the records hang."""
    at_once = most = 0
    go_on = threading.Event()

    def look() -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        go_on.wait(10)
        at_once -= 1

    async def ask() -> None:
        shared = SharedLook(look)
        waiting = []
        for _ in range(5):
            waiting.append(asyncio.ensure_future(shared.wait()))
            await asyncio.sleep(2 * INTERVAL)
        assert not any(one.done() for one in waiting)
        go_on.set()
        await asyncio.gather(*waiting)

    asyncio.run(ask())
    assert most == 1


def test_cancelled_request_leaves_the_look_to_the_others(world: GatedWorld) -> None:
    async def race() -> Caller:
        secret = world.new_key()
        leaving, staying = (asyncio.ensure_future(world.asks(secret)) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        return await staying

    assert asyncio.run(race()).credential is not None


def test_records_that_are_away_are_asked_again_by_the_next(world: GatedWorld) -> None:
    secret = world.new_key()
    world.gated.away = True

    async def ask() -> Caller:
        with pytest.raises(RecordsUnavailableError):
            await world.asks(secret)
        world.gated.away = False
        return await world.asks(secret)

    assert asyncio.run(ask()).credential is not None
