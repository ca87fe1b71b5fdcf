"""How a request comes to its caller: who it is, whether it may, and that a refusal is on record."""

from collections.abc import Callable, Coroutine
from typing import Annotated, Any, ClassVar, Final, TypeVar

from fastapi import Depends, Request, Response

from backend.api.audit import note_refusal
from backend.api.bearer import BearerScheme
from backend.api.dependencies import service_for
from backend.api.errors import DomainErrorRoute, problem
from backend.api.repeats import require_repeat
from backend.api.source import source_of
from backend.errors import (
    ForbiddenError,
    OutcomeUnknownError,
    ProvisioningError,
    RateLimitedError,
    UnauthenticatedError,
)
from backend.models.access.audit import AuditAction
from backend.models.access.callers import Caller, CallerKind
from backend.models.access.credentials import Permission
from backend.services.access.access_control import AccessControl
from backend.services.access.audit_writer import AuditWriter
from backend.services.access.credential_service import CredentialService

_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])

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
    """A route that asks who it is before it reads anything else, and notes whom it refused.

    Its endpoint has an argument of a type below (Provisioner, Reader, Operator, Admin): without one every
    valid credential could call it, a node's token too.
    """

    takes_a_caller: ClassVar[bool] = True

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Make the handler; raise TypeError for an endpoint that doesn't say who may call it."""
        if self.takes_a_caller and not any(isinstance(one.call, May) for one in self.dependant.dependencies):
            raise TypeError(f"{self.path}: no argument of the endpoint says who may call it")
        return super().get_route_handler()

    async def admit(self, request: Request) -> None:
        """Find out who asks, for whoever depends on it; raise an AccessError."""
        service = await service_for(request)
        access = request.state.access = service.access
        shown = request.headers.getlist("authorization")
        caller = request.state.caller = await access.authenticator.authenticate(
            # Two of them are as good as one that can't be read.
            ",".join(shown) if shown else None,
            source_of(request, access.proxies),
            request.state.request_id,
        )
        if caller.may_only_repeat:
            await require_repeat(request, self.endpoint, caller, service)

    def note_refusal(self, request: Request, error: Exception) -> None:
        """Have the refusal logged, as the endpoint's act or as a try to come in."""
        access: AccessControl | None = getattr(request.state, "access", None)
        # What may have happened after all was logged where it did.
        if access is None or isinstance(error, OutcomeUnknownError):
            return
        action: AuditAction | None = getattr(self.endpoint, "audit_action", None)
        subject = getattr(request.state, "subject", None) or request.path_params.get("node_id")
        caller: Caller | None = getattr(request.state, "caller", None)
        if caller is None:
            caller = Caller(CallerKind.NOBODY, None, request.state.source, request.state.request_id)
        note_refusal(access, caller, action, subject, error)

    async def count_refusal(self, request: Request, error: ProvisioningError) -> ProvisioningError:
        """Count a credential that turned out to be good for nothing later than at the door."""
        caller: Caller | None = getattr(request.state, "caller", None)
        if isinstance(error, UnauthenticatedError) and caller is not None and not caller.may_only_repeat:
            access: AccessControl = request.state.access
            counted = await access.authenticator.count_failure(error, request.state.source)
            if isinstance(counted, RateLimitedError):
                access.limited.count(request.state.source)
            return counted
        return error


class May(BearerScheme):
    """The dependency that gives an endpoint its caller, who has the permission.

    For routes of the class DoorRoute, which has found out who it is.
    """

    def __init__(self, permission: Permission) -> None:
        self._permission = permission

    async def __call__(self, request: Request) -> Caller:
        """Raise ForbiddenError where the caller hasn't."""
        caller: Caller = request.state.caller
        request.state.access.authenticator.authorize(caller, self._permission)
        return caller


# Whoever lets a node in: its own token, or an operator's key.
Provisioner = Annotated[Caller, Depends(May(Permission.PROVISION))]
Reader = Annotated[Caller, Depends(May(Permission.READ))]
Operator = Annotated[Caller, Depends(May(Permission.OPERATE))]
Admin = Annotated[Caller, Depends(May(Permission.ADMINISTER))]


async def _credentials(request: Request) -> CredentialService:
    access: AccessControl = request.state.access
    return access.credentials


async def _audit(request: Request) -> AuditWriter:
    access: AccessControl = request.state.access
    return access.audit


# The parts of the service's access control that an endpoint works with.
Credentials = Annotated[CredentialService, Depends(_credentials)]
Audit = Annotated[AuditWriter, Depends(_audit)]
