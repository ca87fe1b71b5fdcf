"""Who may call a route, and that every route says so."""

import asyncio
from types import SimpleNamespace

import httpx
import pytest
from fastapi import APIRouter, FastAPI

from backend.api.dependencies import provisioning_service
from backend.api.health import router as health
from backend.api.security import DoorRoute, Reader
from backend.models.access.credentials import Secret
from tests.harness.access import Access
from tests.harness.fakes import FakeAccessStore


def test_endpoint_that_does_not_say_who_may_call_it_is_refused() -> None:
    """Every valid credential could call it, a node's token too."""
    router = APIRouter(prefix="/wireguard", route_class=DoorRoute)

    with pytest.raises(TypeError, match="/wireguard/secrets: no argument of the endpoint says"):

        @router.get("/secrets")
        async def read_secrets() -> str:
            return ""

    @router.get("/peers")
    async def read_peers(_: Reader) -> str:
        return ""

    assert [getattr(route, "path", None) for route in router.routes] == ["/wireguard/peers"]


def test_a_probe_with_a_credential_that_cannot_be_looked_up_is_answered() -> None:
    """An orchestrator would kill a service that lives, because its database is away."""
    store = FakeAccessStore()
    access = Access(store).control
    store.away = True
    app = FastAPI()
    app.include_router(health)
    app.dependency_overrides[provisioning_service] = lambda: SimpleNamespace(access=access)

    async def probe() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://hub") as client:
            return await client.get(
                "/healthz", headers={"Authorization": f"Bearer {Secret.generate().reveal()}"}
            )

    assert asyncio.run(probe()).status_code == 200
