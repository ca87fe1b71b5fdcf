"""The caller of a request."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

from backend.errors import UnauthenticatedError
from backend.models.access.audit import AuditAction, AuditEvent, AuditOutcome
from backend.models.access.credentials import Credential, Permission
from backend.models.access.identity import NodeIdentity
from backend.models.access.proof import Nonce


class CallerKind(StrEnum):
    """How a caller was authenticated."""

    # By the key in STATE_DIRECTORY/admin.header.
    LOCAL = "local"
    # Not at all, because no credential is required (WIREGUARD_AUTH=off).
    ANYONE = "anyone"
    # The kinds of credentials.
    TOKEN = "token"  # noqa: S105 - a kind
    KEY = "key"
    # The program that runs the service, or the command line beside it.
    SERVICE = "service"
    # Authentication failed. The value is the actor in rows of the audit log, which are never rewritten.
    UNAUTHENTICATED = "nobody"


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of a request, with the credential that it showed and the identity that it proved, if any."""

    kind: CallerKind
    credential: Credential | None = None
    # An IP address; None for a UNIX socket and for the service itself.
    source: str | None = None
    request_id: str | None = None
    identity: NodeIdentity | None = None
    # Its token had no use left when it was authenticated, which was counted as a failed attempt.
    may_only_repeat: bool = False
    # Of the signature that proved its identity.
    nonce: Nonce | None = None

    @property
    def name(self) -> str:
        """Its name in the audit log."""
        if self.credential is None or self.kind is CallerKind.LOCAL:
            return self.kind.value
        return f"{self.kind.value}:{self.credential.id}"

    @property
    def token_id(self) -> str | None:
        """The ID of the enrolment token that it showed."""
        return self.credential.id if self.credential is not None and self.kind is CallerKind.TOKEN else None

    @property
    def operates(self) -> bool:
        """Whether it may see every peer's configuration, as an operator of the hub."""
        return self.kind not in {CallerKind.TOKEN, CallerKind.UNAUTHENTICATED}

    def may(self, permission: Permission) -> bool:
        """Say whether it has the permission."""
        if self.credential is not None:
            return self.credential.may(permission)
        if self.kind is CallerKind.ANYONE:
            # A credential that is made meanwhile would be valid after authentication is required again.
            return permission is not Permission.ADMINISTER
        return self.kind is not CallerKind.UNAUTHENTICATED

    def require_node(self, node_id: str) -> None:
        """Raise UnauthenticatedError where the caller's token isn't for nodes of this name."""
        if self.credential is not None and not self.credential.is_for(node_id):
            raise UnauthenticatedError("node_id", self.credential.id)

    def event(
        self,
        at: datetime,
        action: AuditAction,
        outcome: AuditOutcome,
        subject: str | None = None,
        reason: str | None = None,
    ) -> AuditEvent:
        """Return the event that logs an act of this caller."""
        return AuditEvent(at, action, outcome, self.name, subject, self.source, self.request_id, reason)

    @classmethod
    def of(cls, credential: Credential, source: str | None, request_id: str) -> "Caller":
        """Return the caller that shows a credential."""
        return cls(CallerKind(credential.kind), credential, source, request_id)


SERVICE: Final = Caller(CallerKind.SERVICE)
