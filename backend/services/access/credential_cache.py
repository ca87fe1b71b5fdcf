"""Keeps a copy of all recorded credentials in memory, so that a request is authenticated without I/O."""

import asyncio
import time
from collections.abc import Callable, Collection
from threading import Lock
from typing import Final

from backend.models.access.credentials import Credential
from backend.services.access.token_uses import TokenUses
from backend.services.ports import AccessStore

# The least time between the starts of two looks. A request waits for at most this and the look itself.
INTERVAL_SECONDS: Final = 0.1


class CredentialCache:
    """The recorded credentials by their ID. `get` may be called by many threads, `find` by one event loop.

    The command line writes credentials, too. The next `refresh` loads them; `find` loads a new one at once.
    """

    def __init__(self, store: AccessStore, uses: TokenUses) -> None:
        self._store = store
        self._uses = uses
        # Lets one thread load at a time. Readers don't take it: _credentials is replaced as a whole.
        self._loading = Lock()
        self._version: int | None = None
        self._credentials: dict[str, Credential] = {}
        self._look = SharedLook(self.refresh)

    def get(self, credential_id: str) -> Credential | None:
        """Return a credential as memory has it."""
        return self._credentials.get(credential_id)

    def all(self) -> Collection[Credential]:
        """Return every credential as memory has it. What is returned doesn't change later."""
        return self._credentials.values()

    async def find(self, credential_id: str) -> Credential | None:
        """Return a credential, from the records if memory hasn't got it; raise RecordsUnavailableError."""
        if credential_id not in self._credentials:
            await self._look.wait()
        return self._credentials.get(credential_id)

    def refresh(self) -> None:
        """Load the credentials if one was made or revoked since; raise RecordsUnavailableError."""
        with self._loading:
            if self._store.credentials_version() != self._version:
                self._load()

    def reload(self) -> list[Credential]:
        """Load and return the credentials, the oldest first, with their uses and when each was used last."""
        with self._loading:
            self._load()
            return list(self._credentials.values())

    def _load(self) -> None:
        version, credentials = self._store.load_credentials()
        self._uses.load(credentials)
        self._credentials = {credential.id: credential for credential in credentials}
        self._version = version


class SharedLook:
    """Runs one look at a time, which all callers of `wait` share. Used by one event loop at a time.

    A caller waits for a look that begins after its call. One that is under way, or that ended a moment ago,
    may have missed a later commit: a key that the command line has just printed.
    """

    def __init__(self, look: Callable[[], None]) -> None:
        """`look` blocks, and may raise: it is run in a thread."""
        self._look = look
        self._began_at = float("-inf")
        # The look that hasn't begun yet, which further callers may join, and the one before it.
        self._next: asyncio.Future[None] | None = None
        self._current: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        """Wait for a look that begins after this call; raise what it raises."""
        if self._next is None or self._next.done():
            self._next = asyncio.ensure_future(self._run(self._current))
        # Shielded: others wait for it too.
        await asyncio.shield(self._next)

    async def _run(self, before: asyncio.Future[None] | None) -> None:
        if before is not None and not before.done():
            await asyncio.wait([before])
        await asyncio.sleep(max(0.0, self._began_at + INTERVAL_SECONDS - time.monotonic()))
        self._current, self._next = self._next, None
        self._began_at = time.monotonic()
        await asyncio.to_thread(self._look)
