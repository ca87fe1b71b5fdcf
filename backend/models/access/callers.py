"""Who it is that asks for something."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

from backend.errors import UnauthenticatedError
from backend.models.access.audit import AuditAction, AuditEvent, AuditOutcome
from backend.models.access.credentials import Credential, CredentialKind, Permission
from backend.models.access.identity import NodeIdentity
from backend.models.access.nonces import Nonce


class CallerKind(StrEnum):
    """How a caller came in."""

    # By the secret in STATE_DIRECTORY/admin.header.
    LOCAL = "local"
    # Where no credential is asked for (WIREGUARD_AUTH=off).
    ANYONE = "anyone"
    TOKEN = "token"  # noqa: S105 - a kind
    KEY = "key"
    # The code that runs the service, or the command line beside it.
    SERVICE = "service"
    NOBODY = "nobody"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks. A `credential` is there where one was shown, an `identity` where it was proved."""

    kind: CallerKind
    credential: Credential | None = None
    # An IP address; None for a UNIX socket and for the service itself.
    source: str | None = None
    request_id: str | None = None
    identity: NodeIdentity | None = None
    # Its token had no use left when it was authenticated, which was counted as a failed attempt.
    may_only_repeat: bool = False
    # What it signed the proof of its identity with.
    nonce: Nonce | None = None

    @property
    def name(self) -> str:
        """What the audit log calls it."""
        if self.credential is None or self.kind is CallerKind.LOCAL:
            return self.kind.value
        return f"{self.kind.value}:{self.credential.id}"

    @property
    def token_id(self) -> str | None:
        """The enrolment token that it shows."""
        return self.credential.id if self.credential is not None and self.kind is CallerKind.TOKEN else None

    @property
    def operates(self) -> bool:
        """Whether it may know every peer's configuration, as one who runs the hub."""
        return self.kind not in {CallerKind.TOKEN, CallerKind.NOBODY}

    def may(self, permission: Permission) -> bool:
        """Say whether it has the permission."""
        if self.credential is not None:
            return self.credential.may(permission)
        if self.kind is CallerKind.ANYONE:
            # No credential that is made meanwhile may outlive the switch.
            return permission is not Permission.ADMINISTER
        return self.kind is not CallerKind.NOBODY

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
        """Return what the audit log is told of an act of this caller."""
        return AuditEvent(at, action, outcome, self.name, subject, self.source, self.request_id, reason)

    @classmethod
    def of(cls, credential: Credential, source: str | None, request_id: str) -> "Caller":
        """Return the caller who shows a credential."""
        kind = CallerKind.TOKEN if credential.kind is CredentialKind.TOKEN else CallerKind.KEY
        return cls(kind, credential, source, request_id)


SERVICE: Final = Caller(CallerKind.SERVICE)
