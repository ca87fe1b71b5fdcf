"""The one thing that a used-up token is good for: to repeat the request of a peer that it let in."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from backend.errors import UnauthenticatedError
from backend.models.access.callers import Caller
from backend.models.wireguard.peer import Peer
from backend.services.wireguard_provisioning_service import WireGuardProvisioningService

_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])
_IsRepeat = Callable[[Mapping[str, object], Peer], bool]


def repeatable(is_repeat: _IsRepeat) -> Callable[[_Endpoint], _Endpoint]:
    """Allow a used-up token to call an endpoint with a body that repeats the one of a peer that it let in.

    `is_repeat` is given the body, as it is before validation, and the peer that has its WireGuard key.
    """

    def mark(endpoint: _Endpoint) -> _Endpoint:
        endpoint.is_repeat = is_repeat  # type: ignore[attr-defined] # any function may have one
        return endpoint

    return mark


async def require_repeat(
    request: Request, endpoint: Callable[..., Any], caller: Caller, service: WireGuardProvisioningService
) -> None:
    """Raise UnauthenticatedError unless the body repeats the request of a peer that the token let in.

    Anything else that is wrong with the request isn't said: that would tell that the token was good once.
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
