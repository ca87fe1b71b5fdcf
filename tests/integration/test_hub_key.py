"""The hub's key when its config is lost, and when it is changed on purpose: with real interfaces."""

import subprocess
from ipaddress import IPv4Interface
from pathlib import Path

import pytest

from backend.adapters.wireguard import hub_key, link
from backend.adapters.wireguard.hub_key import Consent
from backend.errors import ConfigFileError, HubUpdateError
from backend.models.wireguard.keys import WireGuardKey, WireGuardPrivateKey
from backend.services.wireguard_config_manager import WireGuardConfigManager
from tests.harness.command_line import invoke
from tests.harness.patience import eventually
from tests.harness.peers import block
from tests.harness.requests import PROVISION, new_key, provision_body
from tests.harness.service import StartService
from tests.harness.three_places import settings_for
from tests.harness.wireguard import HubInterface, genkey

ADDRESS = IPv4Interface("10.0.0.1/24")


@pytest.fixture
def lost(hub_interface: HubInterface) -> HubInterface:
    """Return a hub with a live interface, whose config has been deleted."""
    hub_interface.config_path.unlink()
    return hub_interface


def init(hub: HubInterface, consent: Consent, recorded: int = 0) -> hub_key.Made | None:
    return hub_key.init(hub.config_path, ADDRESS, 51820, consent, lambda: recorded)


def stated(hub: HubInterface) -> WireGuardKey:
    return WireGuardKey.parse(hub.public_key)


def test_lost_config_is_made_with_the_key_of_the_interface_that_the_setting_names(
    lost: HubInterface,
) -> None:
    made = init(lost, Consent(stated(lost)), recorded=3)
    assert made == hub_key.Made(stated(lost))
    assert lost.config_path.stat().st_mode & 0o777 == 0o600
    assert lost.config_path.read_text() == (
        f"[Interface]\nPrivateKey = {lost.private_key}\nAddress = 10.0.0.1/24\n"
        f"ListenPort = {lost.listen_port}\n"
    )
    assert not link.up(lost.config_path, ADDRESS).created


def test_lost_config_gets_back_what_the_interface_has(lost: HubInterface) -> None:
    peer = new_key()
    lost.configure(
        f"{lost.interface_section}FwMark = 0xca6c\n[Peer]\nPublicKey = {peer}\nAllowedIPs = 10.0.0.9/32\n"
    )
    for address in ("10.0.0.1/24", "10.7.0.1/16", "fd00::1/64"):
        subprocess.run(["ip", "address", "add", address, "dev", lost.name], check=True)
    made = init(lost, Consent(recover=True))
    noted = lost.config_path.with_name(f"{lost.name}.conf.interface")
    assert made == hub_key.Made(stated(lost), noted)
    lines = lost.config_path.read_text().splitlines()
    assert set(lines[2:]) == {
        "Address = 10.0.0.1/24",
        "Address = 10.7.0.1/16",
        "Address = fd00::1/64",
        f"ListenPort = {lost.listen_port}",
        "FwMark = 0xca6c",
    }
    assert f"PublicKey = {peer}" in noted.read_text()
    assert noted.stat().st_mode & 0o777 == 0o600
    WireGuardConfigManager(lost.config_path).refresh()


def test_interface_that_may_be_another_programs_is_not_taken_over(lost: HubInterface) -> None:
    with pytest.raises(HubUpdateError, match="hub init --recover") as caught:
        init(lost, Consent())
    assert f"exists and has the key {lost.public_key}" in str(caught.value)
    another = WireGuardPrivateKey.generate().public_key()
    with pytest.raises(HubUpdateError, match="names another one, so it isn't this hub's"):
        init(lost, Consent(another, recover=True))
    assert not lost.config_path.exists()
    assert lost.show("public-key") == lost.public_key


def test_no_new_key_while_nodes_know_the_old_one(lost: HubInterface) -> None:
    lost.down()
    with pytest.raises(HubUpdateError, match=r"the records hold 3 peer\(s\).*from a backup.*--new-key"):
        init(lost, Consent(), recorded=3)
    with pytest.raises(HubUpdateError, match=r"WIREGUARD_HUB_PUBLIC_KEY says.*from a backup"):
        init(lost, Consent(stated(lost)))
    assert not lost.config_path.exists()
    assert init(lost, Consent(new_key=True), recorded=3) == hub_key.Made()
    assert lost.private_key not in lost.config_path.read_text()


def test_hub_that_is_a_file_only_takes_no_interfaces_key(lost: HubInterface) -> None:
    """WIREGUARD_RELOAD=off: an interface of that name is another program's."""
    assert init(lost, Consent(has_interface=False)) == hub_key.Made()
    assert lost.private_key not in lost.config_path.read_text()


def test_interface_without_a_key_has_none_to_lose(lost: HubInterface) -> None:
    lost.down()
    lost.up()
    assert init(lost, Consent()) == hub_key.Made()
    assert f"ListenPort = {51820}\n" in lost.config_path.read_text()


def test_interface_that_is_not_wireguard_has_no_key_to_recover(needs_wireguard: None, tmp_path: Path) -> None:
    subprocess.run(["ip", "tuntap", "add", "dev", "wgnokey", "mode", "tun"], check=True)
    try:
        with pytest.raises(HubUpdateError, match=r"wgnokey is no WireGuard interface.*another name"):
            hub_key.init(tmp_path / "wgnokey.conf", ADDRESS, 1, Consent(recover=True))
    finally:
        subprocess.run(["ip", "link", "delete", "dev", "wgnokey"], check=True)


def command(hub: HubInterface, directory: Path, *words: str, **over: object) -> tuple[int, str, str]:
    settings = settings_for(hub, directory) | over
    done = invoke("hub", *words, directory=directory, settings=settings)
    for secret in (hub.private_key, "Traceback"):
        assert secret not in done.stdout + done.stderr
    return done.returncode, done.stdout, done.stderr


def test_config_deleted_beside_a_running_service_comes_back_with_its_key(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path))
    service.client.post(PROVISION, json=provision_body("node-1")).raise_for_status()
    peers = hub_interface.peers()
    hub_interface.config_path.unlink()
    detail = service.client.get("/readyz").json()["detail"]
    assert "from a backup" in detail
    assert "takes the key from the interface" in detail
    status, _, said = command(hub_interface, tmp_path, "init")
    assert (status, "hub init --recover" in said) == (1, True)
    status, said, _ = command(hub_interface, tmp_path, "init", "--recover")
    assert (status, f"with the key of interface {hub_interface.name}" in said) == (0, True)
    assert f"{hub_interface.config_path}.interface has what the interface had" in said
    eventually(lambda: service.client.post(PROVISION, json=provision_body("node-2")).status_code == 200)
    assert hub_interface.show("private-key") == hub_interface.private_key
    assert set(peers) < set(hub_interface.peers())


def test_new_key_is_refused_by_the_records_of_the_command_line(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path))
    service.client.post(PROVISION, json=provision_body("node-1")).raise_for_status()
    service.terminate()
    hub_interface.down()
    hub_interface.config_path.unlink()
    status, _, said = command(hub_interface, tmp_path, "init")
    assert (status, "the records hold 1 peer(s) that know this hub's key" in said) == (1, True)
    status, said, _ = command(hub_interface, tmp_path, "init", "--new-key")
    assert (status, "with a new key" in said) == (0, True)


def test_two_options_for_the_key_are_refused(hub_interface: HubInterface, tmp_path: Path) -> None:
    status, _, said = command(hub_interface, tmp_path, "init", "--recover", "--new-key")
    assert (status, "leave one of them out" in said) == (1, True)


def replace_private_key(hub: HubInterface) -> tuple[str, str]:
    private, public = genkey()
    hub.config_path.write_text(hub.config_path.read_text().replace(hub.private_key, private))
    return private, public


def test_file_with_another_key_than_the_setting_is_refused_at_every_read(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    """A wrong PrivateKey that gets into the file by mistake would cut off every node within a second."""
    settings = settings_for(hub_interface, tmp_path) | {"WIREGUARD_HUB_PUBLIC_KEY": hub_interface.public_key}
    service = start_service(settings)
    before = hub_interface.config_path.read_text()
    replace_private_key(hub_interface)
    for answer in (
        service.client.get("/readyz"),
        service.client.post(PROVISION, json=provision_body("node-1")),
    ):
        assert answer.status_code == 503
        assert "WIREGUARD_HUB_PUBLIC_KEY names another key" in answer.json()["detail"]
        assert f"`wg show {hub_interface.name} private-key`" in answer.json()["detail"]
    assert hub_interface.show("private-key") == hub_interface.private_key
    hub_interface.config_path.write_text(before)
    eventually(lambda: service.client.post(PROVISION, json=provision_body("node-1")).status_code == 200)
    assert hub_interface.show("private-key") == hub_interface.private_key


def test_announced_change_of_the_key_shows_both_and_reaches_the_interface(
    hub_interface: HubInterface, tmp_path: Path
) -> None:
    private, public = replace_private_key(hub_interface)
    status, _, said = command(hub_interface, tmp_path, "up", "--replace-key")
    assert (status, "set WIREGUARD_HUB_PUBLIC_KEY to that first" in said) == (1, True)
    assert hub_interface.show("private-key") == hub_interface.private_key
    key = {"WIREGUARD_HUB_PUBLIC_KEY": public}
    status, said, errors = command(hub_interface, tmp_path, "up", **key)
    assert (status, "exists and isn't this hub's" in errors) == (1, True)
    status, said, _ = command(hub_interface, tmp_path, "up", "--replace-key", **key)
    assert status == 0
    assert f"had the key {hub_interface.public_key}\n" in said
    assert f"has the key {public}\n" in said
    assert private not in said
    assert hub_interface.show("private-key") == private
    status, said, _ = command(hub_interface, tmp_path, "up", "--replace-key", **key)
    assert (status, said) == (0, f"interface {hub_interface.name} was up already\n")


def test_key_is_not_given_to_an_interface_with_none_of_the_hubs_peers(hub_interface: HubInterface) -> None:
    _, public = replace_private_key(hub_interface)
    theirs, ours = new_key(), WireGuardKey.parse(new_key())
    hub_interface.configure(f"{hub_interface.interface_section}[Peer]\nPublicKey = {theirs}\n")
    manager = WireGuardConfigManager(hub_interface.config_path)
    manager.write([block("node-1", ours, "10.0.0.2")])
    with pytest.raises(HubUpdateError, match=r"none of those in .* isn't this hub's"):
        hub_key.replace(hub_interface.config_path, WireGuardKey.parse(public))
    assert hub_interface.show("private-key") == hub_interface.private_key
    hub_interface.host.run(["wg", "set", hub_interface.name, "peer", ours])
    replaced = hub_key.replace(hub_interface.config_path, WireGuardKey.parse(public))
    assert replaced == hub_key.Replaced(stated(hub_interface), WireGuardKey.parse(public))


def test_key_change_without_an_interface_changes_nothing(hub_interface: HubInterface) -> None:
    hub_interface.down()
    assert hub_key.replace(hub_interface.config_path, stated(hub_interface)) is None


@pytest.mark.parametrize("line", ["", "PrivateKey =\n", "PrivateKey = x\n", f"PrivateKey = {'A' * 43}=\n"])
def test_lost_private_key_is_never_answered_with_how_to_make_one(tmp_path: Path, line: str) -> None:
    path = tmp_path / "wg3.conf"
    path.touch(mode=0o600)
    path.write_text(f"[Interface]\n{line}ListenPort = 1\n")
    with pytest.raises(ConfigFileError) as caught:
        WireGuardConfigManager(path).refresh()
    assert "`wg show wg3 private-key` has it" in str(caught.value)
    assert "genkey" not in str(caught.value)


def test_interface_without_a_key_is_given_the_configs(hub_interface: HubInterface) -> None:
    hub_interface.down()
    hub_interface.up()
    assert not link.up(hub_interface.config_path, ADDRESS).created
    assert hub_interface.show("public-key") == hub_interface.public_key
    assert hub_interface.show("listen-port") == str(hub_interface.listen_port)


def test_service_that_runs_takes_an_announced_key_up(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path))
    service.client.post(PROVISION, json=provision_body("node-1")).raise_for_status()
    peers = hub_interface.peers()
    private, public = genkey()
    path = hub_interface.config_path
    path.write_text(path.read_text().replace(hub_interface.private_key, private))
    eventually(lambda: "another private key" in service.client.get("/readyz").text)
    assert hub_interface.show("public-key") == hub_interface.public_key
    refused = service.client.post(PROVISION, json=provision_body("node-2"))
    assert refused.status_code == 503
    assert "hub up --replace-key" in refused.json()["detail"]
    service.settings["WIREGUARD_HUB_PUBLIC_KEY"] = public
    assert service.command("hub", "up", "--replace-key").returncode == 0
    eventually(lambda: service.client.get("/readyz").status_code == 200)
    answer = service.client.post(PROVISION, json=provision_body("node-2")).json()
    assert answer["config"]["hub_public_key"] == public
    assert peers.items() <= hub_interface.peers().items()
