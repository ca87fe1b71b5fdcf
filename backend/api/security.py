"""Authenticates and authorizes callers. An endpoint declares its permission in its signature.

Without a permission the app can't be made.

A route authenticates its caller before it reads the body, authorizes them when the body is there, and logs
each request that it refuses.
"""

from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Annotated, Any, Final, TypeVar

from fastapi import Depends, Request, Response
from fastapi.openapi.models import HTTPBearer
from fastapi.security.base import SecurityBase
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute

from backend.api.audit import log_refusal
from backend.api.dependencies import service_for
from backend.api.errors import problem
from backend.api.routes import DomainErrorRoute
from backend.errors import (
    AccessError,
    ForbiddenError,
    OutcomeUnknownError,
    RateLimitedError,
    RecordsUnavailableError,
    UnauthenticatedError,
)
from backend.models.access.callers import Caller, CallerKind
from backend.models.access.credentials import Permission
from backend.models.access.sources import TrustedProxies
from backend.models.wireguard.peer import Peer
from backend.services.access.access_control import AccessControl
from backend.services.wireguard_provisioning_service import WireGuardProvisioningService

_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])
_IsRepeat = Callable[[Mapping[str, object], Peer], bool]

# What any of these routes may answer before it does anything.
REFUSALS: Final[dict[int | str, dict[str, Any]]] = {
    401: problem("No valid credential.", str(UnauthenticatedError("missing"))),
    403: problem("The credential is not for that.", str(ForbiddenError("operate"))),
    429: problem("Too often; ask again after Retry-After seconds.", str(RateLimitedError(7))),
}


class Requires(SecurityBase):
    """The dependency that authorizes an endpoint's caller for a permission, and gives it the caller.

    For routes of the class SecuredRoute, which has authenticated them. OpenAPI names RFC 6750's header for
    its endpoints, so that viewers show an Authorize button.
    """

    scheme_name = "Bearer"
    model = HTTPBearer(
        bearerFormat="ocw_<id>_<secret>", description="An operator's key, or a node's enrolment token."
    )

    def __init__(self, permission: Permission) -> None:
        self.permission: Final = permission

    async def __call__(self, request: Request) -> Caller:
        """Return the caller; raise ForbiddenError or UnauthenticatedError."""
        caller: Caller = request.state.caller
        request.state.access.authenticator.authorize(caller, self.permission)
        return caller


# The types for an endpoint's argument. Provisioner also accepts a node's token, the others operators' keys.
Provisioner = Annotated[Caller, Depends(Requires(Permission.PROVISION))]
Reader = Annotated[Caller, Depends(Requires(Permission.READ))]
Operator = Annotated[Caller, Depends(Requires(Permission.OPERATE))]
Admin = Annotated[Caller, Depends(Requires(Permission.ADMINISTER))]


async def _access(request: Request) -> AccessControl:
    access: AccessControl = request.state.access
    return access


# The service's access control, for the endpoints that work with credentials or the audit log.
Access = Annotated[AccessControl, Depends(_access)]


def repeatable(is_repeat: _IsRepeat = lambda _sent, _peer: True) -> Callable[[_Endpoint], _Endpoint]:
    """Allow a used-up token to call an endpoint with a body that repeats the one of a peer that it let in.

    `is_repeat` is given the body, as it is before validation, and the peer that has its WireGuard key; by
    default the key is enough.
    """

    def mark(endpoint: _Endpoint) -> _Endpoint:
        endpoint.is_repeat = is_repeat  # type: ignore[attr-defined] # any function may have one
        return endpoint

    return mark


class SecuredRoute(DomainErrorRoute):
    """A route for authenticated callers.

    Its endpoint has an argument of one of the types Provisioner, Reader, Operator and Admin: without one
    every valid credential could call it, a node's token too.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Make the handler; raise TypeError for an endpoint without a permission."""
        declared = any(isinstance(one.call, Requires) for one in self.dependant.dependencies)
        if not declared and not isinstance(self, OpenRoute):
            raise TypeError(f"{self.path}: no argument of the endpoint says who may call it")
        return super().get_route_handler()

    async def authenticate(self, request: Request) -> None:
        """Authenticate the caller; raise an AccessError or RecordsUnavailableError."""
        service = await service_for(request)
        access = request.state.access = service.access
        shown = request.headers.getlist("authorization")
        caller = request.state.caller = await access.authenticator.authenticate(
            # Two headers are joined, so that they can't be read and are refused.
            ",".join(shown) if shown else None,
            _source(request, access.proxies),
            request.state.request_id,
        )
        if caller.may_only_repeat:
            await _require_repeat(request, self.endpoint, caller, service)

    async def refuse(self, request: Request, error: Exception) -> Exception:
        """Log the refused request, as the endpoint's act or as a failed authentication.

        Counts a failed attempt where a credential was refused after it had been authenticated, and returns
        RateLimitedError for a source over its limit.
        """
        access: AccessControl | None = getattr(request.state, "access", None)
        # If the change did happen, the transaction that made it has logged it.
        if access is None or isinstance(error, OutcomeUnknownError):
            return error
        state = request.state
        known: Caller | None = getattr(state, "caller", None)
        caller = known or Caller(CallerKind.UNAUTHENTICATED, None, state.source, state.request_id)
        subject = getattr(state, "subject", None) or request.path_params.get("node_id")
        log_refusal(access, caller, getattr(self.endpoint, "audit_action", None), subject, error)
        if known is None or not isinstance(error, UnauthenticatedError):
            return error
        if known.may_only_repeat:
            # It was counted against the limit before its body was read.
            access.authenticator.note_failure(error)
            return error
        counted = await access.authenticator.count_failure(error, caller.source)
        if isinstance(counted, RateLimitedError):
            access.limited.count(caller.source)
        return counted


class OpenRoute(SecuredRoute):
    """A route for every caller, limited by source. It may tell more to callers with a credential.

    A credential that isn't valid is counted and logged as elsewhere, and ignored.
    """

    async def authenticate(self, request: Request) -> None:
        """Count the request against its source; authenticate the caller if there is a credential."""
        access = request.state.access = (await service_for(request)).access
        if access.authenticator.required and "authorization" not in request.headers:
            await access.authenticator.limit_source(_source(request, access.proxies))
            return
        try:
            await super().authenticate(request)
        except RateLimitedError:
            raise
        except (AccessError, RecordsUnavailableError) as error:
            # An open endpoint such as /healthz has to answer while the database is away.
            await self.refuse(request, error)


def is_authenticated(request: Request) -> bool:
    """Say whether the caller of an OpenRoute has a valid credential."""
    caller: Caller | None = getattr(request.state, "caller", None)
    return caller is not None and not caller.may_only_repeat


def require_declared(routes: Iterable[BaseRoute]) -> None:
    """Raise TypeError where one of an app's routes is neither a SecuredRoute nor declared as an OpenRoute."""
    for route in routes:
        # FastAPI keeps an included router as one entry of `routes`.
        included = getattr(route, "original_router", None)
        if included is not None:
            require_declared(included.routes)
        elif not isinstance(route, SecuredRoute):
            raise TypeError(f"{route}: its route_class doesn't say who may call it; use SecuredRoute")


def _source(request: Request, proxies: TrustedProxies) -> str | None:
    """Return the caller's address, None for a UNIX socket's, and keep it in `request.state`."""
    client = request.scope.get("client")
    peer = None if client is None else client[0]
    source: str | None = proxies.source(peer, request.scope["headers"])
    request.state.source = source
    return source


async def _require_repeat(
    request: Request, endpoint: Callable[..., Any], caller: Caller, service: WireGuardProvisioningService
) -> None:
    """Raise UnauthenticatedError unless the body repeats the request of a peer that the token let in.

    Other faults of the request aren't reported, because that would show that the token was valid once.
    """
    is_repeat: _IsRepeat | None = getattr(endpoint, "is_repeat", None)
    if is_repeat is not None:
        sent = await _body(request)
        key = sent.get("wireguard_public_key")
        peer = service.find_by_key(key) if isinstance(key, str) else None
        if peer is not None and peer.token_id == caller.token_id and is_repeat(sent, peer):
            return
    raise UnauthenticatedError("used_up", caller.token_id)


async def _body(request: Request) -> Mapping[str, object]:
    try:
        sent = await request.json()
    except (HTTPException, ClientDisconnect):
        # Too long, no JSON, or cut off.
        return {}
    return sent if isinstance(sent, dict) else {}
