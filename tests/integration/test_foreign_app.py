"""The router in an app that is not ours."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fastapi import FastAPI, Request

from backend.api.dependencies import provisioning_service
from backend.api.embedding import provide_service
from backend.api.v1.endpoints.wireguard_provisioning import router
from backend.client import Client, Node
from backend.composition import running_service
from backend.main import create_app
from backend.models.wireguard.keys import WireGuardPrivateKey
from backend.settings import load_settings
from tests.harness.patience import eventually
from tests.harness.requests import PEERS, PROVISION, provision_body
from tests.harness.service import free_port

ROOT = Path(__file__).parents[2]


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set up a hub that is a file only; return the file."""
    path = tmp_path / "wg9.conf"
    path.touch(mode=0o600)
    path.write_text(f"[Interface]\nPrivateKey = {WireGuardPrivateKey.generate().reveal()}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WIREGUARD_CONFIG_PATH", str(path))
    monkeypatch.setenv("WIREGUARD_RELOAD", "off")
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    monkeypatch.setenv("WIREGUARD_AUTH", "off")
    monkeypatch.setenv("ENABLE_DBOS", "false")
    return path


def app_with_the_router() -> FastAPI:
    app = FastAPI()
    app.include_router(router, prefix="/api/v1")
    return app


def started(app: FastAPI, act: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    """Start the app, act on it, and stop it."""

    async def main() -> None:
        async with app.router.lifespan_context(app):
            await act(client_of(app))

    asyncio.run(main())


def client_of(app: FastAPI) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1")


def test_the_router_alone_is_enough(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENABLE_DBOS")
    app = app_with_the_router()
    body = provision_body("node-1")

    async def act(client: httpx.AsyncClient) -> None:
        assert (await client.post(PROVISION, json=body)).status_code == 200
        assert (await client.post(PROVISION, json=body)).status_code == 409
        assert (await client.post(PROVISION, json={})).status_code == 422
        assert (await client.post(PROVISION, content=b" " * 70_000)).status_code == 413
        assert (await client.get(f"{PEERS}/nobody")).status_code == 404

    started(app, act)
    assert body["wireguard_public_key"] in environment.read_text()
    # Twice, as a test suite does: nothing of the first time is left in the process.
    started(app, act_again)


async def act_again(client: httpx.AsyncClient) -> None:
    assert list((await client.get(PEERS)).json()) == ["node-1"]


def test_an_app_may_bring_its_own_settings(environment: Path) -> None:
    settings = load_settings().model_copy(update={"wireguard_hub_endpoint": "elsewhere:1"})
    app = FastAPI(lifespan=lambda app: provide_service(app, settings))
    app.include_router(router, prefix="/api/v1")

    async def act(client: httpx.AsyncClient) -> None:
        answer = await client.post(PROVISION, json=provision_body("node-1"))
        assert answer.json()["config"]["hub_endpoint"] == "elsewhere:1"

    started(app, act)


def test_an_app_whose_lifespan_has_ended_starts_nothing_anew(environment: Path) -> None:
    app = app_with_the_router()

    async def main() -> None:
        async with app.router.lifespan_context(app):
            assert (await client_of(app).get(PEERS)).status_code == 200
        assert (await client_of(app).get(PEERS)).status_code == 503

    asyncio.run(main())


def test_a_mounted_app_gets_its_service_at_its_first_request(environment: Path) -> None:
    mounted, outer = app_with_the_router(), FastAPI()
    outer.mount("/hub", mounted)
    bodies = [provision_body(f"node-{number}") for number in range(3)]

    async def act(client: httpx.AsyncClient) -> None:
        answers = await asyncio.gather(*(client.post(f"/hub{PROVISION}", json=body) for body in bodies))
        assert [answer.status_code for answer in answers] == [200] * 3

    started(outer, act)
    assert not hasattr(mounted.state, "provisioning_service")

    # The service has stopped with its event loop, and left what it holds for another one.
    async def act_once_more(client: httpx.AsyncClient) -> None:
        assert set((await client.get(f"/hub{PEERS}")).json()) == {"node-0", "node-1", "node-2"}

    started(outer, act_once_more)


def test_an_app_may_run_the_lifespan_of_the_app_that_is_mounted_in_it(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a SIGTERM to uvicorn, which ends before the event loop does, would be a crash for the service."""
    monkeypatch.delenv("WIREGUARD_AUTH")
    mounted = app_with_the_router()
    header = environment.parent / "state" / "admin.header"

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with mounted.router.lifespan_context(mounted):
            yield

    outer = FastAPI(lifespan=lifespan)
    outer.mount("/hub", mounted)

    async def act(client: httpx.AsyncClient) -> None:
        name, _, value = header.read_text().strip().partition(": ")
        assert (await client.get(f"/hub{PEERS}", headers={name: value})).status_code == 200

    started(outer, act)
    assert not header.exists()


def test_a_mounted_app_shares_the_service_of_the_app_around_it(environment: Path) -> None:
    outer = app_with_the_router()
    outer.mount("/hub", app_with_the_router())

    async def act(client: httpx.AsyncClient) -> None:
        assert (await client.post(PROVISION, json=provision_body("node-1"))).status_code == 200
        assert list((await client.get(f"/hub{PEERS}")).json()) == ["node-1"]

    started(outer, act)


def test_our_own_app_may_be_mounted(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(wireguard_hub_endpoint="elsewhere:1")
    outer = FastAPI()
    outer.mount("/hub", create_app(settings))

    async def act(client: httpx.AsyncClient) -> None:
        answer = await client.post(f"/hub{PROVISION}", json=provision_body("node-1"))
        assert answer.json()["config"]["hub_endpoint"] == "elsewhere:1"

    started(outer, act)


def test_requests_outside_of_any_lifespan_are_answered(environment: Path) -> None:
    """Each has its own event loop, as with a TestClient that no `with` block has entered."""
    app = app_with_the_router()
    answer = asyncio.run(client_of(app).post(PROVISION, json=provision_body("node-1")))
    assert answer.status_code == 200
    assert list(asyncio.run(client_of(app).get(PEERS)).json()) == ["node-1"]


@pytest.mark.parametrize("kind", ["function", "coroutine", "generator", "asks for the request"])
def test_overriding_the_dependency_gives_the_router_another_service(
    environment: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = app_with_the_router()
    with running_service(load_settings()) as service:

        async def coroutine() -> object:
            return service

        def generator() -> Iterator[object]:
            yield service

        def asking(request: Request) -> object:
            assert request.url.path.startswith("/api")
            return service

        overrides: dict[str, Callable[..., Any]] = {
            "function": lambda: service,
            "coroutine": coroutine,
            "generator": generator,
            "asks for the request": asking,
        }
        app.dependency_overrides[provisioning_service] = overrides[kind]

        async def act(client: httpx.AsyncClient) -> None:
            assert (await client.post(PROVISION, json=provision_body("node-1"))).status_code == 200
            assert list((await client.get(PEERS)).json()) == ["node-1"]
            await service.access.authenticator.close()

        started(app, act)
        assert list(service.list_provisioned_peers()) == ["node-1"]
    # No start was tried, by the lifespan or by a request: the hub has its service.
    assert not hasattr(app.state, "provisioning_service")
    assert "provisioning_service_not_started" not in caplog.text


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """Serve an app on a port of this host; yield its URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="on", log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        eventually(lambda: server.started)
        host, port = server.servers[0].sockets[0].getsockname()
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()


def test_a_hub_that_asks_for_proofs_lets_nodes_in_through_the_router_alone(
    environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WIREGUARD_REQUIRE_PROOF", "true")
    node = Node("node-1", Ed25519PrivateKey.generate(), WireGuardPrivateKey.generate().reveal())
    with served(app_with_the_router()) as url:
        assert Client(url, require_proof=True).provision(node, version="1.0.0").node_id == "node-1"
        assert httpx.post(url + PROVISION, json=provision_body("node-2"), trust_env=False).status_code in {
            401,
            422,
        }
    assert node.wireguard_public_key in environment.read_text()


def test_a_service_that_cannot_start_says_so_once_and_the_app_goes_on(
    environment: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    text = environment.read_text()
    environment.write_text("nonsense\n")
    app = app_with_the_router()

    @app.get("/own")
    async def own() -> str:
        return "here"

    async def act(client: httpx.AsyncClient) -> None:
        for _ in range(3):
            refused = await client.get(PEERS)
            assert refused.status_code == 503
            assert refused.headers["Retry-After"] == "10"
            # Callers that nobody has authenticated learn nothing of the hub.
            assert str(environment) not in refused.text
        assert (await client.get("/own")).json() == "here"
        (event,) = [record for record in caplog.records if record.levelname == "CRITICAL"]
        assert "wg9.conf: line 1" in event.getMessage()
        assert event.exc_info is None
        await asyncio.to_thread(environment.write_text, text)
        monkeypatch.setattr(app.state.provisioning_start, "retry_at", 0.0)
        assert (await client.get(PEERS)).status_code == 200

    started(app, act)


def test_a_server_shows_one_line_for_a_service_that_cannot_start(environment: Path, tmp_path: Path) -> None:
    environment.unlink()
    (tmp_path / "foreign.py").write_text(
        "from fastapi import FastAPI\n"
        "from backend.api.v1.endpoints.wireguard_provisioning import router\n"
        "app = FastAPI()\n"
        "app.include_router(router, prefix='/api/v1')\n"
    )
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "foreign:app", "--port", str(port), "--app-dir", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        eventually(lambda: status_at(f"http://127.0.0.1:{port}{PEERS}") == 503)
    finally:
        server.terminate()
        _, log = server.communicate(timeout=30)
    lines = [line for line in log.splitlines() if not line.startswith("INFO:")]
    (said,) = [line for line in lines if "provisioning_service_not_started" in line]
    assert f"{environment}: the file doesn't exist" in said
    assert "Traceback" not in log


def status_at(url: str) -> int | None:
    with suppress(httpx.TransportError):
        return httpx.get(url, trust_env=False, timeout=10).status_code
    return None
