"""The HTTP contract, over a real socket, with a real interface behind it."""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.hosts import LocalHost
from tests.harness.patience import eventually
from tests.harness.requests import PEERS, PROVISION, STATS, new_key, provision_body
from tests.harness.service import ServiceProcess, StartService
from tests.harness.three_places import assert_in_step, settings_for
from tests.harness.wireguard import HubInterface


@pytest.fixture
def service(hub_interface: HubInterface, start_service: StartService, tmp_path: Path) -> ServiceProcess:
    return start_service(settings_for(hub_interface, tmp_path))


@pytest.fixture(scope="module")
def shared_hub(needs_wireguard: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubInterface]:
    """Give the module one hub more, for the tests that leave it as it is."""
    directory = tmp_path_factory.mktemp("shared")
    with HubInterface(LocalHost(), "wgshared", directory, listen_port=39000) as hub:
        hub.start()
        yield hub


@pytest.fixture(scope="module")
def shared_service(shared_hub: HubInterface) -> Iterator[ServiceProcess]:
    directory = shared_hub.config_path.parent
    with ServiceProcess(directory, settings_for(shared_hub, directory)) as service:
        yield service


@pytest.fixture
def bystander(shared_hub: HubInterface, shared_service: ServiceProcess) -> Iterator[ServiceProcess]:
    """Give the test a service, and check that it has left file, interface and records as they were."""
    path = shared_hub.config_path
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    yield shared_service
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert shared_hub.peers() == {}
    assert shared_service.client.get(PEERS).json() == {}


def test_a_node_joins_is_seen_and_leaves(service: ServiceProcess, hub_interface: HubInterface) -> None:
    body = provision_body("swarm-node-001")
    joined = service.client.post(PROVISION, json=body)
    assert joined.status_code == 200
    assert joined.json()["status"] == "success"
    assert joined.json()["message"] == "Peer swarm-node-001 provisioned successfully"
    config = joined.json()["config"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", config.pop("provisioned_at"))
    assert config == {
        "node_id": "swarm-node-001",
        "assigned_ip": "10.0.0.2",
        "subnet_mask": "255.255.255.0",
        "hub_public_key": hub_interface.public_key,
        "hub_endpoint": "hub.example.com:51820",
        "allowed_ips": "10.0.0.0/24",
        "persistent_keepalive": 25,
        "dns_servers": ["10.0.0.1"],
    }
    assert hub_interface.peers() == {body["wireguard_public_key"]: {"10.0.0.2/32"}}
    whole = joined.json()["config"]
    assert service.client.get(PEERS).json() == {"swarm-node-001": whole}
    assert service.client.get(f"{PEERS}/swarm-node-001").json() == whole
    assert_in_step(service, hub_interface)

    gone = service.client.delete(f"{PEERS}/swarm-node-001")
    assert gone.status_code == 200
    assert gone.json() == {
        "status": "success",
        "message": "Peer swarm-node-001 deprovisioned successfully",
    }
    assert hub_interface.peers() == {}
    assert body["wireguard_public_key"] not in hub_interface.config_path.read_text()
    assert service.client.get(PEERS).json() == {}
    for again in (service.client.get(f"{PEERS}/swarm-node-001"), service.client.delete(f"{PEERS}/nobody")):
        assert again.status_code == 404
        assert again.json()["detail"].endswith("not found")


def test_each_kind_of_conflict_shows_only_the_allowed_fields(
    service: ServiceProcess, hub_interface: HubInterface
) -> None:
    body = provision_body("node-1")
    config = service.client.post(PROVISION, json=body).json()["config"]
    before = hub_interface.config_path.read_bytes()
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (body, config),
        ({**body, "wireguard_public_key": new_key()}, {"node_id": "node-1", "assigned_ip": "10.0.0.2"}),
        ({**body, "public_key": "another"}, {"node_id": "node-1", "assigned_ip": "10.0.0.2"}),
    ]
    for sent, existing in cases:
        refused = service.client.post(PROVISION, json=sent)
        assert refused.status_code == 409
        assert refused.json() == {
            "detail": {"message": "Peer node-1 is already provisioned", "existing_config": existing}
        }
    other = service.client.post(PROVISION, json={**body, "node_id": "node-2"})
    assert other.status_code == 409
    assert other.json()["detail"]["existing_config"] == {}
    assert "node-1" not in other.text
    assert hub_interface.config_path.read_bytes() == before


def test_the_pools_figures_add_up_and_an_exhausted_pool_says_so(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path, WIREGUARD_IP_POOL="10.0.0.0/29"))
    for number in range(5):
        config = service.client.post(PROVISION, json=provision_body(f"node-{number}")).json()["config"]
        assert (config["subnet_mask"], config["allowed_ips"]) == ("255.255.255.248", "10.0.0.0/29")
    assert service.client.get(STATS).json() == {
        "total_addresses": 6,
        "reserved_addresses": 1,
        "allocated_addresses": 5,
        "available_addresses": 0,
        "utilization_percent": 83,
    }
    refused = service.client.post(PROVISION, json=provision_body("one-too-many"))
    assert refused.status_code == 503
    assert refused.json() == {"detail": "IP pool exhausted: 5 addresses allocated from range 10.0.0.0/29"}
    assert int(refused.headers["Retry-After"]) > 0
    assert service.client.get("/readyz").status_code == 503
    assert service.client.get("/healthz").status_code == 200


KEY = "vXs/2igcEtnCFS8dJ1SSp1Gi6AHrqL0h4uvGXghFwS8="
LOW_ORDER = base64.b64encode(
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800")
).decode()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param("wireguard_public_key", KEY[:-2] + "9=", id="non-canonical spelling"),
        pytest.param("wireguard_public_key", KEY[:42] + "=", id="43 characters"),
        pytest.param("wireguard_public_key", KEY + "=", id="45 characters"),
        pytest.param("wireguard_public_key", KEY + "\n", id="key with trailing newline"),
        pytest.param("wireguard_public_key", KEY.replace("/", "_"), id="URL-safe alphabet"),
        pytest.param("wireguard_public_key", "A" * 43 + "=", id="all zero"),
        pytest.param("wireguard_public_key", LOW_ORDER, id="low order"),
        pytest.param("wireguard_public_key", "jKlMnOpQrStUvWxYzAbCdEfGhIjKlMnO=", id="the old example"),
        pytest.param("wireguard_public_key", "\u0661" * 44, id="digits of another script"),
        pytest.param("node_id", "node-1\n", id="node_id with trailing newline"),
        pytest.param("node_id", "", id="empty node_id"),
        pytest.param("node_id", "n" * 129, id="long node_id"),
        pytest.param("node_id", "node 1", id="node_id with a space"),
        pytest.param("node_id", "n\u00f6de", id="node_id with an umlaut"),
        pytest.param("node_id", "node\nPostUp = reboot", id="node_id with a hook"),
        pytest.param("node_id", 1, id="number for node_id"),
        pytest.param("public_key", "", id="empty public_key"),
        pytest.param("public_key", "p" * 257, id="long public_key"),
        pytest.param("public_key", "a\x00b", id="public_key with NUL"),
        pytest.param("public_key", "a\u2028b", id="public_key with a line separator"),
        pytest.param("version", "1.0", id="version of two parts"),
        pytest.param("version", "1.0.0\n", id="version with trailing newline"),
        pytest.param("version", "v1.0.0", id="version with a v"),
        pytest.param("version", "01.0.0", id="version with a leading zero"),
        pytest.param("version", "1.0.\u0661", id="version with another script's digit"),
        pytest.param("capabilities", {"gpu_count": 17}, id="too many GPUs"),
        pytest.param("capabilities", {"gpu_count": "1"}, id="text for a number"),
        pytest.param("capabilities", {"cpu_cores": 0}, id="no core"),
        pytest.param("capabilities", {"memory_mb": 511}, id="little memory"),
        pytest.param("capabilities", {"gpu_memory_mb": 1048577}, id="much GPU memory"),
        pytest.param("capabilities", {"models": [""]}, id="model without a name"),
        pytest.param("capabilities", {"colour": "red"}, id="unknown capability"),
        pytest.param("capabilities", None, id="no capabilities"),
        pytest.param("metadata", {"a": "x" * 8192}, id="large metadata"),
        pytest.param("metadata", json.loads('{"a":' * 9 + "1" + "}" * 9), id="deep metadata"),
        pytest.param("metadata", [], id="list for metadata"),
        pytest.param("colour", "red", id="unknown field"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(
    bystander: ServiceProcess, field: str, value: object
) -> None:
    refused = bystander.client.post(PROVISION, json={**provision_body("node-1", KEY), field: value})
    assert refused.status_code == 422
    assert [error["loc"][:2] for error in refused.json()["detail"]] == [["body", field]]
    assert bystander.client.get(PEERS).json() == {}


def test_the_hubs_own_key_is_refused(bystander: ServiceProcess, shared_hub: HubInterface) -> None:
    refused = bystander.client.post(PROVISION, json=provision_body("node-1", shared_hub.public_key))
    assert refused.status_code == 422
    assert refused.json()["detail"][0]["loc"] == ["body", "wireguard_public_key"]


@pytest.mark.parametrize(
    ("content", "status"),
    [
        pytest.param(b"", 422, id="nothing"),
        pytest.param(b"{", 422, id="half an object"),
        pytest.param(b"null", 422, id="null"),
        pytest.param(b"[]", 422, id="a list"),
        pytest.param(b"\xff\xfe", 422, id="no UTF-8"),
        pytest.param(b"[" * 60_000, 422, id="deeper than a parser goes"),
        pytest.param(b"[" * 900 + b"]" * 900, 422, id="deep"),
        pytest.param(b'{"metadata":' * 900 + b"1" + b"}" * 900, 422, id="deep objects"),
        pytest.param(b'{"node_id":' + b"1" * 5000 + b"}", 422, id="a huge number"),
        pytest.param(b'{"node_id": NaN}', 422, id="NaN"),
        pytest.param(b'{"node_id": "\\ud800"}', 422, id="a lone surrogate"),
        pytest.param(b'{"\\ud800": 1}', 422, id="a lone surrogate as a field"),
        pytest.param(b" " * (64 * 1024 + 1), 413, id="too large"),
        pytest.param(iter([b" " * 1024] * 65), 413, id="too large, in chunks of unknown number"),
    ],
)
def test_a_strange_body_gets_a_sentence(bystander: ServiceProcess, content: Any, status: int) -> None:
    headers = {"Content-Type": "application/json"}
    refused = bystander.client.post(PROVISION, content=content, headers=headers)
    assert refused.status_code == status
    assert refused.json()["detail"]


@pytest.mark.parametrize(
    "metadata",
    [
        {"nan": float("nan")},
        {"infinity": float("inf")},
        {"surrogate": "\ud800"},
    ],
)
def test_metadata_that_no_database_takes_is_refused(bystander: ServiceProcess, metadata: Any) -> None:
    content = json.dumps(provision_body("node-1", metadata=metadata)).encode()
    refused = bystander.client.post(PROVISION, content=content, headers={"Content-Type": "application/json"})
    assert refused.status_code == 422


UNUSUAL: dict[str, dict[str, Any]] = {
    "no-metadata": {"metadata": None},
    "odd-metadata": {"metadata": {"nul": "\x00", "text": "\u2028", "n": 1e300}},
    "8-levels": {"metadata": json.loads('{"a":' * 8 + "1" + "}" * 8)},
    "default-capabilities": {"capabilities": {}},
    "pre-release-and-build": {"version": "1.0.0-rc.1+build.5"},
    "printable-public-key": {"public_key": "Schl\u00fcssel \u2713"},
    "n" * 128: {},
    "-": {},
}


def test_unusual_but_right_input_is_taken(service: ServiceProcess, hub_interface: HubInterface) -> None:
    for node_id, over in UNUSUAL.items():
        answer = service.client.post(PROVISION, json={**provision_body(node_id), **over})
        assert answer.status_code == 200, answer.text
    assert set(assert_in_step(service, hub_interface)) == set(UNUSUAL)


def test_missing_content_type_is_named_in_the_422(bystander: ServiceProcess) -> None:
    refused = bystander.client.post(PROVISION, content=b"{}", headers={"Content-Type": "text/plain"})
    assert refused.status_code == 422
    assert "Content-Type: application/json" in refused.text


def test_openapi_shows_an_example_and_every_error(service: ServiceProcess) -> None:
    paths = service.client.get("/openapi.json").json()["paths"]
    answers = {
        (path, method): sorted(operation["responses"])
        for path, operations in paths.items()
        for method, operation in operations.items()
    }
    refusals = ["401", "403", "429"]
    prefix = "/api/v1/wireguard"
    assert {(path.removeprefix(prefix), method): found for (path, method), found in answers.items()} == {
        ("/provision", "post"): ["200", *refusals[:2], "409", "413", "422", "429", "503"],
        ("/peers", "get"): ["200", *refusals],
        ("/peers/{node_id}", "get"): ["200", *refusals[:2], "404", "422", "429"],
        ("/peers/{node_id}", "delete"): ["200", *refusals[:2], "404", "422", "429", "503"],
        ("/pool/stats", "get"): ["200", *refusals],
        ("/health", "get"): ["200", *refusals[:2], "404", "422", "429"],
        ("/peers/{node_id}/health", "get"): ["200", *refusals[:2], "404", "422", "429"],
        ("/challenge", "post"): ["200", *refusals[:2], "404", "422", "429"],
        ("/tokens", "get"): ["200", *refusals],
        ("/tokens", "post"): ["201", *refusals[:2], "422", "429"],
        ("/tokens/{credential_id}", "delete"): ["200", *refusals[:2], "404", "422", "429"],
        ("/keys", "get"): ["200", *refusals],
        ("/keys", "post"): ["201", *refusals[:2], "422", "429"],
        ("/keys/{credential_id}", "delete"): ["200", *refusals[:2], "404", "422", "429"],
        ("/audit", "get"): ["200", *refusals[:2], "422", "429"],
        ("/healthz", "get"): ["200", "429"],
        ("/readyz", "get"): ["200", "429", "503"],
        ("/metrics", "get"): ["200", "401", "403", "429"],
    }
    for operations in paths.values():
        for operation in operations.values():
            for status, answer in operation["responses"].items():
                if status not in {"200", "201", "422"}:
                    assert "example" in json.dumps(answer) or "$ref" in json.dumps(answer)
    provisioning = paths["/api/v1/wireguard/provision"]["post"]["responses"]
    assert all(
        "example" in provisioning[status]["content"]["application/json"] for status in ("409", "422", "503")
    )
    schemas = service.client.get("/openapi.json").json()["components"]["schemas"]
    example = schemas["ProvisioningRequest"]["example"]
    assert service.client.post(PROVISION, json=example).status_code == 200


def test_readiness_names_the_missing_interface_and_recovers_with_it(
    service: ServiceProcess, hub_interface: HubInterface, tmp_path: Path
) -> None:
    assert service.client.get("/readyz").json() == {"status": "ready", "reload": "syncconf", "notices": []}
    for path in ("/healthz", "/readyz"):
        assert service.client.head(path).status_code == 200
    body = provision_body("node-1")
    service.client.post(PROVISION, json=body).raise_for_status()
    before = hub_interface.config_path.read_bytes()
    hub_interface.down()
    assert service.client.head("/readyz").status_code == 503
    red = service.client.get("/readyz")
    assert red.status_code == 503
    assert f"interface {hub_interface.name} does not exist" in red.json()["detail"]
    refused = service.client.post(PROVISION, json=provision_body("node-2"))
    assert refused.status_code == 503
    assert f"interface {hub_interface.name} does not exist" in refused.json()["detail"]
    assert int(refused.headers["Retry-After"]) > 0
    assert service.client.get("/healthz").status_code == 200
    assert hub_interface.config_path.read_bytes() == before
    hub_interface.up()
    hub_interface.give_address()
    eventually(lambda: service.client.get("/readyz").status_code == 200)
    assert_in_step(service, hub_interface)
    assert hub_interface.show("public-key") == hub_interface.public_key
    assert service.client.post(PROVISION, json=provision_body("node-2")).status_code == 200


def test_reload_off_keeps_the_file_and_leaves_the_interface_alone(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path, WIREGUARD_RELOAD="off"))
    assert service.client.get("/readyz").json() == {"status": "ready", "reload": "off", "notices": []}
    key = new_key()
    assert service.client.post(PROVISION, json=provision_body("node-1", key)).status_code == 200
    assert key in hub_interface.config_path.read_text()
    assert hub_interface.peers() == {}
    assert "reload_off" in service.log
