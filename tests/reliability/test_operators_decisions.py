"""An operator decides about records that don't match the hub, and nothing interferes meanwhile."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.harness.lost_records import back_up, is_ready, names, provision, reconcile, restore
from tests.harness.patience import eventually
from tests.harness.requests import PEERS, PROVISION, new_key, provision_body
from tests.harness.service import ServiceProcess, StartService
from tests.harness.three_places import assert_in_step, in_file, settings_for
from tests.harness.wireguard import HubInterface


def test_repeated_requests_do_not_disturb_an_adoption(
    restored: tuple[ServiceProcess, dict[str, str]], hub_interface: HubInterface
) -> None:
    service, before = restored
    keys = {node: key for node, (key, _) in in_file(hub_interface.config_path).items()}
    stop = threading.Event()

    def ask(number: int) -> set[int]:
        """Ask for a peer that is to be adopted, or for new ones that may get its address."""
        statuses = set()
        with httpx.Client(
            base_url=service.url, auth=service.local_admin, timeout=30, trust_env=False
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


@pytest.mark.parametrize("then", ["in memory before", "in memory in between"])
def test_new_records_continue_from_the_hubs_generation_even_without_peers(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path, then: str
) -> None:
    settings = settings_for(hub_interface, tmp_path)
    between = then == "in memory in between"
    service = start_service({**settings, "ENABLE_DBOS": str(between).lower()})
    for _ in range(2):
        provision(service, "node-0")
        service.client.delete(f"{PEERS}/node-0").raise_for_status()
    service.settings["ENABLE_DBOS"] = str(not between).lower()
    service.restart()
    provision(service, "node-1")
    before = assert_in_step(service, hub_interface)
    service.settings["ENABLE_DBOS"] = "true"
    service.ready = "/healthz"
    service.restart()
    if between:
        # The durable records have never known that peer, and it isn't taken off the hub.
        assert "1 of 1 peers on the hub are in no record" in service.client.get("/readyz").text
        assert reconcile(service, "--adopt").returncode == 0
        eventually(lambda: is_ready(service))
    assert is_ready(service)
    assert assert_in_step(service, hub_interface) == before


def test_peers_on_the_interface_alone_wait_for_a_decision(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    for number in range(8):
        address = f"10.0.0.{20 + number}/32"
        hub_interface.host.run(["wg", "set", hub_interface.name, "peer", new_key(), "allowed-ips", address])
    service = start_service(settings_for(hub_interface, tmp_path), ready="/healthz")
    assert "8 of 8 peers on the hub are in no record" in service.client.get("/readyz").text
    assert "`--adopt` takes 8 of the 8 unknown peers" in reconcile(service, "--show").stdout
    assert reconcile(service, "--adopt").returncode == 0
    eventually(lambda: is_ready(service))
    assert len(assert_in_step(service, hub_interface)) == 8


def test_records_from_between_a_removal_and_a_return_do_not_remove_the_peer(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path))
    bodies = provision(service, *names(0, 3))
    for body in bodies:
        service.client.delete(f"{PEERS}/{body['node_id']}").raise_for_status()
    copy = back_up(tmp_path / "state")
    for body in bodies:
        service.client.post(PROVISION, json=body).raise_for_status()
    before = assert_in_step(service, hub_interface)
    service.terminate()
    restore(tmp_path / "state", copy)
    service.ready = "/healthz"
    service.start()
    assert "3 of 3 peers on the hub are in no record" in service.client.get("/readyz").text
    assert reconcile(service, "--show").stdout.count("unknown: node-") == 3
    assert reconcile(service, "--adopt").returncode == 0
    eventually(lambda: is_ready(service))
    assert assert_in_step(service, hub_interface) == before
