"""The hub's door: who is let in, to do what, and who makes the credentials for that."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from datetime import UTC, datetime
from threading import Lock
from typing import Final

from backend.errors import (
    AuthenticationOffError,
    CredentialNotFoundError,
    ForbiddenError,
    RateLimitedError,
    UnauthenticatedError,
)
from backend.models.access.answers import ANSWERS_KEPT
from backend.models.access.audit import AuditAction, AuditOutcome, AuditQuery, AuditRecord
from backend.models.access.callers import Caller, CallerKind
from backend.models.access.credentials import (
    Credential,
    CredentialKind,
    KeyRequest,
    Permission,
    Secret,
    TokenRequest,
)
from backend.models.access.sources import TrustedProxies
from backend.services.access.audit_writer import Clerk
from backend.services.access.challenges import ProofVerifier
from backend.services.access.idempotency import IdempotencyKey
from backend.services.access.shared_look import SharedLook
from backend.services.ports import AccessStore, LimitKind, RateLimiter

_SCHEME: Final = "bearer"
_MADE: Final = {CredentialKind.TOKEN: AuditAction.TOKEN_MADE, CredentialKind.KEY: AuditAction.KEY_MADE}
_REVOKED: Final = {
    CredentialKind.TOKEN: AuditAction.TOKEN_REVOKED,
    CredentialKind.KEY: AuditAction.KEY_REVOKED,
}


class Door:
    """Keeps every credential in memory, as the records have them.

    The command line writes the records, too: what it did is seen here within a second or two. Whether a
    token has a use left is decided by the records, in the transaction that lets a node in; what is kept of
    that here only spares them the question.
    """

    def __init__(  # noqa: PLR0913 - each is a part of the door, or varies it
        self,
        store: AccessStore,
        clerk: Clerk,
        limiter: RateLimiter,
        verifier: ProofVerifier | None = None,
        *,
        local: Credential | None = None,
        asks: bool = True,
        proxies: TrustedProxies | None = None,
    ) -> None:
        """Load nothing yet. A `verifier` is given where every node has to prove who it is.

        `local` is the credential of this host's admin, which is never in the records. Without `asks` no
        credential is looked at.
        """
        self._store = store
        self.verifier: Final = verifier
        self._local: Final = local
        self.asks: Final = asks
        self.proxies: Final = proxies or TrustedProxies()
        self.clerk = clerk
        self._limiter = limiter
        # Orders those who load; the two below are replaced as a whole, and read without it.
        self._loading = Lock()
        self._version: int | None = None
        self._credentials: dict[str, Credential] = {}
        self._look = SharedLook(self.refresh)
        # Guards _uses: how many uses of a token have been granted, as far as is known.
        self._counting = Lock()
        self._uses: dict[str, int] = {}

    def start(self) -> None:
        """Load the credentials, and begin to keep up with the records."""
        self.refresh()
        self.clerk.start(self.refresh)

    def close(self) -> None:
        """Have written down what was noted, and stop."""
        self.clerk.close()

    async def leave_loop(self) -> None:
        """Let go of what belongs to the event loop; whoever has used `admit` calls this at the end."""
        await self._limiter.close()

    def refresh(self) -> None:
        """Load the credentials if the records have others by now; raise RecordsUnavailableError."""
        with self._loading:
            if self._store.credentials_version() != self._version:
                self._load()

    def _load(self) -> None:
        version, credentials = self._store.load_credentials()
        with self._counting:
            for credential in credentials:
                # Once: from then on uses are counted as they are settled. The records may have counted some
                # already that are on their way, or that will be taken back.
                self._uses.setdefault(credential.id, credential.uses)
        self._credentials = {credential.id: credential for credential in credentials}
        self._version = version

    @property
    def notices(self) -> tuple[str, ...]:
        """What an operator should know."""
        if self.asks:
            return ()
        return ("WIREGUARD_AUTH=off: every caller may provision, read and delete peers",)

    async def admit(self, authorization: str | None, source: str | None, request_id: str) -> Caller:
        """Return who asks; raise UnauthenticatedError or RateLimitedError."""
        await self.limit_source(source)
        if not self.asks:
            return Caller(CallerKind.ANYONE, None, source, request_id)
        if authorization is None:
            raise await self.count_failure(UnauthenticatedError("missing"), source)
        credential = await self._credential(authorization, source)
        now = datetime.now(UTC)
        reason = credential.refusal(now, source, None)
        if reason is not None:
            raise await self.count_failure(UnauthenticatedError(reason, credential.id), source)
        token = credential.kind is CredentialKind.TOKEN
        await self._limit(LimitKind.TOKEN if token else LimitKind.KEY, credential.id)
        if credential is self._local:
            return Caller(CallerKind.LOCAL, credential, source, request_id)
        if not token:
            self.clerk.note_used(credential.id, now)
        caller = Caller.of(credential, source, request_id)
        if not self.used_up(caller):
            return caller
        # The body may be the repeat of what used it up, but isn't read any number of times to find that out.
        for who in (source or "unix", credential.id):
            await self._limit(LimitKind.FAILED_AUTHENTICATION, who)
        return replace(caller, used_up=True)

    async def limit_source(self, source: str | None) -> None:
        """Count a request; raise RateLimitedError where its source sends too many."""
        if source is not None:
            await self._limit(LimitKind.SOURCE, source)

    def require(self, caller: Caller, permission: Permission) -> None:
        """Raise ForbiddenError unless the caller may; a token that is used up is no better than none."""
        self._require_still(caller)
        if caller.may(permission):
            return
        if caller.token_id is not None and self.used_up(caller):
            raise UnauthenticatedError("used_up", caller.token_id)
        raise ForbiddenError(permission.role) if self.asks else AuthenticationOffError(permission.role)

    def _require_still(self, caller: Caller) -> None:
        """Raise UnauthenticatedError where the caller isn't let in any more: its body may have taken long."""
        if caller.credential is not None:
            known = self._credentials.get(caller.credential.id, caller.credential)
            reason = known.refusal(datetime.now(UTC), caller.source, None)
            if reason is not None:
                raise UnauthenticatedError(reason, known.id)

    def check_node(self, caller: Caller, node_id: str) -> None:
        """Raise UnauthenticatedError unless the caller's token is for a node of this name."""
        if caller.credential is not None and caller.credential.node_id_pattern is not None:
            reason = caller.credential.refusal(datetime.now(UTC), caller.source, node_id)
            if reason is not None:
                raise UnauthenticatedError(reason, caller.credential.id)

    def used_up(self, caller: Caller) -> bool:
        """Say whether the caller's token has no use left, as far as is known here."""
        token = caller.credential
        if token is None or token.max_uses is None:
            return False
        return self._uses.get(token.id, 0) >= token.max_uses

    def count_use(self, token_id: str | None) -> None:
        """Note that the records have counted a use of a token."""
        if token_id is not None:
            with self._counting:
                self._uses[token_id] = self._uses.get(token_id, 0) + 1

    def listed(self, kind: CredentialKind) -> Sequence[Credential]:
        """Return every credential of a kind, revoked and expired ones too, the oldest first."""
        with self._loading:
            # Afresh: that a credential was used makes no new version.
            self._load()
        return [credential for credential in self._credentials.values() if credential.kind is kind]

    def make(self, request: TokenRequest | KeyRequest, caller: Caller) -> tuple[Credential, Secret]:
        """Make a credential."""
        now = datetime.now(UTC)
        credential, secret = request.make(caller.name, now)
        event = caller.event(now, _MADE[credential.kind], AuditOutcome.ACCEPTED, credential.id)
        self._store.keep_credential(credential, event)
        self.refresh()
        return credential, secret

    def revoke(self, kind: CredentialKind, credential_id: str, caller: Caller) -> Credential:
        """Revoke a credential; raise CredentialNotFoundError where there is none of that kind."""
        # The command line may have made it a moment ago.
        self.refresh()
        known = self._credentials.get(credential_id)
        if known is None or known.kind is not kind:
            raise CredentialNotFoundError(f"{kind.value} {credential_id}")
        event = caller.event(datetime.now(UTC), _REVOKED[kind], AuditOutcome.ACCEPTED, credential_id)
        revoked = self._store.revoke_credential(credential_id, event)
        if revoked is None:
            raise CredentialNotFoundError(f"{kind.value} {credential_id}")
        self.refresh()
        return revoked

    def find_answer(self, scope: str, key: IdempotencyKey) -> Future[bytes] | None:
        """Return what was answered to this key before, if it was; raise IdempotencyKeyError."""
        kept = self._store.find_answer(scope, key.key_hash)
        if kept is None or datetime.now(UTC) - kept.created_at > ANSWERS_KEPT:
            return None
        key.require_same(kept.body_hash)
        answer: Future[bytes] = Future()
        answer.set_result(kept.body)
        return answer

    def audit_page(self, query: AuditQuery) -> list[AuditRecord]:
        """Return rows of the audit log, the newest first, what was just noted among them."""
        self.clerk.write()
        return self._store.audit_page(query)

    async def _credential(self, authorization: str, source: str | None) -> Credential:
        secret = _secret(authorization)
        if secret is None:
            raise await self.count_failure(UnauthenticatedError("malformed"), source)
        if self._local is not None and secret.id == self._local.id and self._local.matches(secret):
            return self._local
        credential = self._credentials.get(secret.id)
        if credential is None:
            # It may have been made by the command line a moment ago.
            await self._look.wait()
            credential = self._credentials.get(secret.id)
        if credential is None:
            raise await self.count_failure(UnauthenticatedError("unknown"), source)
        if not credential.matches(secret):
            raise await self.count_failure(UnauthenticatedError("secret", credential.id), source)
        return credential

    async def count_failure(
        self, error: UnauthenticatedError, source: str | None
    ) -> UnauthenticatedError | RateLimitedError:
        """Count a failed try; return what to raise: RateLimitedError for a source over its limit of them."""
        seconds = await self._limiter.hit(LimitKind.FAILED_AUTHENTICATION, source or "unix")
        return error if seconds is None else RateLimitedError(seconds, error.credential_id)

    async def _limit(self, kind: LimitKind, who: str) -> None:
        seconds = await self._limiter.hit(kind, who)
        if seconds is not None:
            raise RateLimitedError(seconds)


def _secret(authorization: str) -> Secret | None:
    """Read RFC 6750's header, or return None."""
    scheme, _, text = authorization.partition(" ")
    try:
        return Secret.parse(text.strip()) if scheme.lower() == _SCHEME else None
    except ValueError:
        return None
