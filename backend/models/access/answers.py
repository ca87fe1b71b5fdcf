"""The first answer to a request, kept for whoever asks it again with the same Idempotency-Key."""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

ANSWERS_KEPT: Final = timedelta(hours=24)


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, as it was sent. Only hashes are kept of the key and of the request's body."""

    # Whose key it is: the caller's audit name.
    scope: str
    key_hash: str
    body_hash: str
    node_id: str
    body: bytes = field(repr=False)
    created_at: datetime
