"""Each request that the app sees is counted once, by its route's template."""

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError

from backend.adapters.metrics.prometheus import PrometheusMetrics
from backend.api.request_metrics import OUTCOMES
from backend.api.security import OpenRoute
from backend.api.v1.endpoints.wireguard_provisioning import router
from backend.errors import (
    AddressTakenError,
    ConfigFileError,
    ForbiddenError,
    KeyTakenError,
    NonceError,
    OutcomeUnknownError,
    OvertakenError,
    PausedError,
    PeerLimitError,
    PeerNotFoundError,
    RateLimitedError,
    UnauthenticatedError,
)
from backend.main import create_app
from backend.models.access.credentials import KeyRequest, Role, Secret, TokenRequest
from backend.settings import Settings
from tests.harness.access import CommandLine
from tests.harness.core import NEVER, World
from tests.harness.requests import PEERS, PROVISION, new_key, provision_body
from tests.harness.scrapes import Scrape

PEER = PEERS + "/{node_id}"


@pytest.fixture
def metrics() -> PrometheusMetrics:
    return PrometheusMetrics(hub="wg0")


@pytest.fixture
def world(tmp_path: Path, metrics: PrometheusMetrics) -> Iterator[World]:
    world = World(tmp_path, look_every=NEVER, metrics=metrics)
    world.start()
    yield world
    world.stop()
    world.records.database.close()


@pytest.fixture
def app(world: World) -> FastAPI:
    return create_app(Settings(_env_file=None), world.service)


def ask(app: FastAPI, *requests: tuple[str, str], **options: Any) -> list[httpx.Response]:
    async def main() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://hub") as client:
            return [await client.request(method, path, **options) for method, path in requests]

    return asyncio.run(main())


def shown(secret: Secret) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret.reveal()}"}


def counted(metrics: PrometheusMetrics) -> dict[tuple[str, str, str], float]:
    return {
        (dict(labels)["method"], dict(labels)["route"], dict(labels)["status"]): value
        for (name, labels), value in Scrape.of(metrics).series.items()
        if name == "wireguard_http_requests_total"
    }


def test_requests_are_counted_by_template_with_the_whole_prefix(
    app: FastAPI, world: World, metrics: PrometheusMetrics
) -> None:
    admin = shown(world.access.local)
    ask(app, ("GET", f"{PEERS}/a"), ("GET", f"{PEERS}/b"), ("GET", PEERS), ("GET", "/healthz"), headers=admin)
    assert counted(metrics) == {
        ("GET", PEER, "404"): 2,
        ("GET", PEERS, "200"): 1,
        ("GET", "/healthz", "200"): 1,
    }


def test_refused_requests_are_counted_too(app: FastAPI, world: World, metrics: PrometheusMetrics) -> None:
    admin = shown(world.access.local)
    ask(app, ("POST", PROVISION), ("GET", PEERS))
    ask(app, ("POST", PROVISION), headers=admin, content=b"{")
    ask(app, ("POST", PROVISION), headers=admin, content=b" " * 70_000)
    assert counted(metrics) == {
        ("POST", PROVISION, "401"): 1,
        ("GET", PEERS, "401"): 1,
        ("POST", PROVISION, "422"): 1,
        ("POST", PROVISION, "413"): 1,
    }
    assert Scrape.of(metrics).value("provisions_total", outcome="refused") == 3


def test_unknown_paths_and_methods_are_one_series_each_status(
    app: FastAPI, world: World, metrics: PrometheusMetrics
) -> None:
    """A caller must not be able to make new series."""
    ask(app, ("GET", "/a"), ("GET", "/b"), ("PUT", PEERS), ("BREW", "/c"), ("X", PEERS), ("BREW", "/healthz"))
    assert counted(metrics) == {
        ("GET", "unmatched", "404"): 2,
        ("PUT", "unmatched", "405"): 1,
        ("other", "unmatched", "404"): 1,
        ("other", "unmatched", "405"): 2,
    }


def test_unforeseen_error_counts_as_a_500(world: World, metrics: PrometheusMetrics) -> None:
    failing = APIRouter(route_class=OpenRoute)

    @failing.get("/fails")
    async def fails() -> None:
        raise RuntimeError

    app = FastAPI()
    app.state.provisioning_service = world.service
    app.include_router(failing)
    ask(app, ("GET", "/fails"))
    assert counted(metrics) == {("GET", "/fails", "500"): 1}


def test_requests_to_a_mounted_app_count_for_the_service_of_the_outer_one(
    world: World, metrics: PrometheusMetrics
) -> None:
    inner, outer = FastAPI(), FastAPI()
    inner.include_router(router, prefix="/api/v1")
    outer.mount("/hub", inner)
    outer.state.provisioning_service = world.service
    ask(outer, ("GET", f"/hub{PEERS}"), headers=shown(world.access.local))
    ask(outer, ("PUT", f"/hub{PEERS}"))
    assert counted(metrics) == {("GET", PEERS, "200"): 1, ("PUT", "unmatched", "405"): 1}


def test_provisions_count_once_a_request(app: FastAPI, world: World, metrics: PrometheusMetrics) -> None:
    admin = shown(world.access.local)
    body = provision_body("node-1")
    ask(app, ("POST", PROVISION), ("POST", PROVISION), headers=admin, json=body)
    ask(app, ("POST", PROVISION), headers=admin, json=provision_body("node-2", new_key(), version="none"))
    ask(app, ("DELETE", f"{PEERS}/node-1"), ("DELETE", f"{PEERS}/node-1"), headers=admin)
    world.writer.close()
    ask(app, ("POST", PROVISION), headers=admin, json=provision_body("node-3"))
    found = Scrape.of(metrics)
    assert found.by("provisions_total", "outcome") == {
        "provisioned": 1,
        "duplicate": 1,
        "pool_exhausted": 0,
        "refused": 1,
        "unavailable": 1,
        "unknown": 0,
    }
    assert found.by("deprovisions_total", "outcome") == {
        "deprovisioned": 1,
        "not_found": 1,
        "refused": 0,
        "unavailable": 0,
        "unknown": 0,
    }


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (KeyTakenError("n"), "duplicate"),
        (PeerLimitError("wg0", 7), "pool_exhausted"),
        (PeerNotFoundError("n"), "not_found"),
        (ForbiddenError("operate"), "refused"),
        (RateLimitedError(7), "refused"),
        (NonceError(), "refused"),
        (RequestValidationError([]), "refused"),
        (HTTPException(413), "refused"),
        (AddressTakenError("10.0.0.2"), "unavailable"),
        (ConfigFileError("a", "b", "c"), "unavailable"),
        (PausedError("a", 1, 2, "c"), "unavailable"),
        (OvertakenError(), "unavailable"),
        (OutcomeUnknownError("x"), "unknown"),
        (ValueError(), "unknown"),
    ],
)
def test_each_error_has_an_outcome(error: Exception, outcome: str) -> None:
    assert next(OUTCOMES[kind] for kind in type(error).__mro__ if kind in OUTCOMES) == outcome


def test_failed_authentications_count_by_the_audit_logs_reason_over_a_limit_too(
    app: FastAPI, world: World, metrics: PrometheusMetrics
) -> None:
    ask(app, ("GET", PEERS))
    ask(app, ("GET", PEERS), headers={"Authorization": "Bearer nonsense"})
    ask(app, ("GET", PEERS), ("GET", "/healthz"), headers=shown(Secret.generate()))
    used_up = CommandLine(world.store).make(TokenRequest(max_uses=1))
    world.access.cache.refresh()
    world.access.uses.count(used_up.id)
    ask(app, ("POST", PROVISION), headers=shown(used_up), json=provision_body("node-9", new_key()))
    assert Scrape.of(metrics).by("failed_authentications_total", "reason") == {
        "missing": 1,
        "malformed": 1,
        "unknown": 2,
        "used_up": 1,
    }


def test_a_reader_reads_the_metrics_and_a_token_does_not(
    app: FastAPI, world: World, metrics: PrometheusMetrics
) -> None:
    command_line = CommandLine(world.store)
    reader, token = command_line.make(KeyRequest(role=Role.READ)), command_line.make(TokenRequest())
    assert [answer.status_code for answer in ask(app, ("GET", "/metrics"), headers=shown(token))] == [403]
    assert [answer.status_code for answer in ask(app, ("GET", "/metrics"))] == [401]
    (answer,) = ask(app, ("GET", "/metrics"), headers=shown(reader))
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    assert Scrape(answer.text).value("http_requests_total", method="GET", route="/metrics", status="401") == 1


def test_public_metrics_ask_for_no_credential(world: World) -> None:
    settings = Settings(_env_file=None).model_copy(update={"wireguard_metrics_public": True})
    (answer,) = ask(create_app(settings, world.service), ("GET", "/metrics"))
    assert answer.status_code == 200
    assert Scrape(answer.text).value("build_info") is None
    assert "wireguard_build_info{" in answer.text


def test_openapi_says_that_the_metrics_are_text(app: FastAPI) -> None:
    described = app.openapi()["paths"]["/metrics"]["get"]
    assert list(described["responses"]["200"]["content"]) == ["text/plain; version=0.0.4; charset=utf-8"]
    assert described["security"] == [{"Bearer": []}]
    assert set(described["responses"]) == {"200", "401", "403", "429"}


def test_a_refused_request_leaves_no_garbage(app: FastAPI) -> None:
    """An error in a reference cycle keeps its request in memory until the garbage collector comes."""

    def errors() -> int:
        return sum(isinstance(found, UnauthenticatedError) for found in gc.get_objects())

    ask(app, ("GET", PEERS))
    gc.collect()
    before = errors()
    gc.disable()
    try:
        answers = ask(app, *[("GET", PEERS)] * 3)
        left = errors() - before
    finally:
        gc.enable()
    assert ([answer.status_code for answer in answers], left) == ([401] * 3, 0)
