"""A service whose records are older than its hub."""

from pathlib import Path

import pytest

from tests.harness.lost_records import back_up, names, provision, restore
from tests.harness.service import ServiceProcess, StartService
from tests.harness.three_places import assert_in_step, settings_for
from tests.harness.wireguard import HubInterface


@pytest.fixture
def restored(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> tuple[ServiceProcess, dict[str, str]]:
    """Start a service of 12 peers on records that are from before 10 of them; return it and the 12."""
    service = start_service(settings_for(hub_interface, tmp_path))
    provision(service, *names(0, 2))
    copy = back_up(tmp_path / "state")
    provision(service, *names(2, 12))
    before = assert_in_step(service, hub_interface)
    service.terminate()
    restore(tmp_path / "state", copy)
    service.ready = "/healthz"
    service.start()
    assert "10 of 12 peers" in service.client.get("/readyz").text, service.log
    return service, before
