"""Every credential in memory, as the records have them."""

from threading import Lock

from backend.models.access.credentials import Credential
from backend.services.access.shared_look import SharedLook
from backend.services.access.token_uses import TokenUses
from backend.services.ports import AccessStore


class CredentialCache:
    """The recorded credentials by their ID. `get` may be called by many threads, `find` by one event loop.

    The command line writes the records too. What it did is known here after the next `refresh`, and a new
    credential as soon as it is looked for.
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
