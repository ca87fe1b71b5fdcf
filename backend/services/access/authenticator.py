"""Authenticates callers, and authorizes them for an endpoint's permission."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Final

from backend.errors import (
    AuthenticationOffError,
    ForbiddenError,
    RateLimitedError,
    UnauthenticatedError,
)
from backend.models.access.callers import Caller, CallerKind
from backend.models.access.credentials import Credential, CredentialKind, Permission, Secret
from backend.models.access.sources import LimitKind
from backend.services.access.audit_writer import AuditWriter
from backend.services.access.credential_cache import CredentialCache
from backend.services.access.token_uses import TokenUses
from backend.services.no_metrics import NO_METRICS
from backend.services.ports import Metrics, RateLimiter

_SCHEME: Final = "bearer"


class Authenticator:
    """Authenticates each request once, from memory; authorizes it once its body is there."""

    def __init__(  # noqa: PLR0913 - its parts and its settings
        self,
        cache: CredentialCache,
        uses: TokenUses,
        audit: AuditWriter,
        limiter: RateLimiter,
        *,
        local: Credential | None = None,
        required: bool = True,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        """`local` is the key in `admin.header`, which is never recorded. `required` is WIREGUARD_AUTH."""
        self._cache = cache
        self._uses = uses
        self._audit = audit
        self._limiter = limiter
        self._local: Final = local
        self.required: Final = required
        self._metrics = metrics

    async def authenticate(self, authorization: str | None, source: str | None, request_id: str) -> Caller:
        """Return the caller; raise UnauthenticatedError, RateLimitedError or RecordsUnavailableError."""
        await self.limit_source(source)
        if not self.required:
            return Caller(CallerKind.ANYONE, None, source, request_id)
        now = datetime.now(UTC)
        try:
            credential = await self._credential(authorization, source, now)
        except UnauthenticatedError as error:
            raise await self.count_failure(error, source) from None
        token = credential.kind is CredentialKind.TOKEN
        await self._limit(LimitKind.TOKEN if token else LimitKind.KEY, credential.id)
        if credential is self._local:
            return Caller(CallerKind.LOCAL, credential, source, request_id)
        if not token:
            self._audit.note_used(credential.id, now)
        caller = Caller.of(credential, source, request_id)
        if not self._uses.used_up(credential):
            return caller
        # Counted as a failed attempt: otherwise its holder could have any number of bodies read and compared.
        for who in (source or "unix", credential.id):
            await self._limit(LimitKind.FAILED_AUTHENTICATION, who)
        return replace(caller, may_only_repeat=True)

    def authorize(self, caller: Caller, permission: Permission) -> None:
        """Raise ForbiddenError unless the caller has the permission.

        Raises UnauthenticatedError where its credential was revoked or expired since it was authenticated:
        its body may have taken long to come in.
        """
        credential = caller.credential
        if credential is not None:
            known = self._cache.get(credential.id) or credential
            ended = known.ended(datetime.now(UTC))
            if ended is not None:
                raise UnauthenticatedError(ended, credential.id)
        if not caller.may(permission):
            error = ForbiddenError if self.required else AuthenticationOffError
            raise error(permission.role)

    async def limit_source(self, source: str | None) -> None:
        """Count a request; raise RateLimitedError where its source sends too many."""
        if source is not None:
            await self._limit(LimitKind.SOURCE, source)

    async def count_failure(
        self, error: UnauthenticatedError, source: str | None
    ) -> UnauthenticatedError | RateLimitedError:
        """Count a failed attempt; return the error, or RateLimitedError for a source over its limit."""
        self.note_failure(error)
        seconds = await self._limiter.hit(LimitKind.FAILED_AUTHENTICATION, source or "unix")
        return error if seconds is None else RateLimitedError(seconds, error.credential_id)

    def note_failure(self, error: UnauthenticatedError) -> None:
        """Count a failed attempt for the metrics alone."""
        self._metrics.authentication_failed(error.audit_reason)

    async def close(self) -> None:
        """Close the rate limiter's connections, in the event loop that has used them."""
        await self._limiter.close()

    async def _credential(self, authorization: str | None, source: str | None, now: datetime) -> Credential:
        if authorization is None:
            raise UnauthenticatedError("missing")
        secret = _secret(authorization)
        if secret is None:
            raise UnauthenticatedError("malformed")
        if self._local is not None and secret.id == self._local.id and self._local.matches(secret):
            return self._local
        credential = await self._cache.find(secret.id)
        if credential is None:
            raise UnauthenticatedError("unknown")
        if not credential.matches(secret):
            raise UnauthenticatedError("secret", credential.id)
        reason = credential.refusal(now, source)
        if reason is not None:
            raise UnauthenticatedError(reason, credential.id)
        return credential

    async def _limit(self, kind: LimitKind, who: str) -> None:
        seconds = await self._limiter.hit(kind, who)
        if seconds is not None:
            raise RateLimitedError(seconds)


def _secret(authorization: str) -> Secret | None:
    """Read the header Authorization (RFC 6750), or return None."""
    scheme, _, text = authorization.partition(" ")
    try:
        return Secret.parse(text.strip()) if scheme.lower() == _SCHEME else None
    except ValueError:
        return None
