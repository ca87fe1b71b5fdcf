"""How a request comes to its caller: who it is, whether it may, and that a refusal is on record."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Final, TypeVar

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from backend.api.bearer import BearerScheme
from backend.api.dependencies import service_for
from backend.api.errors import DomainErrorRoute, problem
from backend.api.source import source_of
from backend.api.used_up import require_repeat
from backend.errors import (
    AccessError,
    AddressTakenError,
    DuplicatePeerError,
    ForbiddenError,
    HubUpdateError,
    IdempotencyKeyError,
    InvalidCredentialsError,
    IPPoolExhaustedError,
    OutcomeUnknownError,
    PeerNotFoundError,
    ProofError,
    ProvisioningError,
    RateLimitedError,
    RecordsUnavailableError,
    UnauthenticatedError,
)
from backend.models.access.audit import AuditAction, AuditOutcome
from backend.models.access.callers import Caller, CallerKind
from backend.models.access.credentials import Permission
from backend.models.access.secret_text import redacted
from backend.services.door import Door

_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])

# The word for the audit log; the nearest class in an error's line of descent counts.
_REASONS: Final[dict[type[ProvisioningError], str]] = {
    DuplicatePeerError: "duplicate",
    PeerNotFoundError: "not_found",
    InvalidCredentialsError: "invalid",
    IPPoolExhaustedError: "pool_exhausted",
    AddressTakenError: "address_taken",
    HubUpdateError: "hub",
    RecordsUnavailableError: "records",
    IdempotencyKeyError: "idempotency_key",
    ProvisioningError: "failed",
}


# What any of these routes may answer before it does anything.
REFUSALS: Final[dict[int | str, dict[str, Any]]] = {
    401: problem("No credential that lets anybody in.", str(UnauthenticatedError("missing"))),
    403: problem(
        "The credential is not for that.",
        str(ForbiddenError("operate")),
    ),
    429: problem("Too often; ask again after Retry-After seconds.", str(RateLimitedError(7))),
}


def audited(action: AuditAction) -> Callable[[_Endpoint], _Endpoint]:
    """Have the endpoint's refusals logged as this act; what it does is logged where it is done."""

    def mark(endpoint: _Endpoint) -> _Endpoint:
        endpoint.audit_action = action  # type: ignore[attr-defined] # any function may have one
        return endpoint

    return mark


class DoorRoute(DomainErrorRoute):
    """A route that asks who it is before it reads anything else, and notes whom it refused."""

    async def admit(self, request: Request) -> None:
        """Find out who asks, for whoever depends on it; raise an AccessError."""
        service = await service_for(request)
        door = request.state.door = service.door
        shown = request.headers.getlist("authorization")
        caller = request.state.caller = await door.admit(
            # Two of them are as good as one that can't be read.
            ",".join(shown) if shown else None,
            source_of(request),
            request.state.request_id,
        )
        if caller.used_up:
            await require_repeat(request, self.endpoint, caller, service)

    def note_refusal(self, request: Request, error: Exception) -> None:
        """Have the refusal logged, as the endpoint's act or as a try to come in."""
        door: Door | None = getattr(request.state, "door", None)
        # What may have happened after all was logged where it did.
        if door is None or isinstance(error, OutcomeUnknownError):
            return
        action: AuditAction | None = getattr(self.endpoint, "audit_action", None)
        subject = getattr(request.state, "subject", None) or request.path_params.get("node_id")
        caller: Caller | None = getattr(request.state, "caller", None)
        if caller is None:
            caller = Caller(CallerKind.NOBODY, None, source_of(request), request.state.request_id)
        if isinstance(error, AccessError) and (action is None or caller.kind is CallerKind.NOBODY):
            action = AuditAction.AUTHENTICATE
        if isinstance(error, UnauthenticatedError):
            action, subject = AuditAction.AUTHENTICATE, error.credential_id or subject
        if action is not None:
            subject = None if subject is None else redacted(subject)
            event = caller.event(datetime.now(UTC), action, AuditOutcome.REFUSED, subject, _reason(error))
            door.clerk.note(event)

    async def count_refusal(self, request: Request, error: ProvisioningError) -> ProvisioningError:
        """Count a credential that turned out to be good for nothing later than at the door."""
        caller: Caller | None = getattr(request.state, "caller", None)
        if isinstance(error, UnauthenticatedError) and caller is not None and not caller.used_up:
            door: Door = request.state.door
            return await door.count_failure(error, source_of(request))
        return error


def _reason(error: Exception) -> str:
    if isinstance(error, AccessError | ProofError):
        return error.reason
    if isinstance(error, ProvisioningError):
        return next(_REASONS[kind] for kind in type(error).__mro__ if kind in _REASONS)
    if isinstance(error, RequestValidationError):
        return "invalid"
    return f"status_{error.status_code}" if isinstance(error, HTTPException) else "failed"


class May(BearerScheme):
    """The dependency that gives an endpoint its caller, who has the permission.

    For routes of the class DoorRoute, which has found out who it is.
    """

    def __init__(self, permission: Permission) -> None:
        self._permission = permission

    async def __call__(self, request: Request) -> Caller:
        """Raise ForbiddenError where the caller hasn't."""
        caller: Caller = request.state.caller
        request.state.door.require(caller, self._permission)
        return caller


# Whoever lets a node in: its own token, or an operator's key.
Provisioner = Annotated[Caller, Depends(May(Permission.PROVISION))]
Reader = Annotated[Caller, Depends(May(Permission.READ))]
Operator = Annotated[Caller, Depends(May(Permission.OPERATE))]
Admin = Annotated[Caller, Depends(May(Permission.ADMINISTER))]
