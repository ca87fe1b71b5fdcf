"""Counts the uses of enrolment tokens in memory, so that a used-up token costs the records no query."""

from collections.abc import Iterable
from threading import Lock

from backend.models.access.credentials import Credential


class TokenUses:
    """Counts the granted uses of tokens. May be used by many threads.

    The records decide whether a use is left, in the transaction that adds the peer. The count here refuses a
    used-up token earlier.
    """

    def __init__(self) -> None:
        self._lock = Lock()  # guards _uses; never held across I/O
        self._uses: dict[str, int] = {}

    def load(self, credentials: Iterable[Credential]) -> None:
        """Take over the recorded uses of tokens that aren't counted here yet.

        Later loads change nothing: the records may have counted uses of changes that are still under way, or
        that are about to be compensated.
        """
        with self._lock:
            for credential in credentials:
                self._uses.setdefault(credential.id, credential.uses)

    def count(self, token_id: str) -> None:
        """Count a use that the records have granted."""
        with self._lock:
            self._uses[token_id] = self._uses.get(token_id, 0) + 1

    def used_up(self, credential: Credential | None) -> bool:
        """Say whether this is a token without a use left, as far as is known here."""
        if credential is None or credential.max_uses is None:
            return False
        return self._uses.get(credential.id, 0) >= credential.max_uses
