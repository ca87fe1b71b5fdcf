"""Who may call a route, and that every route says so."""

import asyncio
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any, Final

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute

from backend.api.dependencies import provisioning_service
from backend.api.health import router as health
from backend.api.security import OpenRoute, Reader, Requires, SecuredRoute, require_declared
from backend.main import create_app
from backend.models.access.credentials import Secret
from backend.settings import Settings
from tests.harness.access import Access
from tests.harness.fakes import FakeAccessStore

OPEN: Final = "open"
# A new endpoint, and a change of its permission, needs its line here.
PERMISSIONS: Final = {
    "GET /healthz": OPEN,
    "HEAD /healthz": OPEN,
    "GET /readyz": OPEN,
    "HEAD /readyz": OPEN,
    "GET /metrics": "read",
    "GET /openapi.json": OPEN,
    "GET /docs": OPEN,
    "GET /docs/start.js": OPEN,
    "GET /docs/swagger-ui.css": OPEN,
    "GET /docs/swagger-ui-bundle.js": OPEN,
    "POST /wireguard/challenge": "provision",
    "POST /wireguard/provision": "provision",
    "GET /wireguard/peers": "read",
    "GET /wireguard/peers/{node_id}": "read",
    "GET /wireguard/pool/stats": "read",
    "GET /wireguard/health": "read",
    "GET /wireguard/peers/{node_id}/health": "read",
    "GET /wireguard/audit": "read",
    "DELETE /wireguard/peers/{node_id}": "operate",
    "POST /wireguard/tokens": "administer",
    "GET /wireguard/tokens": "administer",
    "DELETE /wireguard/tokens/{credential_id}": "administer",
    "POST /wireguard/keys": "administer",
    "GET /wireguard/keys": "administer",
    "DELETE /wireguard/keys/{credential_id}": "administer",
}


@pytest.fixture
def store() -> FakeAccessStore:
    return FakeAccessStore()


@pytest.fixture
def app(store: FakeAccessStore) -> FastAPI:
    """Give the test the whole app, with access control over records in memory and no hub."""
    app = create_app(Settings(_env_file=None))
    access = Access(store).control
    app.dependency_overrides[provisioning_service] = lambda: SimpleNamespace(access=access)
    return app


def all_routes(routes: Iterable[BaseRoute]) -> Iterator[BaseRoute]:
    """Return every route, those of included routers too."""
    for route in routes:
        included = getattr(route, "original_router", None)
        if included is None:
            yield route
        else:
            yield from all_routes(included.routes)


def permission_of(route: BaseRoute) -> str:
    assert isinstance(route, SecuredRoute), f"{route} is neither secured nor declared as open"
    required = [one.call for one in route.dependant.dependencies if isinstance(one.call, Requires)]
    if isinstance(route, OpenRoute):
        assert required == []
        return OPEN
    (requires,) = required
    return str(requires.permission)


def test_every_route_of_the_app_has_the_permission_that_is_written_down_here(app: FastAPI) -> None:
    found = {
        f"{method} {route.path}": permission_of(route)
        for route in all_routes(app.routes)
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    }
    assert len(found) == len(list(all_routes(app.routes)))
    assert found == PERMISSIONS


@pytest.mark.parametrize(
    ("settings", "permission"),
    [({"wireguard_metrics_public": True}, OPEN), ({"wireguard_metrics": False}, None)],
)
def test_settings_open_the_metrics_or_take_them_away(
    settings: dict[str, Any], permission: str | None
) -> None:
    app = create_app(Settings(_env_file=None, **settings))
    found = [
        permission_of(route) for route in all_routes(app.routes) if getattr(route, "path", "") == "/metrics"
    ]
    assert found == ([] if permission is None else [permission])


@pytest.mark.parametrize("call", [call for call, permission in PERMISSIONS.items() if permission != OPEN])
def test_secured_route_refuses_callers_without_a_valid_credential(app: FastAPI, call: str) -> None:
    method, _, path = call.partition(" ")
    prefix = "/api/v1" if path.startswith("/wireguard/") else ""
    url = f"http://hub{prefix}" + path.replace("{", "").replace("}", "")

    async def answers() -> list[httpx.Response]:
        shown = [{}, *({"Authorization": f"Bearer {text}"} for text in ("x", Secret.generate().reveal()))]
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
            return [await client.request(method, url, headers=headers) for headers in shown]

    assert [answer.status_code for answer in asyncio.run(answers())] == [401] * 3


def test_endpoint_without_a_permission_is_refused_when_it_is_defined() -> None:
    """Every valid credential could call it, a node's token too."""
    router = APIRouter(prefix="/wireguard", route_class=SecuredRoute)

    with pytest.raises(TypeError, match="/wireguard/secrets: no argument of the endpoint says"):

        @router.get("/secrets")
        async def read_secrets() -> str:
            return ""

    @router.get("/peers")
    async def read_peers(_: Reader) -> str:
        return ""

    assert [getattr(route, "path", None) for route in router.routes] == ["/wireguard/peers"]


def test_route_of_another_class_is_refused_wherever_it_is_included() -> None:
    """A router whose route_class was forgotten would serve everybody."""
    forgotten, outer, app = APIRouter(), APIRouter(), FastAPI(openapi_url=None)

    @forgotten.get("/secrets")
    async def read_secrets() -> str:
        return ""

    outer.include_router(forgotten)
    require_declared(app.routes)
    app.include_router(outer)
    with pytest.raises(TypeError, match="secrets"):
        require_declared(app.routes)


def test_app_with_an_endpoint_without_a_permission_is_not_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forgotten = APIRouter()

    @forgotten.get("/secrets")
    async def read_secrets() -> str:
        return ""

    monkeypatch.setattr("backend.main.health_router", forgotten)
    with pytest.raises(TypeError, match="secrets"):
        create_app(Settings(_env_file=None))


def test_probe_is_answered_though_its_credential_cannot_be_looked_up(store: FakeAccessStore) -> None:
    """An orchestrator would kill a service that lives, because its database is away."""
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
