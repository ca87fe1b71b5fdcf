"""The operator's text in wg0.conf survives the work of a real service."""

from pathlib import Path

import pytest

from tests.harness.patience import eventually
from tests.harness.requests import PEERS, PROVISION, new_key, other_spelling, provision_body
from tests.harness.service import StartService
from tests.harness.three_places import in_file, listed, settings_for, without_ours
from tests.harness.wireguard import HubInterface


def hand_made(hub: HubInterface, first: str, second: str) -> str:
    return (
        "# the hub of the swarm -- ask Ann before you touch it\n\n"
        "  [Interface]   # ours\r\n"
        f"PrivateKey={hub.private_key}\n"
        f"\tListenPort   =   {hub.listen_port}\n"
        "Address = 10.0.0.1/24 , fd00::1/64\n"
        "PostUp = iptables -A FORWARD -i %i -j ACCEPT; echo 'a # b' > /dev/null\n"
        "PostDown=iptables -D FORWARD -i %i -j ACCEPT\n\n\n"
        "[peer]\n# the printer\n"
        f"publickey = {first}\n"
        "AllowedIPs=10.0.0.2/32,192.168.7.0/24\n"
        "\n[Peer]\n"
        f"PublicKey = {second} # the old router\n"
        "AllowedIPs = 10.0.0.6/31\n"
        "PersistentKeepalive = 25"
    )


def test_an_operators_file_survives_a_hundred_adds_and_deletes_byte_for_byte(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    first, second = new_key(), new_key()
    text = hand_made(hub_interface, first, second)
    path = hub_interface.config_path
    path.write_bytes(text.encode())
    service = start_service(settings_for(hub_interface, tmp_path))
    given = set()
    for number in range(100):
        answer = service.client.post(PROVISION, json=provision_body(f"node-{number}"))
        given.add(answer.json()["config"]["assigned_ip"])
        if number % 25 == 0:
            assert without_ours(path.read_bytes().decode()) == text
    assert len(given) == 100
    assert not given & {"10.0.0.1", "10.0.0.2", "10.0.0.6", "10.0.0.7"}
    live = hub_interface.peers()
    assert live[first] == {"10.0.0.2/32", "192.168.7.0/24"}
    assert live[second] == {"10.0.0.6/31"}
    assert len(live) == 102
    for number in range(100):
        assert service.client.delete(f"{PEERS}/node-{number}").status_code == 200
    assert path.read_bytes() == text.encode()
    assert set(hub_interface.peers()) == {first, second}


def test_an_edit_between_two_writes_is_kept_and_its_address_is_taken(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path))
    path = hub_interface.config_path
    service.client.post(PROVISION, json=provision_body("node-1")).raise_for_status()
    key = new_key()
    edit = f"\n[Peer]\n# added by hand\nPublicKey = {key}\nAllowedIPs = 10.0.0.3/32\n"
    with path.open("a") as file:
        file.write(edit)
    answer = service.client.post(PROVISION, json=provision_body("node-2"))
    if answer.status_code == 503:  # its address was reserved before the edit was noticed
        assert "10.0.0.3 was taken" in answer.json()["detail"]
        answer = service.client.post(PROVISION, json=provision_body("node-2"))
    assert answer.json()["config"]["assigned_ip"] == "10.0.0.4"
    assert edit in path.read_text()
    assert hub_interface.peers()[key] == {"10.0.0.3/32"}
    taken = service.client.post(PROVISION, json=provision_body("node-3", key))
    assert taken.status_code == 409
    assert taken.json()["detail"]["existing_config"] == {}


@pytest.mark.parametrize("shared", ["key", "address"])
def test_operators_peer_keeps_the_key_or_address_that_a_removed_peer_shared(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path, shared: str
) -> None:
    """`wg set peer KEY remove` alone would leave it without its address, or take it off the interface."""
    service = start_service(settings_for(hub_interface, tmp_path))
    key, other = new_key(), new_key()
    service.client.post(PROVISION, json=provision_body("node-1", key)).raise_for_status()
    theirs = key if shared == "key" else new_key()
    allowed = "10.0.0.2/32" if shared == "address" else "10.0.0.9/32"
    with hub_interface.config_path.open("a") as file:
        file.write(f"\n[Peer]\nPublicKey = {theirs}\nAllowedIPs = {allowed}\n")
        # Nothing else would show that the interface was told of the edit.
        file.write(f"\n[Peer]\nPublicKey = {other}\nAllowedIPs = 10.0.0.8/32\n")
    eventually(lambda: other in hub_interface.peers())
    assert hub_interface.peers()[key] == {"10.0.0.2/32"}
    service.client.delete(f"{PEERS}/node-1").raise_for_status()
    assert hub_interface.peers() == {theirs: {allowed}, other: {"10.0.0.8/32"}}


def test_managed_block_deleted_by_hand_returns_and_a_removed_peer_does_not(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path))
    path = hub_interface.config_path
    for number in range(3):
        service.client.post(PROVISION, json=provision_body(f"node-{number}")).raise_for_status()
    whole = path.read_text()
    path.write_text(without_ours(whole))
    service.client.delete(f"{PEERS}/node-1").raise_for_status()
    assert set(in_file(path)) == {"node-0", "node-2"} == set(listed(service))
    service.kill()
    path.write_text(whole)  # from a backup: the records know better
    service.start()
    eventually(lambda: set(in_file(path)) == {"node-0", "node-2"})
    assert len(hub_interface.peers()) == 2


def test_a_file_broken_by_hand_turns_readiness_red_and_is_left_as_it_is(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path))
    path = hub_interface.config_path
    service.client.post(PROVISION, json=provision_body("node-1")).raise_for_status()
    whole = path.read_text()
    broken = whole.replace("PrivateKey", "# PrivateKey")
    path.write_text(broken)
    for answer in (
        service.client.get("/readyz"),
        service.client.post(PROVISION, json=provision_body("node-2")),
        service.client.delete(f"{PEERS}/node-1"),
    ):
        assert answer.status_code == 503
        assert "PrivateKey" in answer.json()["detail"]
    assert path.read_text() == broken
    # `wg` would have answered 0 and wiped the key.
    assert hub_interface.show("private-key") == hub_interface.private_key
    assert hub_interface.private_key not in service.log
    path.write_text(whole)
    assert service.client.delete(f"{PEERS}/node-1").status_code == 200
    assert service.client.get("/readyz").status_code == 200


def test_operators_peer_with_a_noncanonical_key_stays_and_keeps_its_key(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    """`wg` and the interface take any 32 bytes, and show them as they are."""
    key = new_key()
    other = other_spelling(key)
    path = hub_interface.config_path
    text = f"{path.read_text()}\n[Peer]\nPublicKey = {other}\nAllowedIPs = 10.0.0.7/32\n"
    path.write_text(text)
    service = start_service(settings_for(hub_interface, tmp_path))
    assert hub_interface.peers() == {other: {"10.0.0.7/32"}}
    refused = service.client.post(PROVISION, json=provision_body("node-1", key))
    assert (refused.status_code, refused.json()["detail"]["existing_config"]) == (409, {})
    again = service.client.post(PROVISION, json=provision_body("node-1", other))
    assert again.status_code == 422
    assert "second spelling" in again.json()["detail"][0]["msg"]
    assert service.client.post(PROVISION, json=provision_body("node-2")).status_code == 200
    assert service.client.delete(f"{PEERS}/node-2").status_code == 200
    service.restart()
    assert hub_interface.peers() == {other: {"10.0.0.7/32"}}
    assert path.read_text() == text
    assert "interface_drifted" not in service.log
