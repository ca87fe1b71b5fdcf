"""Whether the process lives, and whether a node would be let in now."""

import asyncio
from typing import Final, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from backend.api.dependencies import Service
from backend.api.errors import DomainErrorRoute

# A probe's own patience is longer.
_PATIENCE_SECONDS: Final = 4.0

router = APIRouter(tags=["health"], route_class=DomainErrorRoute)


class Alive(BaseModel):
    """The process lives."""

    status: Literal["alive"] = Field(default="alive", examples=["alive"])


class Ready(BaseModel):
    """A provision would succeed."""

    status: Literal["ready"] = Field(default="ready", examples=["ready"])
    reload: Literal["syncconf", "off"] = Field(
        examples=["syncconf"],
        description="off: only the file is kept, no interface is told (WIREGUARD_RELOAD=off)",
    )
    notices: list[str] = Field(
        default=[],
        examples=[[]],
        description="What an operator should know though it works, until they have acknowledged it.",
    )


class NotReady(BaseModel):
    """Why a provision would not succeed."""

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
    responses={503: {"model": NotReady, "description": "It would not; the detail says why."}},
)
async def readyz(service: Service) -> Ready:
    """Look at records, file, interface and pool. Answers in time, whatever hangs in there."""
    look = asyncio.wrap_future(service.readiness.ask())
    try:
        # Shielded: others may wait for the same look.
        await asyncio.wait_for(asyncio.shield(look), _PATIENCE_SECONDS)
    except TimeoutError:
        raise service.readiness.hangs() from None
    return Ready(reload="syncconf" if service.live else "off", notices=list(service.notices))
