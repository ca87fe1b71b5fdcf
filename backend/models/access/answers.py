"""Stored answers: a request that comes again with the same Idempotency-Key gets the first answer again."""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

ANSWERS_KEPT: Final = timedelta(hours=24)
KEY_OF_ANOTHER_REQUEST: Final = (
    "this Idempotency-Key came with another request before; send the same body again, or take a new key"
)


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
