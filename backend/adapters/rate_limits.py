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
from limits.aio.storage import RedisStorage, Storage
from limits.aio.strategies import FixedWindowRateLimiter

from backend.errors import StartRefusedError
from backend.models.access.limit_kind import LimitKind
from backend.models.access.sources import network_of

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


class BoundedMemory(Storage):
    """Counters in memory, of one length of window, and never more than `max_windows` of them.

    The library's own storage looks at all of its counters at each hit, and has no bound. Here the windows
    stand in the order in which they end. A new one takes the place of the oldest when there are too many:
    who comes from that many addresses isn't held by a limit for each of them anyhow.
    """

    STORAGE_SCHEME = None

    def __init__(self, max_windows: int = MAX_WINDOWS, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._max_windows = max_windows
        self._clock = clock
        self._windows: OrderedDict[str, _Window] = OrderedDict()

    @property
    def base_exceptions(self) -> type[Exception]:
        """What the methods may raise, which is nothing."""
        return ValueError

    async def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        """Add to a counter, or begin it anew if its `expiry` seconds are over; return what it says now."""
        now = self._clock()
        window = self._windows.get(key)
        if window is None or window.ends <= now:
            self._windows.pop(key, None)
            self._make_room(now)
            window = self._windows[key] = _Window(now + expiry)
        window.count += amount
        return window.count

    async def get(self, key: str) -> int:
        """Return what a counter says, 0 if there is none."""
        window = self._windows.get(key)
        return 0 if window is None or window.ends <= self._clock() else window.count

    async def get_expiry(self, key: str) -> float:
        """Return when a counter begins anew, in seconds since the epoch."""
        window = self._windows.get(key)
        return time.time() + (0.0 if window is None else max(0.0, window.ends - self._clock()))

    async def check(self) -> bool:
        """Return True: memory is always there."""
        return True

    async def reset(self) -> int:
        """Forget all counters; return how many there were."""
        count = len(self._windows)
        self._windows.clear()
        return count

    async def clear(self, key: str) -> None:
        """Forget a counter."""
        self._windows.pop(key, None)

    def _make_room(self, now: float) -> None:
        # Two for each new one: they get fewer, and no request waits while thousands are taken away.
        for _ in range(2):
            oldest = next(iter(self._windows.items()), None)
            if oldest is None or (len(self._windows) < self._max_windows and oldest[1].ends > now):
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

    IPv6 sources count by their /64, the least that anybody is given; an IPv4 address that comes mapped into
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
        self._memory = {kind: FixedWindowRateLimiter(BoundedMemory(max_windows, clock)) for kind in LimitKind}
        self._clock = clock
        self._redis = None if storage_url.startswith("memory:") else _Redis.at(storage_url)
        self._redis_is_away = False
        self._ask_redis_again_at = 0.0

    async def hit(self, kind: LimitKind, who: str) -> int | None:
        """Count one more for `who`; return None if that is within the limit, else seconds to wait (>= 1)."""
        if kind in _BY_ADDRESS:
            who = network_of(who)
        item = self._items[kind]
        redis = self._redis
        if redis is not None and self._may_ask_redis():
            was_away = self._redis_is_away
            try:
                async with asyncio.timeout(_REDIS_SECONDS):
                    seconds = await _hit(redis.strategy, item, kind, who)
            except redis.errors as exc:
                self._note_away(exc)
            else:
                if was_away:
                    self._redis_is_away = False
                    log.info("rate_limit_storage_back")
                return seconds
        return await _hit(self._memory[kind], item, kind, who)

    async def close(self) -> None:
        """Close the connections to Redis."""
        if self._redis is not None:
            await self._redis.pool.aclose()

    def _may_ask_redis(self) -> bool:
        if not self._redis_is_away:
            return True
        now = self._clock()
        if now < self._ask_redis_again_at:
            return False
        # This one finds out; the others don't wait for it.
        self._ask_redis_again_at = now + _REDIS_AGAIN_SECONDS
        return True

    def _note_away(self, error: Exception) -> None:
        self._ask_redis_again_at = self._clock() + _REDIS_AGAIN_SECONDS
        if self._redis_is_away:
            return
        self._redis_is_away = True
        # Its text could hold parts of the URL.
        log.warning(
            "rate_limit_storage_away",
            extra={"error": type(error).__name__, "consequence": "each process counts for itself"},
        )


async def _hit(
    strategy: FixedWindowRateLimiter, item: RateLimitItem, kind: LimitKind, who: str
) -> int | None:
    if await strategy.hit(item, kind, who):
        return None
    ends = await strategy.storage.get_expiry(item.key_for(kind, who))
    return max(1, math.ceil(ends - time.time()))


@dataclass(frozen=True, slots=True)
class _Redis:
    pool: "BlockingConnectionPool"
    strategy: FixedWindowRateLimiter
    errors: tuple[type[Exception], ...]

    @classmethod
    def at(cls, url: str) -> Self:
        try:
            # An extra that is only installed where it is used.
            from redis.asyncio import BlockingConnectionPool  # noqa: PLC0415 - see above
            from redis.exceptions import RedisError  # noqa: PLC0415 - see above
        except ImportError:
            raise StartRefusedError(
                "WIREGUARD_RATE_LIMIT_STORAGE names Redis, whose client isn't installed; run "
                "`pip install 'wireguard-provisioning[redis]'`, or set it to memory://"
            ) from None
        # Who waits for a connection is cut off with everything else, after _REDIS_SECONDS.
        pool = BlockingConnectionPool.from_url(url, max_connections=_REDIS_CONNECTIONS, timeout=None)
        # The URL stays here: the library would repeat it in its errors.
        options: dict[str, Any] = {"connection_pool": pool}
        storage = RedisStorage(
            "redis://", implementation="redispy", key_prefix="wireguard-provisioning", **options
        )
        return cls(pool, FixedWindowRateLimiter(storage), (RedisError, OSError))
