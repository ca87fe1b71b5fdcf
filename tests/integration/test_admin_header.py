"""admin.header, the credential for operators on the hub's own host, and WIREGUARD_AUTH=off."""

import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from backend.api.v1.endpoints.wireguard_provisioning import router
from backend.models.wireguard.keys import WireGuardPrivateKey
from tests.harness.patience import eventually
from tests.harness.requests import AUDIT, KEYS, PEERS, PROVISION, TOKENS, bearer, provision_body
from tests.harness.requirements import require
from tests.harness.service import ServiceFailedError, ServiceProcess, StartService


def settings_in(directory: Path) -> dict[str, object]:
    """Return the settings of a hub that is a file only."""
    path = directory / "wg9.conf"
    path.write_text(f"[Interface]\nPrivateKey = {WireGuardPrivateKey.generate().reveal()}\n")
    return {
        "WIREGUARD_CONFIG_PATH": path,
        "WIREGUARD_RELOAD": "off",
        "STATE_DIRECTORY": directory / "state",
    }


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, object]:
    return settings_in(tmp_path)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """Give the module a service that no test stops."""
    directory = tmp_path_factory.mktemp("admin-header")
    with ServiceProcess(directory, settings_in(directory)) as service:
        yield service


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "admin.header"


def header_of(file: Path) -> dict[str, str]:
    name, _, value = file.read_text().strip().partition(": ")
    return {name: value}


def test_the_file_is_one_private_line_that_curl_takes(running: ServiceProcess) -> None:
    require("curl")
    file = running.directory / "state" / "admin.header"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    (line,) = file.read_text().splitlines()
    assert line.startswith("Authorization: Bearer ocw_")
    done = subprocess.run(
        ["curl", "-sS", "-H", f"@{file}", f"{running.url}{TOKENS}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]"
    assert line.rpartition("_")[2] not in running.log


def test_a_401_names_the_file(running: ServiceProcess) -> None:
    answer = running.client.get(PEERS, auth=None)
    assert answer.status_code == 401
    assert "admin.header" in answer.json()["detail"]
    assert "STATE_DIRECTORY" in answer.json()["detail"]


def test_local_admin_is_logged_as_local_and_is_not_in_the_records(running: ServiceProcess) -> None:
    running.client.post(PROVISION, json=provision_body("node-1")).raise_for_status()
    made = running.client.post(KEYS, json={"role": "read"}).json()
    assert made["created_by"] == "local"
    assert [key["id"] for key in running.client.get(KEYS).json()] == [made["id"]]
    logged = running.client.get(AUDIT).json()["entries"]
    assert {entry["actor"] for entry in logged if entry["outcome"] == "accepted"} == {"local"}
    assert len(running.command("key", "list").stdout.splitlines()) == 1


def test_each_start_makes_a_new_secret_and_a_stop_deletes_the_file(
    settings: dict[str, object], start_service: StartService, file: Path
) -> None:
    service = start_service(settings)
    first = header_of(file)
    service.kill()
    # A crash leaves it, and nothing is let in by it any more.
    assert file.exists()
    service.start()
    assert header_of(file) != first
    assert service.client.get(PEERS, headers=first).status_code == 401
    assert service.client.get(PEERS, headers=header_of(file)).status_code == 200
    assert service.terminate() == 0
    assert not file.exists()
    assert [path.name for path in file.parent.iterdir() if "admin" in path.name] == []
    service.start()


def test_a_service_that_ends_leaves_anothers_file(
    settings: dict[str, object], start_service: StartService, file: Path
) -> None:
    service = start_service(settings)
    file.write_text("Authorization: Bearer of-another-service\n")
    assert service.terminate() == 0
    assert "of-another-service" in file.read_text()
    service.start()


def test_symlink_in_the_files_place_is_not_followed(
    settings: dict[str, object], start_service: StartService, file: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.write_text("untouched")
    file.parent.mkdir(mode=0o700)
    file.symlink_to(target)
    file.with_name(".admin.header.new").symlink_to(target)
    start_service(settings)
    assert not file.is_symlink()
    assert target.read_text() == "untouched"


def test_unwritable_header_file_is_logged_and_does_not_stop_the_start(
    settings: dict[str, object], start_service: StartService, file: Path
) -> None:
    file.mkdir(mode=0o700, parents=True)
    file.parent.chmod(0o700)
    service = start_service(settings, ready="/healthz")
    eventually(lambda: "admin_header_not_written" in service.log)
    assert [path.name for path in file.parent.iterdir() if "admin" in path.name] == ["admin.header"]
    key = service.credential("key", "create", "--role", "read")
    answer = service.client.get(PEERS, headers=bearer(key), auth=None)
    assert answer.status_code == 200


def test_refused_start_leaves_no_header_file(settings: dict[str, object], tmp_path: Path) -> None:
    refused = {**settings, "WIREGUARD_HUB_IP": "192.0.2.1"}
    with pytest.raises(ServiceFailedError):
        ServiceProcess(tmp_path, refused).start()
    assert not (tmp_path / "state" / "admin.header").exists()


def test_without_authentication_every_caller_may_do_all_but_make_credentials(
    settings: dict[str, object], start_service: StartService, file: Path
) -> None:
    service = start_service({**settings, "WIREGUARD_AUTH": "off"})
    assert not file.exists()
    key = service.credential("key", "create", "--role", "admin")
    with httpx.Client(base_url=service.url, trust_env=False) as client:
        body = provision_body("node-1")
        assert client.post(PROVISION, json=body).status_code == 200
        # As to an operator: nothing tells one caller from another.
        again = client.post(PROVISION, json=body, headers={"Authorization": "Basic whatever"})
        assert again.json()["detail"]["existing_config"]["assigned_ip"] == "10.0.0.2"
        assert list(client.get(PEERS).json()) == ["node-1"]
        assert client.delete(f"{PEERS}/node-1").status_code == 200
        for method, path in (
            ("GET", KEYS),
            ("GET", TOKENS),
            ("POST", KEYS),
            ("DELETE", f"{KEYS}/{'0' * 16}"),
        ):
            refused = client.request(method, path, headers=bearer(key))
            assert refused.status_code == 403, path
            assert "WIREGUARD_AUTH=off" in refused.json()["detail"]
        assert {entry["actor"] for entry in client.get(AUDIT).json()["entries"]} >= {"anyone"}
        assert any("WIREGUARD_AUTH=off" in notice for notice in client.get("/readyz").json()["notices"])
    assert "WARNING: WIREGUARD_AUTH=off" in service.log
    before = service.log.count("authentication_off")
    service.restart()
    assert service.log.count("authentication_off") == before + 1
    service.settings["WIREGUARD_AUTH"] = "required"
    service.restart()
    assert service.client.get(PEERS, auth=None).status_code == 401


# Starlette's, of the httpx that all of these tests use.
@pytest.mark.filterwarnings("ignore:Using `httpx` with `starlette.testclient`")
def test_app_under_test_needs_only_authentication_off(
    settings: dict[str, object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from fastapi.testclient import TestClient  # noqa: PLC0415 - its import warns

    monkeypatch.chdir(tmp_path)
    for name, value in {**settings, "WIREGUARD_AUTH": "off"}.items():
        monkeypatch.setenv(name, str(value))
    app = FastAPI()
    app.include_router(router, prefix="/api/v1")
    with TestClient(app) as client:
        assert client.post(PROVISION, json=provision_body("node-1")).status_code == 200
        assert list(client.get(PEERS).json()) == ["node-1"]
