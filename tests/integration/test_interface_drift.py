"""An interface that differs from the config is corrected, unless it belongs to another program."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.harness.patience import eventually
from tests.harness.requests import AUDIT, PEERS, PROVISION, new_key, provision_body
from tests.harness.service import ServiceProcess, StartService
from tests.harness.three_places import assert_in_step, settings_for
from tests.harness.wireguard import HubInterface, genkey


def wg(hub: HubInterface, *arguments: str, text: str = "") -> None:
    hub.host.run(["wg", "set", hub.name, *arguments], text=text)


def readiness(service: ServiceProcess) -> tuple[int, str]:
    answer = service.client.get("/readyz")
    return answer.status_code, answer.text


@pytest.fixture
def service(hub_interface: HubInterface, start_service: StartService, tmp_path: Path) -> ServiceProcess:
    """Start a service whose config has two operator's peers and one provisioned peer."""
    first, second = new_key(), new_key()
    with hub_interface.config_path.open("a") as file:
        file.write(
            f"\n[Peer]\nPublicKey = {first}\nAllowedIPs = 10.0.0.200/32, fd00::200/128\n"
            f"PersistentKeepalive = 21\n\n[Peer]\nPublicKey = {second}\nAllowedIPs = 192.168.7.0/24\n"
            f"PresharedKey = {genkey()[0]}\n"
        )
    service = start_service(settings_for(hub_interface, tmp_path))
    service.client.post(PROVISION, json=provision_body("node-0")).raise_for_status()
    return service


@contextmanager
def changes_without_a_pause(service: ServiceProcess) -> Iterator[None]:
    """Add and remove a peer, again and again, so that the service never is idle."""
    stop = threading.Event()

    def work() -> None:
        with httpx.Client(base_url=service.url, auth=service.local_admin, timeout=30) as client:
            while not stop.is_set():
                client.post(PROVISION, json=provision_body("busy")).raise_for_status()
                client.delete(f"{PEERS}/busy").raise_for_status()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_manual_changes_of_the_interface_are_corrected(
    service: ServiceProcess, hub_interface: HubInterface, tmp_path: Path
) -> None:
    before = hub_interface.show("dump")
    # The interface lists its peers in any order.
    holder = {address: key for key, allowed in hub_interface.peers().items() for address in allowed}
    first, second, ours = (holder[at] for at in ("10.0.0.200/32", "192.168.7.0/24", "10.0.0.2/32"))
    path = tmp_path / "psk"
    path.write_text(genkey()[0])
    for change in (
        ("peer", first, "remove"),
        ("peer", first, "allowed-ips", "10.0.0.201/32"),
        ("peer", first, "persistent-keepalive", "7"),
        ("peer", first, "preshared-key", str(path)),
        ("peer", second, "preshared-key", str(path)),
        ("peer", second, "preshared-key", "/dev/null"),
        ("peer", ours, "remove"),
        ("peer", ours, "preshared-key", str(path)),
        ("peer", ours, "persistent-keepalive", "9"),
        ("peer", ours, "allowed-ips", "10.0.0.2/32,10.0.0.99/32"),
        ("peer", new_key(), "allowed-ips", "10.0.0.2/32"),
        ("listen-port", "39999"),
        ("fwmark", "77"),
    ):
        seen = service.log.count("interface_drifted")
        wg(hub_interface, *change)
        # A change of another peer has the interface looked at soon.
        service.client.post(PROVISION, json=provision_body("other")).raise_for_status()
        service.client.delete(f"{PEERS}/other").raise_for_status()
        eventually(lambda: service.log.count("interface_drifted") > seen)  # noqa: B023 - called at once
        eventually(lambda: sorted(hub_interface.show("dump").splitlines()) == sorted(before.splitlines()))
        # Before the next change the service has looked at what it did.
        eventually(lambda: readiness(service)[0] == 200)
    assert "drift_found" in service.client.get(AUDIT).text
    eventually(lambda: readiness(service)[0] == 200)


def test_a_peer_removed_by_hand_comes_back_while_changes_never_pause(
    service: ServiceProcess, hub_interface: HubInterface
) -> None:
    key = service.client.get(f"{PEERS}/node-0").json()
    ours = next(key for key, allowed in hub_interface.peers().items() if allowed == {"10.0.0.2/32"})
    with changes_without_a_pause(service):
        wg(hub_interface, "peer", ours, "remove")
        eventually(lambda: hub_interface.peers().get(ours) == {f"{key['assigned_ip']}/32"})
    assert "Traceback" not in service.log


def test_a_key_that_was_taken_from_the_interface_stops_every_answer_of_success(
    service: ServiceProcess, hub_interface: HubInterface
) -> None:
    other_private, other_public = genkey()
    wg(hub_interface, "private-key", "/dev/stdin", text=other_private)
    eventually(lambda: readiness(service)[0] == 503)
    problem = readiness(service)[1]
    assert other_public in problem
    assert hub_interface.public_key in problem
    before = sorted(hub_interface.show("dump").splitlines())
    refused = service.client.post(PROVISION, json=provision_body("late"))
    assert refused.status_code == 503
    assert "another private key" in refused.json()["detail"]
    assert sorted(hub_interface.show("dump").splitlines()) == before
    assert hub_interface.private_key not in service.log
    wg(hub_interface, "private-key", "/dev/stdin", text=hub_interface.private_key)
    eventually(lambda: readiness(service)[0] == 200)
    service.client.post(PROVISION, json=provision_body("late")).raise_for_status()


def test_an_interface_of_another_vpn_is_never_written_to(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    other_private, other_public = genkey()
    hub_interface.configure(
        f"[Interface]\nPrivateKey = {other_private}\nListenPort = 39998\nFwMark = 3\n"
        + "".join(f"[Peer]\nPublicKey = {new_key()}\nAllowedIPs = 10.9.0.{n}/32\n" for n in range(2, 5))
    )
    before = sorted(hub_interface.show("dump").splitlines())
    service = start_service(settings_for(hub_interface, tmp_path), ready="/healthz")
    eventually(lambda: "another private key" in readiness(service)[1])
    assert service.client.post(PROVISION, json=provision_body("node-0")).status_code == 503
    service.terminate()
    assert sorted(hub_interface.show("dump").splitlines()) == before
    assert hub_interface.show("public-key") == other_public


def test_an_interface_that_is_new_gets_the_configs_key(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    hub_interface.down()
    hub_interface.up()
    hub_interface.give_address()
    service = start_service(settings_for(hub_interface, tmp_path))
    assert hub_interface.show("public-key") == hub_interface.public_key
    service.client.post(PROVISION, json=provision_body("node-0")).raise_for_status()
    assert_in_step(service, hub_interface)


def test_two_services_with_configs_apart_do_not_fight_over_one_interface(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    first = start_service(settings_for(hub_interface, tmp_path))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    copy = elsewhere / hub_interface.config_path.name
    copy.write_text(hub_interface.config_path.read_text())
    copy.chmod(0o600)
    settings = {**settings_for(hub_interface, elsewhere), "WIREGUARD_CONFIG_PATH": copy}
    second = start_service(settings, ready=None)
    assert second.wait_exit() == 1
    assert f"interface {hub_interface.name} is already managed by another process" in second.log
    # No dead one leaves the lock behind.
    os.kill(first.pid, signal.SIGKILL)
    first.wait_exit()
    second.ready = "/readyz"
    second.start()


def test_a_link_that_is_down_or_without_the_hubs_address_is_a_reason_not_to_be_ready(
    service: ServiceProcess, hub_interface: HubInterface
) -> None:
    ip = ["ip", "address", "del", "10.0.0.1/32", "dev", hub_interface.name]
    hub_interface.host.run(ip)
    assert "doesn't have the hub's address 10.0.0.1" in readiness(service)[1]
    hub_interface.host.run([*ip[:2], "add", *ip[3:]])
    assert readiness(service)[0] == 200
    hub_interface.host.run(["ip", "link", "set", "down", "dev", hub_interface.name])
    assert f"interface {hub_interface.name} is down" in readiness(service)[1]
    hub_interface.host.run(["ip", "link", "set", "up", "dev", hub_interface.name])
    eventually(lambda: readiness(service)[0] == 200)
