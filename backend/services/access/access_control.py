"""The parts of access control that the routes use, as the service carries them."""

from dataclasses import dataclass, field

from backend.models.access.sources import TrustedProxies
from backend.services.access.audit_writer import AuditWriter
from backend.services.access.authenticator import Authenticator
from backend.services.access.challenges import ProofVerifier
from backend.services.access.credential_service import CredentialService
from backend.services.access.limited_requests import LimitedRequests


@dataclass(frozen=True, slots=True)
class AccessControl:
    """Authentication, authorization, proofs, credentials and audit log, as the endpoints use them.

    Part of the service: an app may put a service of its own into `app.state`, and the routes then use the
    credentials of that one.
    """

    authenticator: Authenticator
    credentials: CredentialService
    audit: AuditWriter
    limited: LimitedRequests = field(default_factory=LimitedRequests)
    # Where each node has to prove its identity and its WireGuard key.
    proofs: ProofVerifier | None = None
    proxies: TrustedProxies = field(default_factory=TrustedProxies)

    @property
    def notices(self) -> tuple[str, ...]:
        """What an operator should know."""
        if self.authenticator.required:
            return ()
        return ("WIREGUARD_AUTH=off: every caller may provision, read and delete peers",)
