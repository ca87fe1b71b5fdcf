"""A `wg` that fails: every request is answered, nothing is left behind, and the service recovers."""

import os
import signal
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from tests.harness.failing_wg import FailingWg
from tests.harness.patience import eventually
from tests.harness.requests import PEERS, PROVISION, STATS, provision_body
from tests.harness.service import ServiceProcess, StartService
from tests.harness.three_places import assert_in_step, listed, settings_for
from tests.harness.wireguard import HubInterface


@pytest.fixture
def service(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path, wg: FailingWg
) -> ServiceProcess:
    return start_service(settings_for(hub_interface, tmp_path), path_prefix=wg.directory)


@pytest.mark.parametrize("mood", ["fails", "lies"])
def test_batch_that_wg_refuses_leaves_no_trace(
    service: ServiceProcess, hub_interface: HubInterface, wg: FailingWg, mood: str
) -> None:
    for number in range(3):
        service.client.post(PROVISION, json=provision_body(f"node-{number}")).raise_for_status()
    before = (listed(service), hub_interface.config_path.read_bytes(), hub_interface.peers())
    stats = service.client.get(STATS).json()
    wg.be(mood)
    with ThreadPoolExecutor(16) as pool:
        answers = list(
            pool.map(
                lambda number: service.client.post(PROVISION, json=provision_body(f"late-{number}")),
                range(16),
            )
        )
        answers.append(service.client.delete(f"{PEERS}/node-1"))
    assert {answer.status_code for answer in answers} == {503}
    for answer in answers:
        assert "wg syncconf" in answer.json()["detail"]
        assert int(answer.headers["Retry-After"]) > 0
    assert service.client.get("/readyz").status_code == 503
    assert (listed(service), hub_interface.config_path.read_bytes()) == before[:2]
    assert service.client.get(STATS).json() == stats
    wg.be("works")
    eventually(lambda: service.client.get("/readyz").status_code == 200)
    assert (listed(service), hub_interface.config_path.read_bytes(), hub_interface.peers()) == before
    answer = service.client.post(PROVISION, json=provision_body("late-0"))
    assert answer.json()["config"]["assigned_ip"] == "10.0.0.5"
    assert len(assert_in_step(service, hub_interface)) == 4


def test_a_repeat_is_not_told_success_before_the_first_request_is_live(
    service: ServiceProcess, wg: FailingWg, tmp_path: Path
) -> None:
    """The answer is committed before the hub is told, and taken back where that fails."""
    body, key = provision_body("node-1"), {"Idempotency-Key": "key"}

    def ask(seconds: float = 60.0) -> int:
        return service.client.post(PROVISION, json=body, headers=key, timeout=seconds).status_code

    wg.be("held")
    with (
        ThreadPoolExecutor(1) as pool,
        closing(sqlite3.connect(tmp_path / "state" / "provisioning.sqlite")) as records,
    ):
        first = pool.submit(ask)
        eventually(lambda: records.execute("SELECT node_id FROM answers").fetchall() == [("node-1",)])
        with pytest.raises(httpx.ReadTimeout):
            ask(1.0)
        wg.be("fails")
        assert first.result() == 503
    assert ask() == 503
    wg.be("works")
    eventually(lambda: ask() == 200)


@pytest.fixture
def hasty_service(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path, wg: FailingWg
) -> ServiceProcess:
    settings = settings_for(hub_interface, tmp_path)
    return start_service(settings, path_prefix=wg.directory, module=("tests.harness.hasty_service",))


@pytest.mark.parametrize(
    "patience", ["hasty_service", pytest.param("service", marks=pytest.mark.torture(only=True))]
)
def test_hanging_wg_is_given_up_in_time_for_an_answer(
    request: pytest.FixtureRequest, hub_interface: HubInterface, wg: FailingWg, patience: str
) -> None:
    service: ServiceProcess = request.getfixturevalue(patience)
    service.client.post(PROVISION, json=provision_body("node-1")).raise_for_status()
    wg.be("hangs")
    refused = service.client.post(PROVISION, json=provision_body("node-2"), timeout=60.0)
    assert refused.status_code == 503
    assert "didn't end within" in refused.json()["detail"]
    assert service.client.get("/readyz").status_code == 503
    wg.be("works")
    eventually(lambda: service.client.get("/readyz").status_code == 200)
    assert set(assert_in_step(service, hub_interface)) == {"node-1"}


def test_stop_in_the_middle_of_a_change_is_not_a_500(
    hasty_service: ServiceProcess, hub_interface: HubInterface, wg: FailingWg
) -> None:
    service = hasty_service
    wg.be("held")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(service.client.post, PROVISION, json=provision_body("node-1"), timeout=60.0)
        eventually(lambda: "node-1" in hub_interface.config_path.read_text())
        os.kill(service.pid, signal.SIGTERM)
        answer = waiting.result()
        wg.be("fails")
        assert service.wait_exit() == 0
    assert answer.status_code == 503
    assert "Retry-After" in answer.headers
    assert "Traceback" not in service.log
    wg.be("works")
    service.start()
    assert_in_step(service, hub_interface)


def test_interface_that_failed_at_the_start_is_reconciled_later(
    service: ServiceProcess, hub_interface: HubInterface, wg: FailingWg
) -> None:
    service.client.post(PROVISION, json=provision_body("node-1")).raise_for_status()
    service.terminate()
    hub_interface.down()
    hub_interface.start()
    wg.be("fails")
    service.ready = "/healthz"
    service.start()
    red = service.client.get("/readyz")
    assert red.status_code == 503
    assert "the device is on fire" in red.json()["detail"]
    wg.be("works")
    eventually(lambda: service.client.get("/readyz").status_code == 200)
    assert set(assert_in_step(service, hub_interface)) == {"node-1"}
