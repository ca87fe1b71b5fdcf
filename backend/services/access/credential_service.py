"""Makes, lists and revokes credentials."""

from datetime import UTC, datetime

from backend.errors import CredentialNotFoundError
from backend.models.access.audit import AuditAction, AuditOutcome
from backend.models.access.callers import Caller
from backend.models.access.credentials import Credential, CredentialKind, KeyRequest, Secret, TokenRequest
from backend.services.access.credential_cache import CredentialCache
from backend.services.ports import AccessStore


class CredentialService:
    """Changes the recorded credentials, each change and its audit row in one transaction.

    Every method reads or writes the records, blocks, and raises RecordsUnavailableError.
    """

    def __init__(self, store: AccessStore, cache: CredentialCache) -> None:
        self._store = store
        self._cache = cache

    def make(self, request: TokenRequest | KeyRequest, caller: Caller) -> tuple[Credential, Secret]:
        """Make a credential."""
        now = datetime.now(UTC)
        credential, secret = request.make(caller.name, now)
        act = AuditAction(f"{credential.kind.value}_made")
        event = caller.event(now, act, AuditOutcome.ACCEPTED, credential.id)
        self._store.keep_credential(credential, event)
        self._cache.refresh()
        return credential, secret

    def of_kind(self, kind: CredentialKind) -> list[Credential]:
        """Return every credential of a kind, revoked and expired ones too, the oldest first."""
        return [credential for credential in self._cache.reload() if credential.kind is kind]

    def revoke(self, kind: CredentialKind, credential_id: str, caller: Caller) -> Credential:
        """Revoke a credential; raise CredentialNotFoundError where there is none of that kind."""
        # The command line may have made it a moment ago.
        self._cache.refresh()
        known = self._cache.get(credential_id)
        revoked = None
        if known is not None and known.kind is kind:
            act = AuditAction(f"{kind.value}_revoked")
            event = caller.event(datetime.now(UTC), act, AuditOutcome.ACCEPTED, credential_id)
            revoked = self._store.revoke_credential(credential_id, event)
        if revoked is None:
            raise CredentialNotFoundError(f"{kind.value} {credential_id}")
        self._cache.refresh()
        return revoked
