"""Health checks: whether the process lives, and whether a provision would succeed now."""

import asyncio
from typing import Final, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from backend.api.dependencies import Service
from backend.api.security import REFUSALS, OpenRoute, is_authenticated
from backend.errors import HubUpdateError, ProvisioningError

# Shorter than the timeout of most probes.
_PATIENCE_SECONDS: Final = 4.0
_NOT_READY: Final = "not ready"

router = APIRouter(tags=["health"], route_class=OpenRoute, responses={429: REFUSALS[429]})


class Alive(BaseModel):
    """The process lives."""

    status: Literal["alive"] = Field(default="alive", examples=["alive"])


class Ready(BaseModel):
    """A provision would succeed."""

    status: Literal["ready"] = Field(default="ready", examples=["ready"])
    reload: Literal["syncconf", "off"] | None = Field(
        default=None,
        examples=["syncconf"],
        description="off: only the file is kept, no interface is told (WIREGUARD_RELOAD=off). For callers "
        "with a credential.",
    )
    notices: list[str] | None = Field(
        default=None,
        examples=[[]],
        description="What an operator should know though it works, until they have acknowledged it. For "
        "callers with a credential.",
    )


class NotReady(BaseModel):
    """Why a provision would not succeed, for callers with a credential; `not ready` for others."""

    detail: str = Field(examples=["interface wg0 does not exist; bring it up"])


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz", summary="Is the process alive?")
async def healthz() -> Alive:
    """Answer as long as the process lives."""
    return Alive()


@router.head("/readyz", include_in_schema=False)
@router.get(
    "/readyz",
    summary="Would a provision succeed?",
    response_model_exclude_none=True,
    responses={503: {"model": NotReady, "description": "It would not; the detail says why."}},
)
async def readyz(request: Request, service: Service) -> Ready:
    """Check records, file, interface and pool. Answers in time, even if a check hangs."""
    told = is_authenticated(request)
    readiness = service.readiness
    look = asyncio.wrap_future(readiness.ask())
    try:
        # Shielded: other requests may wait for the same check.
        await asyncio.wait_for(asyncio.shield(look), _PATIENCE_SECONDS)
    except TimeoutError:
        raise (readiness.hangs() if told else HubUpdateError(_NOT_READY)) from None
    except ProvisioningError:
        if told:
            raise
        raise HubUpdateError(_NOT_READY) from None
    if not told:
        return Ready()
    return Ready(reload="syncconf" if readiness.live else "off", notices=list(readiness.notices()))
