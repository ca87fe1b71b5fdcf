"""Access control with everything around it that a unit test may look at."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest

from backend.errors import UnauthenticatedError
from backend.models.access.audit import AuditAction, AuditEvent, AuditOutcome
from backend.models.access.callers import SERVICE, Caller
from backend.models.access.credentials import Credential, KeyRequest, Role, Secret, TokenRequest
from backend.models.access.sources import LimitKind
from backend.services.access.access_control import AccessControl
from backend.services.access.audit_writer import AuditWriter
from backend.services.access.authenticator import Authenticator
from backend.services.access.credential_cache import CredentialCache
from backend.services.access.credential_service import CredentialService
from backend.services.access.token_uses import TokenUses
from backend.services.no_metrics import NO_METRICS
from backend.services.ports import AccessStore, Metrics
from tests.harness.fakes import FakeAccessStore, NoLimits

SOMEWHERE = "192.0.2.1"


class CountingStore(FakeAccessStore):
    """Counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0
        self.loads = 0

    def credentials_version(self) -> int:
        self.looks += 1
        return super().credentials_version()

    def load_credentials(self) -> tuple[int, list[Credential]]:
        self.loads += 1
        return super().load_credentials()


class NotedLimits(NoLimits):
    """Notes what is counted, and says no to those in `full`."""

    def __init__(self) -> None:
        self.hits: list[tuple[LimitKind, str]] = []
        self.full: set[LimitKind] = set()

    async def hit(self, kind: LimitKind, who: str) -> int | None:
        self.hits.append((kind, who))
        return 7 if kind in self.full else None


class Access:
    """All parts over one store; `local` is the secret of this host's admin."""

    def __init__(self, store: AccessStore, *, required: bool = True, metrics: Metrics = NO_METRICS) -> None:
        self.limits = NotedLimits()
        self.uses = TokenUses()
        self.cache = CredentialCache(store, self.uses)
        self.audit = AuditWriter(store)
        admin, self.local = KeyRequest(role=Role.ADMIN).make("service", datetime.now(UTC))
        self.authenticator = Authenticator(
            self.cache, self.uses, self.audit, self.limits, local=admin, required=required, metrics=metrics
        )
        self.credentials = CredentialService(store, self.cache)
        self.control = AccessControl(self.authenticator, self.credentials, self.audit)

    def authenticate(self, secret: Secret | None = None, *, source: str | None = SOMEWHERE) -> Caller:
        """Authenticate a request that shows a credential, or none."""
        shown = None if secret is None else f"Bearer {secret.reveal()}"
        return asyncio.run(self.authenticator.authenticate(shown, source, "r-1"))

    def refused(self, secret: Secret | None = None, **asked: Any) -> tuple[str, str | None]:
        """Return the reason of a 401 for the audit log, and whose credential it was."""
        with pytest.raises(UnauthenticatedError) as caught:
            self.authenticate(secret, **asked)
        return caught.value.audit_reason, caught.value.credential_id


class CommandLine:
    """Writes credentials into a store as the command line does, behind the service's back."""

    def __init__(self, store: AccessStore) -> None:
        self._store = store

    def make(self, request: TokenRequest | KeyRequest, at: datetime | None = None) -> Secret:
        credential, secret = request.make("cli:root", at or datetime.now(UTC))
        self._store.keep_credential(credential, _event(AuditAction.KEY_MADE))
        return secret

    def revoke(self, secret: Secret) -> None:
        self._store.revoke_credential(secret.id, _event(AuditAction.KEY_REVOKED))


def _event(action: AuditAction) -> AuditEvent:
    return SERVICE.event(datetime.now(UTC), action, AuditOutcome.ACCEPTED)
