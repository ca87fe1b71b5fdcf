"""Rate limits with the library `limits`: in this process's memory, or in Redis for several replicas.

The strategy is the fixed window: `60000/minute` allows 60000 from the first hit on until a minute has passed.
It costs one counter a caller, where a moving window keeps a time for each hit and a sliding one costs two
counters. The price is that a caller may do twice as much around the border of two windows, which is as good
here: the limits are there to keep load within bounds, not to sell it.
"""

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from limits import RateLimitItem, parse
from limits.aio.storage import RedisStorage
from limits.aio.strategies import FixedWindowRateLimiter

from backend.errors import StartRefusedError
from backend.models.access.sources import LimitKind, network_of

if TYPE_CHECKING:
    from redis.asyncio import BlockingConnectionPool

log = logging.getLogger(__name__)

# Each takes about 330 bytes. Only source addresses can be that many.
MAX_WINDOWS: Final = 50_000

# A request waits that long for Redis, and then goes on without.
_REDIS_SECONDS: Final = 1.0
_REDIS_AGAIN_SECONDS: Final = 5.0
_REDIS_CONNECTIONS: Final = 32

_BY_ADDRESS: Final = {LimitKind.SOURCE, LimitKind.FAILED_AUTHENTICATION}


class FixedWindows:
    """The windows of one limit in memory, never more than `most` of them.

    The storage of `limits` looks at all of its counters at each hit, and has no bound. Here the windows stand
    in the order in which they end. A new one takes the place of the oldest when there are too many: a limit
    for each address doesn't hold a caller with that many addresses anyhow.
    """

    def __init__(
        self, item: RateLimitItem, most: int = MAX_WINDOWS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._amount = item.amount
        self._seconds = item.get_expiry()
        self._most = most
        self._clock = clock
        self._windows: OrderedDict[str, _Window] = OrderedDict()

    def __len__(self) -> int:
        return len(self._windows)

    def hit(self, who: str) -> int | None:
        """Count one more for `who`; return None if that is within the limit, else seconds to wait (>= 1)."""
        now = self._clock()
        window = self._windows.get(who)
        if window is None or window.ends <= now:
            self._windows.pop(who, None)
            self._make_room(now)
            window = self._windows[who] = _Window(now + self._seconds)
        window.count += 1
        return None if window.count <= self._amount else max(1, math.ceil(window.ends - now))

    def _make_room(self, now: float) -> None:
        # Two for each new one: they get fewer, and no request waits while thousands are taken away.
        for _ in range(2):
            oldest = next(iter(self._windows.items()), None)
            if oldest is None or (len(self._windows) < self._most and oldest[1].ends > now):
                return
            del self._windows[oldest[0]]


@dataclass(slots=True)
class _Window:
    ends: float
    count: int = 0


class RateLimits:
    """The limits of each kind, in memory (`memory://`) or in Redis (`redis://`, `rediss://`).

    Without Redis, whatever the reason, no request is refused: every caller needs a credential as well, and a
    limit that is one replica's own for a while costs less than an outage. The counting then goes on in
    memory, from nothing, and one request tries Redis again every few seconds.

    IPv6 sources count by their /64, the least that a subscriber gets; an IPv4 address that is mapped into
    IPv6 counts as itself. To be used from one event loop.
    """

    def __init__(
        self,
        limits: Mapping[LimitKind, str],
        storage_url: str = "memory://",
        *,
        max_windows: int = MAX_WINDOWS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Take one limit for each kind, in the notation of `limits`; raise StartRefusedError."""
        self._items: dict[LimitKind, RateLimitItem] = {kind: parse(limits[kind]) for kind in LimitKind}
        # One for each kind, so that a flood of one leaves the others alone.
        self._memory = {kind: FixedWindows(self._items[kind], max_windows, clock) for kind in LimitKind}
        self._clock = clock
        self._redis = None if storage_url.startswith("memory:") else _Redis.at(storage_url)
        # None while Redis answers.
        self._ask_redis_again_at: float | None = None

    async def hit(self, kind: LimitKind, who: str) -> int | None:
        """Count one more for `who`; return None if that is within the limit, else seconds to wait (>= 1)."""
        if kind in _BY_ADDRESS:
            who = network_of(who)
        redis = self._redis
        if redis is not None and self._may_ask_redis():
            was_away = self._ask_redis_again_at is not None
            try:
                async with asyncio.timeout(_REDIS_SECONDS):
                    seconds = await redis.hit(self._items[kind], kind, who)
            except redis.errors as exc:
                self._note_away(exc)
            else:
                if was_away:
                    self._ask_redis_again_at = None
                    log.info("rate_limit_storage_back")
                return seconds
        return self._memory[kind].hit(who)

    async def close(self) -> None:
        """Close the connections to Redis."""
        if self._redis is not None:
            await self._redis.pool.aclose()

    def _may_ask_redis(self) -> bool:
        if self._ask_redis_again_at is None:
            return True
        now = self._clock()
        if now < self._ask_redis_again_at:
            return False
        # One request tries; the others don't wait for it.
        self._ask_redis_again_at = now + _REDIS_AGAIN_SECONDS
        return True

    def _note_away(self, error: Exception) -> None:
        known, self._ask_redis_again_at = self._ask_redis_again_at, self._clock() + _REDIS_AGAIN_SECONDS
        if known is None:
            # Its text could hold parts of the URL.
            log.warning(
                "rate_limit_storage_away",
                extra={"error": type(error).__name__, "consequence": "each process counts for itself"},
            )


@dataclass(frozen=True, slots=True)
class _Redis:
    pool: "BlockingConnectionPool"
    strategy: FixedWindowRateLimiter
    errors: tuple[type[Exception], ...]

    async def hit(self, item: RateLimitItem, kind: LimitKind, who: str) -> int | None:
        if await self.strategy.hit(item, kind, who):
            return None
        ends = await self.strategy.storage.get_expiry(item.key_for(kind, who))
        return max(1, math.ceil(ends - time.time()))

    @classmethod
    def at(cls, url: str) -> Self:
        try:
            # An extra that is only installed where it is used.
            from redis.asyncio import BlockingConnectionPool  # noqa: PLC0415 - an extra
            from redis.exceptions import RedisError  # noqa: PLC0415 - an extra
        except ImportError:
            raise StartRefusedError(
                "WIREGUARD_RATE_LIMIT_STORAGE names Redis, whose client isn't installed; run "
                "`pip install 'wireguard-provisioning[redis]'`, or set it to memory://"
            ) from None
        # The wait for a connection ends with everything else, after _REDIS_SECONDS.
        pool = BlockingConnectionPool.from_url(url, max_connections=_REDIS_CONNECTIONS, timeout=None)
        # The URL stays here: the library would repeat it in its errors.
        options: dict[str, Any] = {"connection_pool": pool}
        storage = RedisStorage(
            "redis://", implementation="redispy", key_prefix="wireguard-provisioning", **options
        )
        return cls(pool, FixedWindowRateLimiter(storage), (RedisError, OSError))
