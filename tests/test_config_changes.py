"""Peers with networks or an endpoint of their own, which a Python program adds to the hub's file."""

import subprocess
from pathlib import Path
from typing import Final

import pytest

from backend.composition import running_service
from backend.errors import DuplicatePeerError
from backend.models.setting_values import ReloadMode
from backend.models.wireguard.keys import WireGuardPrivateKey
from backend.models.wireguard.provisioning import ProvisioningRequest
from backend.services.hub.config_text import parse
from backend.services.wireguard_config_manager import WireGuardConfigManager
from backend.settings import Settings
from tests.harness.requests import other_spelling, provision_body
from tests.harness.requirements import require

_KEYS: Final = tuple(WireGuardPrivateKey(bytes([number + 1] * 32)).public_key() for number in range(4))
_HUB: Final = (
    "[Interface]\nPrivateKey = iB4Y8yRkAyI8mdFBYCpOUXLTn1kAbGbyGmtXGvRZ/F4=\n\n"
    f"[Peer] # the operator's\nPublicKey = {_KEYS[3]}\nAllowedIPs = 172.16.0.0/24"
)
_SECTION: Final = (
    f"\n# wireguard-provisioning: added peer manual\n[Peer]\nPublicKey = {_KEYS[0]}\n"
    "AllowedIPs = 10.0.0.2/32, 192.168.7.0/24\nEndpoint = site.example.com:51820\n"
    "PersistentKeepalive = 25\n"
)
_NETWORKS: Final = ["10.0.0.2/32", "192.168.7.0/24"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "wg0.conf"
    path.touch(mode=0o600)
    path.write_text(_HUB)
    return path


@pytest.fixture
def manager(path: Path) -> WireGuardConfigManager:
    return WireGuardConfigManager(path)


def add_site(manager: WireGuardConfigManager) -> None:
    manager.add_peer(_KEYS[0], _NETWORKS, endpoint="site.example.com:51820", persistent_keepalive=25)


def test_peer_with_networks_and_an_endpoint_stands_in_the_file_as_given(
    path: Path, manager: WireGuardConfigManager
) -> None:
    add_site(manager)
    assert path.read_text() == _HUB + _SECTION
    assert manager.validate_config() is True
    assert [list(map(str, peer.allowed_ips)) for peer in manager.parsed.operator_peers] == [
        ["172.16.0.0/24"],
        _NETWORKS,
    ]
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("networks", "endpoint"),
    [
        pytest.param(["10.0.0.2", "fd00::2"], None, id="both families"),
        pytest.param(["10.0.0.0/24"], None, id="a network"),
        pytest.param(["fd00::ffff:10.0.0.2/128"], "[2001:db8::1]:51820", id="IPv6"),
        pytest.param(["10.0.0.2/32"], "192.0.2.1:1", id="an endpoint"),
        pytest.param(["10.0.0.9/24", "10.0.0.0/24"], None, id="host bits"),
    ],
)
def test_wg_takes_what_is_written(
    path: Path, manager: WireGuardConfigManager, networks: list[str], endpoint: str | None
) -> None:
    require("wg")
    manager.add_peer(_KEYS[1], ["10.0.0.7/32"])
    manager.add_peer(_KEYS[0], networks, endpoint)
    stripped = parse(path.read_bytes()).stripped
    answer = subprocess.run(
        ["wg", "setconf", "nosuchif", "/dev/stdin"], input=stripped, capture_output=True, check=False
    )
    # It parses before it looks for the interface, which a kernel without the module says in its own way.
    assert b"Unable to modify interface" in answer.stderr
    assert manager.remove_peer(_KEYS[0])
    assert manager.remove_peer(_KEYS[1])
    assert path.read_text() == _HUB


def test_adding_again_replaces_the_peer_whatever_its_form(
    path: Path, manager: WireGuardConfigManager
) -> None:
    manager.add_peer(_KEYS[0], ["10.0.0.2/32"])
    manager.add_peer(_KEYS[1], ["10.0.0.3/32"])
    add_site(manager)
    assert [peer.public_key for peer in manager.parsed.blocks] == [_KEYS[1]]
    add_site(manager)
    text = path.read_text()
    assert text.startswith(_HUB + _SECTION)
    assert text.count(_KEYS[0]) == 1
    manager.add_peer(_KEYS[0], ["10.0.0.2/32"])
    assert [peer.public_key for peer in manager.parsed.blocks] == [_KEYS[1], _KEYS[0]]
    assert [peer.public_key for peer in manager.parsed.operator_peers] == [_KEYS[3]]


def test_networks_of_another_peer_are_not_taken_away_from_it(
    path: Path, manager: WireGuardConfigManager
) -> None:
    add_site(manager)
    manager.add_peer(_KEYS[1], ["10.0.0.3/32"])
    before = path.read_bytes()
    for key, networks in (
        (_KEYS[2], ["10.0.0.9/32", "192.168.7.0/24"]),
        (_KEYS[2], ["10.0.0.3/32", "10.1.0.0/16"]),
        (_KEYS[2], ["172.16.0.0/24"]),
        (_KEYS[3], ["10.0.0.9/32", "10.0.0.10/32"]),
    ):
        with pytest.raises(ValueError, match=r"another peer|an operator's"):
            manager.add_peer(key, networks)
    assert path.read_bytes() == before
    assert not manager.remove_peer(_KEYS[3])


def test_section_that_an_operator_has_added_to_is_not_taken_apart(
    path: Path, manager: WireGuardConfigManager
) -> None:
    add_site(manager)
    with path.open("a") as file:
        file.write(f"\n# theirs\nPresharedKey = {_KEYS[2]}\n")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="by hand"):
        manager.remove_peer(_KEYS[0])
    assert path.read_bytes() == before


@pytest.mark.parametrize("behind", ["# a note\n", "[Peer]\nPublicKey = " + _KEYS[2] + "\n", "\n\n# end"])
def test_what_an_operator_wrote_behind_it_stays(
    path: Path, manager: WireGuardConfigManager, behind: str
) -> None:
    add_site(manager)
    manager.add_peer(_KEYS[1], ["10.0.0.3/32"])
    path.write_text(_HUB + _SECTION + behind)
    others = [peer for peer in parse(path.read_bytes()).operator_peers if peer.public_key != _KEYS[0]]
    assert manager.remove_peer(_KEYS[0])
    assert path.read_text().startswith(_HUB)
    assert path.read_text().endswith(behind)
    assert list(manager.parsed.operator_peers) == others


@pytest.fixture
def settings(path: Path, tmp_path: Path) -> Settings:
    return Settings(
        wireguard_config_path=path,
        wireguard_reload=ReloadMode.OFF,
        state_directory=tmp_path / "state",
        enable_dbos=False,
    )


def test_service_keeps_such_a_peer_and_hands_out_nothing_of_it(path: Path, settings: Settings) -> None:
    manager = WireGuardConfigManager(path)
    add_site(manager)
    with running_service(settings) as service:
        request = ProvisioningRequest.model_validate(provision_body("node-1"))
        assert str(service.provision_peer(request, 30).assigned_ip) == "10.0.0.3"
        taken = ProvisioningRequest.model_validate(provision_body("node-2", _KEYS[0]))
        with pytest.raises(DuplicatePeerError):
            service.provision_peer(taken, 30)
        assert path.read_text().startswith(_HUB + _SECTION)
        assert manager.remove_peer(_KEYS[0])
        request = ProvisioningRequest.model_validate(provision_body("node-3"))
        service.provision_peer(request, 30)
        assert list(service.list_provisioned_peers()) == ["node-1", "node-3"]
        assert _KEYS[0] not in path.read_text()


def test_key_of_the_operators_peer_is_refused_in_its_canonical_spelling_too(
    path: Path, manager: WireGuardConfigManager
) -> None:
    path.write_text(_HUB.replace(_KEYS[3], other_spelling(_KEYS[3])))
    before = path.read_text()
    for key, said in (
        (_KEYS[3], "an operator's peer has that key"),
        (other_spelling(_KEYS[0]), "second spelling"),
    ):
        with pytest.raises(ValueError, match=said):
            manager.add_peer(key, ["10.0.0.7/32"])
    assert path.read_text() == before
