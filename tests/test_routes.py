"""Requests with a path or a method that no route has."""

import asyncio
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from backend.api.v1.endpoints.wireguard_provisioning import router
from backend.main import create_app
from backend.settings import Settings
from tests.harness.requests import PEERS, PROVISION, TOKENS

PEER = f"{PEERS}/node-1"


def ask(app: FastAPI, method: str, path: str, **request: Any) -> httpx.Response:
    async def main() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://hub") as client:
            return await client.request(method, path, **request)

    return asyncio.run(main())


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    """Make our app. It isn't started: nothing here comes as far as the service."""
    return create_app(Settings())


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/api/v1/wireguard/nowhere", 404), ("PUT", PEER, 405)],
)
def test_refusals_before_any_route_carry_the_request_id(
    app: FastAPI, method: str, path: str, status: int
) -> None:
    answer = ask(app, method, path, headers={"X-Request-ID": "mine-1"})
    assert answer.status_code == status
    assert answer.headers["X-Request-ID"] == "mine-1"
    assert answer.headers["Cache-Control"] == "no-store"
    assert list(answer.json()) == ["detail"]
    assert len(ask(app, method, path).headers["X-Request-ID"]) == 32


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", PEER, "GET, DELETE"),
        ("PATCH", TOKENS, "GET, POST"),
        ("GET", PROVISION, "POST"),
        ("POST", "/healthz", "GET, HEAD"),
        ("DELETE", "/readyz", "GET, HEAD"),
    ],
)
def test_allow_names_every_method_of_the_path(app: FastAPI, method: str, path: str, allowed: str) -> None:
    answer = ask(app, method, path)
    assert answer.status_code == 405
    assert answer.headers["Allow"] == allowed


def test_router_in_a_foreign_app_answers_wrong_methods_itself() -> None:
    foreign = FastAPI()
    foreign.include_router(router, prefix="/api/v1")
    outer = FastAPI()
    outer.mount("/hub", foreign)
    for app, prefix in ((foreign, ""), (outer, "/hub")):
        answer = ask(app, "PUT", prefix + PEER, headers={"X-Request-ID": "mine-1"})
        assert answer.status_code == 405
        assert answer.headers["Allow"] == "GET, DELETE"
        assert answer.headers["X-Request-ID"] == "mine-1"
