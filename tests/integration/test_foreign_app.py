"""The router in somebody else's app, with nothing of ours around it."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from backend.api import dependencies
from backend.api.v1.endpoints.wireguard_provisioning import router
from backend.errors import OutcomeUnknownError, StartRefusedError
from backend.main import provide_service
from backend.models.wireguard.keys import WireGuardPrivateKey
from backend.settings import load_settings
from tests.harness.requests import provision_body

PROVISION = "/api/v1/wireguard/provision"


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set up a hub that is a file only; return the file."""
    path = tmp_path / "wg9.conf"
    path.write_text(f"[Interface]\nPrivateKey = {WireGuardPrivateKey.generate().reveal()}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WIREGUARD_CONFIG_PATH", str(path))
    monkeypatch.setenv("WIREGUARD_RELOAD", "off")
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    monkeypatch.setenv("WIREGUARD_AUTH", "off")
    return path


def started(app: FastAPI, act: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    """Start the app, act on it, and stop it."""

    async def main() -> None:
        async with app.router.lifespan_context(app):
            await act(client_of(app))

    asyncio.run(main())


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1")


def test_the_router_alone_is_enough(environment: Path) -> None:
    app = FastAPI()
    app.include_router(router, prefix="/api/v1")
    body = provision_body("node-1")

    async def act(client: httpx.AsyncClient) -> None:
        assert (await client.post(PROVISION, json=body)).status_code == 200
        assert (await client.post(PROVISION, json=body)).status_code == 409
        assert (await client.post(PROVISION, json={})).status_code == 422
        assert (await client.post(PROVISION, content=b" " * 70_000)).status_code == 413
        assert (await client.get("/api/v1/wireguard/peers/nobody")).status_code == 404

    started(app, act)
    assert body["wireguard_public_key"] in environment.read_text()
    # Twice, as a test suite does: nothing of the first time is left in the process.
    started(app, act_again)


async def act_again(client: httpx.AsyncClient) -> None:
    assert list((await client.get("/api/v1/wireguard/peers")).json()) == ["node-1"]


def test_an_app_may_bring_its_own_settings(environment: Path) -> None:
    settings = load_settings().model_copy(update={"wireguard_hub_endpoint": "elsewhere:1"})
    app = FastAPI(lifespan=lambda app: provide_service(app, settings))
    app.include_router(router, prefix="/api/v1")

    async def act(client: httpx.AsyncClient) -> None:
        answer = await client.post(PROVISION, json=provision_body("node-1"))
        assert answer.json()["config"]["hub_endpoint"] == "elsewhere:1"

    started(app, act)


def test_an_app_that_was_not_started_says_so(environment: Path) -> None:
    app = FastAPI()
    app.include_router(router, prefix="/api/v1")
    answer = asyncio.run(client_of(app).get("/api/v1/wireguard/peers"))
    assert answer.status_code == 503
    assert "lifespan" in answer.json()["detail"]


def test_keys_that_do_not_agree_refuse_the_start(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WIREGUARD_HUB_PUBLIC_KEY", WireGuardPrivateKey.generate().public_key())
    app = FastAPI()
    app.include_router(router, prefix="/api/v1")
    with pytest.raises(StartRefusedError, match="WIREGUARD_HUB_PUBLIC_KEY"):
        started(app, act_again)


def test_a_request_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dependencies, "ANSWER_TIMEOUT_SECONDS", 0.01)
    never: Future[None] = Future()
    with pytest.raises(OutcomeUnknownError, match="ask again"):
        asyncio.run(dependencies.outcome(never, lambda: False))


def test_a_request_is_not_kept_waiting_where_the_records_leave_it_in_doubt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dependencies, "_CERTAIN_SECONDS", 0.01)
    monkeypatch.setattr(dependencies, "_LOOK_SECONDS", 0.01)
    never: Future[None] = Future()
    looks = iter([False, False, True])
    with pytest.raises(OutcomeUnknownError, match="the change may yet happen; ask again"):
        asyncio.run(dependencies.outcome(never, looks.__next__))
    decided: Future[int] = Future()
    decided.set_result(1)
    assert asyncio.run(dependencies.outcome(decided, lambda: True)) == 1
