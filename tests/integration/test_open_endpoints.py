"""The endpoints that need no credential: health, the schema and its page."""

import asyncio
import re
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from backend.api import documentation
from backend.api.security import OpenRoute
from backend.models.wireguard.keys import WireGuardPrivateKey
from tests.harness.patience import eventually
from tests.harness.requests import AUDIT, PEERS, PROVISION, bearer
from tests.harness.service import ServiceProcess, StartService

OPEN = ("/healthz", "/readyz", "/openapi.json", "/docs", "/docs/swagger-ui-bundle.js")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """Return a hub that is a file only, and has an admin's key."""
    directory = tmp_path_factory.mktemp("hub")
    with ServiceProcess(directory, file_only(directory)) as service:
        become_admin(service)
        yield service


def file_only(directory: Path) -> dict[str, object]:
    path = directory / "wg0.conf"
    path.write_text(f"[Interface]\nPrivateKey = {WireGuardPrivateKey.generate().reveal()}\n")
    return {"WIREGUARD_CONFIG_PATH": path, "WIREGUARD_RELOAD": "off", "STATE_DIRECTORY": directory / "state"}


def become_admin(service: ServiceProcess) -> None:
    service.become_admin()
    # When this is answered, the service has the key.
    service.client.get(PEERS).raise_for_status()


@pytest.fixture
def outsider(service: ServiceProcess) -> Iterator[httpx.Client]:
    """Return a client without a credential."""
    with httpx.Client(base_url=service.url, trust_env=False, timeout=30) as client:
        yield client


class References(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inline = ""
        self._in_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in {"src", "href"} and value]
        self._in_script = tag in {"script", "style"}

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.inline += data.strip()


def test_docs_load_nothing_from_another_host(outsider: httpx.Client) -> None:
    page = outsider.get("/docs")
    assert page.status_code == 200
    references = References()
    references.feed(page.text)
    assert references.inline == ""
    assert len(references.found) == 3
    for reference in references.found:
        assert re.fullmatch(r"docs/[a-z.-]+", reference)
        asset = outsider.get(f"/{reference}")
        assert (asset.status_code, asset.headers["X-Content-Type-Options"]) == (200, "nosniff")
    assert "SwaggerUIBundle" in outsider.get("/docs/swagger-ui-bundle.js").text
    policy = page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; ")
    assert "http" not in policy
    assert outsider.get("/redoc").status_code == 404


def test_docs_are_off_where_the_package_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documentation, "find_spec", lambda _: None)
    routes = documentation.documentation(FastAPI()).routes
    assert [getattr(route, "path", "") for route in routes] == ["/openapi.json"]


def test_clients_that_read_none_of_the_script_share_one_copy_of_it() -> None:
    """In pieces, each of them took 400 KB."""
    route = next(
        route
        for route in documentation.documentation(FastAPI()).routes
        if isinstance(route, APIRoute) and route.path == "/docs/swagger-ui-bundle.js"
    )
    first, second = asyncio.run(route.endpoint()), asyncio.run(route.endpoint())
    assert len(first.body) > 1_000_000
    assert first.body is second.body


def test_redirect_never_follows_the_host_header(outsider: httpx.Client) -> None:
    for path in ("/healthz/", "/docs/", f"{PEERS}/"):
        answer = outsider.get(path, headers={"Host": "evil.example"})
        assert (answer.status_code, answer.headers.get("Location")) == (404, None)


def test_open_endpoints_are_limited_by_source(start_service: StartService, tmp_path: Path) -> None:
    limit = {"WIREGUARD_RATE_LIMIT_SOURCE": "3/minute"}
    service = start_service(file_only(tmp_path) | limit, ready="/healthz")
    become_admin(service)
    for number, path in enumerate(OPEN):
        transport = httpx.HTTPTransport(local_address=f"127.0.0.{number + 2}")
        with httpx.Client(base_url=service.url, transport=transport, timeout=30) as client:
            assert [client.get(path).status_code for _ in range(4)] == [200, 200, 200, 429], path
    service.terminate()
    counted = re.findall(r"requests_limited requests=(\d+)", service.log)
    assert sum(map(int, counted)) == len(OPEN)


def test_schema_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    app = FastAPI(openapi_url=None)
    rendered = []

    def openapi() -> dict[str, object]:
        rendered.append(app)
        return {"openapi": "3.1.0"}

    async def authenticate(*_: object) -> None:
        pass

    monkeypatch.setattr(app, "openapi", openapi)
    monkeypatch.setattr(OpenRoute, "authenticate", authenticate)
    app.include_router(documentation.documentation(app))

    async def schemas(root_path: str) -> list[object]:
        transport = httpx.ASGITransport(app, root_path=root_path)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [(await client.get(f"{root_path}/openapi.json")).json() for _ in range(3)]

    assert asyncio.run(schemas("")) == [{"openapi": "3.1.0"}] * 3
    assert asyncio.run(schemas("/hub")) == [{"openapi": "3.1.0", "servers": [{"url": "/hub"}]}] * 3
    assert len(rendered) == 2


def is_told(client: httpx.Client, headers: dict[str, str], reasons: object) -> bool:
    answer: object = client.get("/readyz", headers=headers).json()
    return answer == reasons


def test_reasons_are_for_callers_with_a_credential(service: ServiceProcess, outsider: httpx.Client) -> None:
    assert outsider.get("/readyz").json() == {"status": "ready"}
    assert service.client.get("/readyz").json() == {"status": "ready", "reload": "off", "notices": []}
    config = Path(service.settings["WIREGUARD_CONFIG_PATH"])
    key = bearer(service.credential("key", "create", "--role", "read"))
    token = bearer(service.credential("token", "create"))
    config.rename(config.with_suffix(".away"))
    told, other = service.client.get("/readyz"), outsider.get("/readyz")
    assert (told.status_code, other.status_code) == (503, 503)
    assert str(config) in told.json()["detail"]
    assert other.json() == {"detail": "not ready"}
    assert other.headers["Retry-After"]
    for shown in (key, token):
        eventually(partial(is_told, outsider, shown, told.json()))
    forged = outsider.get("/readyz", headers=bearer(f"ocw_{'0' * 16}_{'0' * 43}"))
    assert forged.json() == {"detail": "not ready"}
    config.with_suffix(".away").rename(config)
    tries = service.client.get(AUDIT).json()["entries"]
    assert ("authenticate", "refused", "malformed") in {
        (row["action"], row["outcome"], row["reason"]) for row in tries
    }


def test_schema_declares_the_credential_and_the_proofs(outsider: httpx.Client) -> None:
    schema = outsider.get("/openapi.json").json()
    assert schema["components"]["securitySchemes"]["Bearer"]["scheme"] == "bearer"
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            assert operation.get("security") == (
                [{"Bearer": []}] if "/api/" in path or path == "/metrics" else None
            ), path
    parameters = schema["paths"][PROVISION]["post"]["parameters"]
    assert {parameter["name"] for parameter in parameters} == {
        "Idempotency-Key",
        "X-Node-Timestamp",
        "X-Node-Nonce",
        "X-Node-Signature",
        "X-WireGuard-Challenge",
        "X-WireGuard-Proof",
    }
