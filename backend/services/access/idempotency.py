"""The Idempotency-Key: who asks the same again with the same key gets the first answer again.

See draft-ietf-httpapi-idempotency-key-header.
"""

import re
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from itertools import takewhile
from threading import Lock
from typing import Final, Self

from backend.errors import IdempotencyKeyError
from backend.models.access.answers import Answer

_KEY: Final = re.compile(r"[!-~]{1,255}")
# Longer than a look into the records takes: what it doesn't see yet is still here.
_RECENT_SECONDS: Final = 60.0
_ANOTHER_BODY: Final = (
    "this Idempotency-Key came with another request before; send the same body again, or take a new key"
)


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """A key as it is kept, and the body that it came with."""

    key_hash: str
    body_hash: str

    @classmethod
    def parse(cls, text: str, body: bytes) -> Self:
        """Read the header; raise IdempotencyKeyError."""
        if _KEY.fullmatch(text) is None:
            raise IdempotencyKeyError("an Idempotency-Key is 1 to 255 visible ASCII characters, sent once")
        return cls(sha256(text.encode()).hexdigest(), sha256(body).hexdigest())

    def require_same(self, body_hash: str) -> None:
        """Raise IdempotencyKeyError where the key came with another body before."""
        if body_hash != self.body_hash:
            raise IdempotencyKeyError(_ANOTHER_BODY)

    def answer(self, scope: str, node_id: str, body: bytes, created_at: datetime) -> Answer:
        """Return the answer to be kept for it."""
        return Answer(scope, self.key_hash, self.body_hash, node_id, body, created_at)


@dataclass(slots=True)
class _Recent:
    body_hash: str
    node_id: str
    answer: Future[bytes]
    begun_at: float


class RecentAnswers:
    """Holds together those who ask at the same time with the same key."""

    def __init__(self) -> None:
        self._lock = Lock()  # guards _recent; never held while anything is begun
        self._recent: OrderedDict[tuple[str, str], _Recent] = OrderedDict()

    def once(
        self, scope: str, key: IdempotencyKey, node_id: str, begin: Callable[[Future[bytes]], None]
    ) -> Future[bytes]:
        """Return the answer that is on its way to this key, or have it begun.

        Only an answer that was a success is given again.
        """
        where = scope, key.key_hash
        with self._lock:
            self._drop_old()
            known = self._recent.get(where)
            if known is None:
                known = self._recent[where] = _Recent(key.body_hash, node_id, Future(), time.monotonic())
                first = True
            else:
                first = False
        key.require_same(known.body_hash)
        if first:
            known.answer.add_done_callback(lambda answer: self._conclude(where, answer))
            try:
                begin(known.answer)
            except BaseException as exc:
                known.answer.set_exception(exc)
                raise
        waiting: Future[bytes] = Future()
        known.answer.add_done_callback(lambda answer: _copy(answer, waiting))
        return waiting

    def forget(self, node_id: str) -> None:
        """Forget what a node was told that is no more."""
        with self._lock:
            # What is still on its way is for the node's next coming, which waited for this one's going.
            for where in [
                where
                for where, recent in self._recent.items()
                if recent.node_id == node_id and recent.answer.done()
            ]:
                del self._recent[where]

    def _conclude(self, where: tuple[str, str], answer: Future[bytes]) -> None:
        if answer.cancelled() or answer.exception() is not None:
            with self._lock:
                self._recent.pop(where, None)

    def _drop_old(self) -> None:
        until = time.monotonic() - _RECENT_SECONDS
        old = takewhile(lambda item: item[1].begun_at <= until, self._recent.items())
        for where in [where for where, recent in old if recent.answer.done()]:
            del self._recent[where]


def _copy(answer: Future[bytes], waiting: Future[bytes]) -> None:
    # Whoever waits may go away, and must not take the answer with them from the others.
    if not waiting.set_running_or_notify_cancel():
        return
    error = answer.exception()
    if error is None:
        waiting.set_result(answer.result())
    else:
        waiting.set_exception(error)
