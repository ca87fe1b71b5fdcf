"""The names that Python programs use: modules, keywords, operations and what they return."""

import asyncio
import json
import re
from importlib import import_module
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from backend.api.v1.endpoints.wireguard_provisioning import router
from backend.embedded import open_service
from backend.errors import StartRefusedError
from backend.models import wireguard
from backend.models.wireguard import NodeCapabilities, ProvisioningRecord, ProvisioningRequest
from backend.models.wireguard.keys import WireGuardPrivateKey
from backend.services.wireguard_provisioning_service import DuplicatePeerError
from tests.harness.requests import provision_body

MODELS = {
    "NodeCapabilities",
    "PeerConfiguration",
    "ProvisioningRecord",
    "ProvisioningRequest",
    "ProvisioningResponse",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the keywords for a hub that is a file only."""
    key = WireGuardPrivateKey.generate()
    path = tmp_path / "wg7.conf"
    path.touch(mode=0o600)
    path.write_text(f"[Interface]\nPrivateKey = {key.reveal()}\n")
    monkeypatch.chdir(tmp_path)
    return {
        "ip_pool_network": "10.9.0.0/24",
        "hub_public_key": key.public_key(),
        "hub_endpoint": "hub.example.com:51820",
        "hub_ip": "10.9.0.1",
        "config_path": str(path),
        "enable_dbos": False,
        "wireguard_reload": "off",
        "state_directory": tmp_path / "state",
    }


def test_models_come_from_the_package_and_from_its_module() -> None:
    module = import_module("backend.models.wireguard.provisioning")
    assert set(wireguard.__all__) == MODELS
    assert all(getattr(wireguard, name) is getattr(module, name) for name in MODELS)


def test_operations_have_the_names_and_the_tag_that_clients_are_generated_from() -> None:
    app = FastAPI()
    app.include_router(router, prefix="/api/v1")
    operations = {
        (method, path.removeprefix("/api/v1/wireguard")): operation
        for path, operations in app.openapi()["paths"].items()
        for method, operation in operations.items()
    }
    assert {place: operation["operationId"] for place, operation in operations.items()} == {
        ("post", "/challenge"): "make_challenge",
        ("post", "/provision"): "provision_peer",
        ("get", "/peers"): "list_peers",
        ("get", "/peers/{node_id}"): "get_peer_config",
        ("delete", "/peers/{node_id}"): "deprovision_peer",
        ("get", "/pool/stats"): "get_pool_stats",
    }
    assert all(operation["tags"] == ["WireGuard"] for operation in operations.values())


def test_every_answer_has_a_schema_that_is_there() -> None:
    app = FastAPI()
    app.include_router(router, prefix="/api/v1")
    document = app.openapi()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for status, answer in operation["responses"].items():
                assert answer["content"]["application/json"]["schema"], (path, method, status)
    names = re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document))
    assert set(names) <= set(document["components"]["schemas"])
    refused = document["paths"]["/api/v1/wireguard/provision"]["post"]["responses"]["422"]
    assert refused["content"]["application/json"]["schema"] == {
        "$ref": "#/components/schemas/HTTPValidationError"
    }


def test_record_says_its_status(hub: dict[str, Any]) -> None:
    record = ProvisioningRecord.model_validate(
        provision_body("node-1", hub["hub_public_key"], capabilities=NodeCapabilities())
        | {"assigned_ip": IPv4Address("10.9.0.2"), "provisioned_at": "2026-02-19T12:00:00Z"}
    )
    assert record.status == "active"
    assert record.model_dump()["status"] == "active"


def test_service_is_made_with_keywords_and_does_the_whole_sequence(hub: dict[str, Any]) -> None:
    request = ProvisioningRequest.model_validate(provision_body("node-1"))
    with open_service(**hub) as service:
        config = service.provision_peer(request)
        assert (str(config.assigned_ip), config.allowed_ips) == ("10.9.0.2", "10.9.0.0/24")
        assert (config.hub_endpoint, config.hub_public_key) == (hub["hub_endpoint"], hub["hub_public_key"])
        assert service.get_peer_config("node-1") == config
        assert service.list_provisioned_peers() == {"node-1": config}
        assert service.get_pool_stats()["allocated_addresses"] == 1
        with pytest.raises(DuplicatePeerError):
            service.provision_peer(request)
        service.deprovision_peer("node-1")
        assert service.list_provisioned_peers() == {}


def test_keywords_go_before_the_environment(hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WIREGUARD_HUB_ENDPOINT", "environment.example.com:1")
    monkeypatch.setenv("WIREGUARD_HUB_IP", "192.0.2.1")
    request = ProvisioningRequest.model_validate(provision_body("node-1"))
    with open_service(**hub | {"hub_endpoint": None}) as service:
        assert service.provision_peer(request).hub_endpoint == "environment.example.com:1"


@pytest.mark.parametrize(
    ("over", "reason"),
    [
        pytest.param({"hub_ip": "192.0.2.1"}, "WIREGUARD_HUB_IP", id="a hub outside of its pool"),
        pytest.param({"hub_public_key": "jKlMnOpQ="}, "WIREGUARD_HUB_PUBLIC_KEY", id="no key"),
        pytest.param({"config_path": "/nowhere/wg0.conf"}, r"/nowhere/\.wg0\.conf", id="no file"),
    ],
)
def test_wrong_setting_is_refused_with_a_reason(
    hub: dict[str, Any], over: dict[str, Any], reason: str
) -> None:
    with pytest.raises(StartRefusedError, match=reason), open_service(**hub | over):
        pass


def test_a_misspelt_keyword_is_not_ignored(hub: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="hub_adress"), open_service(**hub, hub_adress="10.9.0.1"):
        pass


def test_documented_programs_run_as_they_stand(
    hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[1] / "docs" / "python.md").read_text()
    text = text.replace("/etc/wireguard/wg0.conf", hub["config_path"])
    service, app, parts = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    for name in ("WIREGUARD_RELOAD", "WIREGUARD_AUTH"):
        monkeypatch.setenv(name, "off")
    monkeypatch.setenv("WIREGUARD_CONFIG_PATH", hub["config_path"])
    run(service)
    assert capsys.readouterr().out.startswith("10.0.0.2 {'total_addresses': 254, ")
    run(parts)
    client = httpx.AsyncClient(transport=httpx.ASGITransport(run(app)["app"]), base_url="http://hub")
    assert asyncio.run(client.get("/api/v1/wireguard/peers")).json() == {}


def run(program: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(program, "docs/python.md", "exec"), names)  # noqa: S102 - our own page
    return names
