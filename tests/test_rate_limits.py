"""How often is allowed, by whom, and what it costs to know."""

import asyncio
import logging
import sys
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from limits import parse

from backend.adapters.rate_limits import FixedWindows, RateLimits
from backend.errors import StartRefusedError
from backend.models.access.sources import LimitKind
from backend.services.ports import RateLimiter
from tests.harness.redis import PASSWORD, RedisServer

SOURCE, TOKEN, KEY, FAILED = LimitKind
PLENTY = dict.fromkeys(LimitKind, "60000/minute")


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def acting(act: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await act()

    asyncio.run(main())


async def hits(limits: RateLimiter, count: int, kind: LimitKind, who: str) -> list[int | None]:
    return [await limits.hit(kind, who) for _ in range(count)]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


def test_caller_over_the_limit_gets_the_seconds_to_wait(clock: Clock) -> None:
    limits = RateLimits(PLENTY | {SOURCE: "3/minute"}, clock=clock)

    async def act() -> None:
        assert await hits(limits, 4, SOURCE, "192.0.2.1") == [None, None, None, 60]
        clock.now += 59.5
        # To go on asking doesn't make it longer.
        assert await hits(limits, 2, SOURCE, "192.0.2.1") == [1, 1]
        clock.now += 0.5
        assert await hits(limits, 4, SOURCE, "192.0.2.1") == [None, None, None, 60]

    acting(act)


def test_each_counts_for_itself_and_in_each_kind(clock: Clock) -> None:
    limits = RateLimits(dict.fromkeys(LimitKind, "1/hour"), clock=clock)

    async def act() -> None:
        for kind in LimitKind:
            for who in ("192.0.2.1", "192.0.2.2"):
                assert await hits(limits, 2, kind, who) == [None, 3600]

    acting(act)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:2", True),
        ("2001:db8:0:0::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2", True),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("192.0.2.1", "192.0.2.2", False),
        ("unix", "unix", True),
        ("a:b", "a:c", False),
    ],
)
def test_a_source_is_an_address_or_an_ipv6_network(one: str, other: str, same: bool) -> None:
    limits = RateLimits(PLENTY | {SOURCE: "1/minute"})

    async def act() -> None:
        assert await limits.hit(SOURCE, one) is None
        assert (await limits.hit(SOURCE, other) is not None) is same
        # A credential's id is no address.
        assert await limits.hit(TOKEN, one) is None

    acting(act)


def test_memory_is_bounded_and_shrinks_when_windows_have_ended(clock: Clock) -> None:
    windows = FixedWindows(parse("1/minute"), 1000, clock)
    for number in range(5000):
        assert windows.hit(f"192.0.2.{number}") is None
    assert len(windows) == 1000
    # The latest are known, and the oldest were forgotten.
    assert [windows.hit(f"192.0.2.{number}") for number in (4000, 4999, 3999)] == [60, 60, None]
    clock.now += 60
    assert windows.hit("192.0.2.4999") is None
    for number in range(500):
        windows.hit(f"198.51.100.{number}")
    assert len(windows) == 501


def test_a_flood_of_sources_takes_little_and_leaves_the_other_kinds_alone() -> None:
    limits = RateLimits(PLENTY | {TOKEN: "1/minute"}, max_windows=5000)

    async def act() -> None:
        await limits.hit(TOKEN, "0123456789abcdef")
        tracemalloc.start()
        for number in range(20_000):
            await limits.hit(SOURCE, f"2001:db8:0:{number:x}::1")
        grown, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert grown < 5000 * 600
        assert await limits.hit(TOKEN, "0123456789abcdef") is not None

    acting(act)


def test_replicas_count_together_in_redis(redis: RedisServer) -> None:
    async def act() -> None:
        one = RateLimits(PLENTY | {SOURCE: "3/minute"}, redis.url)
        other = RateLimits(PLENTY | {SOURCE: "3/minute"}, redis.url)
        assert await hits(one, 2, SOURCE, "192.0.2.1") == [None, None]
        assert await other.hit(SOURCE, "192.0.2.1") is None
        for limits in (one, other):
            assert await limits.hit(SOURCE, "192.0.2.1") in {59, 60}
            await limits.close()

    acting(act)


def test_many_at_once_are_counted_exactly_in_redis(redis: RedisServer) -> None:
    async def act() -> None:
        limits = RateLimits(PLENTY | {KEY: "100/minute"}, redis.url)
        # Loads the script, so that none of those below has to.
        await limits.hit(SOURCE, "192.0.2.1")
        answers = await asyncio.gather(*(limits.hit(KEY, "0123456789abcdef") for _ in range(150)))
        assert answers.count(None) == 100
        await limits.close()

    acting(act)


@pytest.mark.parametrize("outage", ["gone", "silent"])
def test_without_redis_each_process_counts_for_itself_until_it_is_back(
    redis: RedisServer, clock: Clock, caplog: pytest.LogCaptureFixture, outage: str
) -> None:
    caplog.set_level(logging.INFO, "backend")

    async def act() -> None:
        limits = RateLimits(PLENTY | {SOURCE: "2/minute"}, redis.url, clock=clock)
        assert await hits(limits, 2, SOURCE, "192.0.2.1") == [None, None]
        if outage == "gone":
            redis.stop()
        else:
            redis.pause()
        assert await asyncio.gather(*(limits.hit(SOURCE, "192.0.2.1") for _ in range(3))) == [None, None, 60]
        clock.now += 5
        assert await limits.hit(SOURCE, "192.0.2.1") == 55
        if outage == "gone":
            redis.start()
        else:
            redis.resume()
        clock.now += 4.9
        assert await limits.hit(SOURCE, "192.0.2.2") is None
        assert [record.message for record in caplog.records] == ["rate_limit_storage_away"]
        clock.now += 0.1
        # What Redis knows counts again, and that is nothing where it was started anew.
        assert (await limits.hit(SOURCE, "192.0.2.1") is None) is (outage == "gone")
        await limits.close()

    acting(act)
    assert [record.message for record in caplog.records] == [
        "rate_limit_storage_away",
        "rate_limit_storage_back",
    ]
    assert PASSWORD not in caplog.text
    assert PASSWORD not in str([vars(record) for record in caplog.records])


def test_a_wrong_password_is_an_outage_too(redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    async def act() -> None:
        limits = RateLimits(PLENTY | {SOURCE: "1/minute"}, redis.url.replace(PASSWORD, "canary-other"))
        assert await hits(limits, 2, SOURCE, "192.0.2.1") == [None, 60]
        assert "canary" not in repr(limits)
        await limits.close()

    acting(act)
    (record,) = caplog.records
    assert vars(record)["error"] == "AuthenticationError"
    assert "canary" not in str(vars(record))


def test_a_client_that_is_not_installed_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(StartRefusedError, match="pip install 'wireguard-provisioning") as caught:
        RateLimits(PLENTY, "redis://:hunter2@cache")
    assert "hunter2" not in str(caught.value)
