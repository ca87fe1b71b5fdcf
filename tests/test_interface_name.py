"""Nothing becomes an argument of `ip` and `wg` unless it can be an interface's name."""

from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.adapters.wireguard import link
from backend.adapters.wireguard.wg import WgInterface
from backend.errors import ConfigFileError, StartRefusedError
from backend.models.wireguard.interface import InterfaceName
from backend.models.wireguard.keys import WireGuardPrivateKey
from backend.services.wireguard_config_manager import WireGuardConfigManager
from backend.settings import load_settings

GOOD = ["wg0", "a", "0", "_", "=wg", "+", "wg-0.eth=1_+", "fifteen-letters", "All", "wg-", "wg."]
BAD = [
    "",
    "-x",
    "--help",
    ".",
    "..",
    ".wg0",
    "sixteen-letters-",
    "wg 0",
    "wg0\n",
    "\nwg0",
    "wg/0",
    "wg:0",
    "wg%d",
    "wg\N{ARABIC-INDIC DIGIT ONE}",
    "wg\0",
    "all",
    "default",
    "help",
    "interfaces",
]


@pytest.mark.parametrize("name", GOOD)
def test_names_are_taken(name: str) -> None:
    assert InterfaceName.parse(name) == name


@pytest.mark.parametrize("name", BAD)
def test_invalid_interface_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"characters A-Z a-z 0-9|words of `wg`"):
        InterfaceName.parse(name)
    with pytest.raises(ValueError, match=r"characters A-Z a-z 0-9|words of `wg`"):
        WgInterface(name, IPv4Address("10.0.0.1"))


@given(st.text(alphabet="aZ09_=+.-/% \n\0\u0661", max_size=17))
def test_accepted_interface_name_is_harmless(text: str) -> None:
    try:
        name = InterfaceName.parse(text)
    except ValueError:
        return
    assert name == text
    assert 1 <= len(name.encode("ascii")) <= 15
    assert name[0] not in "-."
    assert not set(name) & set("/% \n\0")


@pytest.mark.parametrize("stem", ["-x", "all", "sixteen-letters-"])
def test_config_with_an_invalid_interface_name_has_no_interface(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stem: str
) -> None:
    path = tmp_path / f"{stem}.conf"
    path.write_text(f"[Interface]\nPrivateKey = {WireGuardPrivateKey.generate().reveal()}\n")
    path.chmod(0o600)
    manager = WireGuardConfigManager(path)
    manager.validate_config()
    with pytest.raises(ConfigFileError, match="Give the file another name"):
        _ = manager.interface
    with pytest.raises(ConfigFileError, match="Give the file another name"):
        link.up(path, IPv4Interface("10.0.0.1/24"))
    monkeypatch.setenv("WIREGUARD_CONFIG_PATH", str(path))
    with pytest.raises(StartRefusedError, match=r"must end in INTERFACE\.conf, and "):
        load_settings()
