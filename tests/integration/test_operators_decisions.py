"""What an operator decides where the records don't fit the hub, and what must not come in between."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import httpx
import pytest

from tests.harness.patience import eventually
from tests.harness.requests import provision_body
from tests.harness.service import ServiceProcess
from tests.harness.three_places import assert_in_step, in_file, settings_for
from tests.harness.wireguard import HubInterface
from tests.integration.test_lost_records import back_up, is_ready, names, provision, reconcile, restore

PROVISION: Final = "/api/v1/wireguard/provision"
PEERS: Final = "/api/v1/wireguard/peers"
StartService = Callable[..., ServiceProcess]


@pytest.fixture
def paused(
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
    return service, before


def test_nodes_that_ask_again_and_again_do_not_get_in_the_way_of_an_adoption(
    paused: tuple[ServiceProcess, dict[str, str]], hub_interface: HubInterface
) -> None:
    service, before = paused
    keys = {node: key for node, (key, _) in in_file(hub_interface.config_path).items()}
    stop = threading.Event()

    def ask(number: int) -> set[int]:
        """Ask for a peer that is to be adopted, or for new ones that may get its address."""
        statuses = set()
        with httpx.Client(
            base_url=service.url, headers=service.client.headers, timeout=30, trust_env=False
        ) as client:
            for turn in range(10_000):
                node = f"node-{number}" if number < 8 else f"new-{number}-{turn}"
                answer = client.post(PROVISION, json=provision_body(node, keys.get(node)))
                statuses.add(answer.status_code)
                if stop.wait(0.02):
                    break
        return statuses

    with ThreadPoolExecutor(12) as pool:
        asking = [pool.submit(ask, number) for number in range(2, 14)]
        try:
            assert reconcile(service, "--adopt").returncode == 0
            eventually(lambda: is_ready(service))
        finally:
            stop.set()
        assert set().union(*(each.result() for each in asking)) <= {200, 409, 503}
    assert "Traceback" not in service.log
    provision(service, "afterwards")
    after = assert_in_step(service, hub_interface)
    assert before.items() <= after.items()
    service.ready = "/readyz"
    service.restart()
    assert assert_in_step(service, hub_interface) == after
