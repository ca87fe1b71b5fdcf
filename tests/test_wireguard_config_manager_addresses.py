"""The Address lines of the hub's file, as wg-quick(8) reads them."""

from ipaddress import IPv4Address, ip_interface
from pathlib import Path

import pytest

from backend.errors import ConfigFileError
from backend.services.hub.config_text import parse
from backend.services.wireguard_config_manager import require_address
from tests.harness.command_line import backend, hub_settings, invoke

KEY = "PrivateKey = iB4Y8yRkAyI8mdFBYCpOUXLTn1kAbGbyGmtXGvRZ/F4=\n"
SECTION = f"\n[Interface]\n{KEY}".encode()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"[Interface]\nAddress = 10.0.0.1/24\n", ["10.0.0.1/24"]),
        (b"[Interface]\naddress=10.0.0.1/24,fd00::1/64\nADDRESS = 10.1.0.1 # x\r\n", None),
        (b" [interface] # hub\r\n\tAddress\t=  10.0.0.1/24 , fd00::1/64  10.1.0.1\n", None),
        (b"[Interface]\n#Address = 10.9.0.1/24\nAddress = 10.0.0.1/24", ["10.0.0.1/24"]),
        (b"[Interface]\nAddress = nonsense, 10.0.0.1/99, \xe9, 10.0.0.1/24\n", ["10.0.0.1/24"]),
        (b"[Interface]\nAddress =\n", []),
        (b"", []),
    ],
)
def test_addresses_are_read_as_wg_quick_reads_them(text: bytes, expected: list[str] | None) -> None:
    found = parse(text + SECTION).addresses
    everything = ["10.0.0.1/24", "fd00::1/64", "10.1.0.1/32"]
    assert found == tuple(map(ip_interface, everything if expected is None else expected))


@pytest.mark.parametrize(
    "address", ["10.0.0.1/24", "10.0.0.9/24", "10.0.0.1", "fd00::1/64, 10.0.0.1/8", "10.8.0.1/24,10.0.0.1/32"]
)
def test_address_that_holds_the_hubs_is_accepted(address: str) -> None:
    text = f"[Interface]\nAddress = {address}".encode()
    require_address(Path("wg0.conf"), parse(text + SECTION), IPv4Address("10.0.0.1"))


def test_file_without_an_address_has_nothing_to_compare() -> None:
    require_address(Path("wg0.conf"), parse(SECTION), IPv4Address("10.0.0.1"))


@pytest.mark.parametrize(
    ("address", "remedy"),
    [
        (
            "10.8.0.1/24",
            "Set WIREGUARD_IP_POOL=10.8.0.0/24 and WIREGUARD_HUB_IP=10.8.0.1, or change Address in the file",
        ),
        ("fd00::1/64", "Change Address in the file to"),
        ("10.0.0.2/32", "Change Address in the file to"),
    ],
)
def test_pool_that_no_route_leads_to_is_refused(address: str, remedy: str) -> None:
    text = f"[Interface]\nAddress = {address}".encode()
    with pytest.raises(ConfigFileError) as caught:
        require_address(Path("wg0.conf"), parse(text + SECTION), IPv4Address("10.0.0.1"))
    assert f"wg0.conf: Address = {address} doesn't hold WIREGUARD_HUB_IP=10.0.0.1" in str(caught.value)
    assert f". {remedy}" in str(caught.value)


@pytest.mark.parametrize("command", [["serve", "--port", "0"], ["hub", "up"], ["hub", "show"]])
def test_pool_that_does_not_fit_the_file_is_said_before_any_address_is_handed_out(
    tmp_path: Path, command: list[str]
) -> None:
    path = tmp_path / "wg0.conf"
    path.touch(mode=0o600)
    path.write_text(f"[Interface]\n{KEY}Address = 10.8.0.1/24\n")
    run = backend if command[0] == "serve" else invoke
    done = run(*command, directory=tmp_path, settings=hub_settings(tmp_path))
    assert done.returncode == (0 if command == ["hub", "show"] else 1)
    assert f"{path}: Address = 10.8.0.1/24 doesn't hold WIREGUARD_HUB_IP=10.0.0.1" in done.stderr
    assert "Set WIREGUARD_IP_POOL=10.8.0.0/24 and WIREGUARD_HUB_IP=10.8.0.1" in done.stderr
    assert "Traceback" not in done.stderr
