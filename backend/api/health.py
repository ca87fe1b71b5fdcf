"""Whether the process lives, and whether a node would be let in now."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field

from backend.api.dependencies import Service
from backend.api.errors import DomainErrorRoute

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


class NotReady(BaseModel):
    """Why a provision would not succeed."""

    detail: str = Field(examples=["interface wg0 does not exist; bring it up"])


@router.get("/healthz", summary="Is the process alive?")
async def healthz() -> Alive:
    """Answer as long as the process lives."""
    return Alive()


@router.get(
    "/readyz",
    summary="Would a provision succeed?",
    responses={503: {"model": NotReady, "description": "It would not; the detail says why."}},
)
def readyz(service: Service) -> Ready:
    """Look at records, file, interface and pool. In a thread: the database and the file are asked."""
    service.check()
    return Ready(reload="syncconf" if service.live else "off")
