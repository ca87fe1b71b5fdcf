"""The Idempotency-Key: a request that is repeated with its key gets the first answer again.

See draft-ietf-httpapi-idempotency-key-header.
"""

import re
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Final, Self

from backend.errors import IdempotencyKeyError

ANSWERS_KEPT: Final = timedelta(hours=24)
KEY_OF_ANOTHER_REQUEST: Final = (
    "this Idempotency-Key came with another request before; send the same body again, or take a new key"
)
_KEY: Final = re.compile(r"[!-~]{1,255}")


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, as it was sent. The key and the request's body are kept as hashes only."""

    # The audit name of the caller that the key belongs to.
    scope: str
    key_hash: str
    body_hash: str
    node_id: str
    body: bytes = field(repr=False)
    created_at: datetime


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
            raise IdempotencyKeyError(KEY_OF_ANOTHER_REQUEST)

    def answer(self, scope: str, node_id: str, body: bytes, created_at: datetime) -> Answer:
        """Return the answer to be kept for it."""
        return Answer(scope, self.key_hash, self.body_hash, node_id, body, created_at)

    def is_answered_by(self, answer: Answer | None, scope: str) -> bool:
        """Say whether this is the answer to this key; raise IdempotencyKeyError for another body."""
        if answer is None or (answer.scope, answer.key_hash) != (scope, self.key_hash):
            return False
        self.require_same(answer.body_hash)
        return True
