"""Records, file and interface: what each of them says, and that they say the same."""

import re
import subprocess
from pathlib import Path
from typing import Any, Final

from tests.harness.requests import PEERS
from tests.harness.service import ServiceProcess
from tests.harness.wireguard import HubInterface

_BLOCK: Final = re.compile(
    r"\n# wireguard-provisioning: managed peer (\S+)\n\[Peer\]\nPublicKey = (\S+)\nAllowedIPs = (\S+)/32\n"
)


def settings_for(hub: HubInterface, directory: Path, **over: object) -> dict[str, object]:
    """Return the settings of a service beside this hub, with its state in `directory`."""
    return {
        "WIREGUARD_CONFIG_PATH": hub.config_path,
        "WIREGUARD_HUB_ENDPOINT": "hub.example.com:51820",
        "STATE_DIRECTORY": directory / "state",
        # Tests fail to authenticate more often than is allowed to one address, and share one.
        "WIREGUARD_RATE_LIMIT_FAILED_AUTHENTICATION": "1000000/minute",
        **over,
    }


def listed(service: ServiceProcess) -> dict[str, dict[str, Any]]:
    """Return what GET /peers answers."""
    response = service.client.get(PEERS)
    response.raise_for_status()
    peers: dict[str, dict[str, Any]] = response.json()
    return peers


def in_file(path: Path) -> dict[str, tuple[str, str]]:
    """Return our peers in the file: node -> key, address."""
    return {node: (key, address) for node, key, address in _BLOCK.findall(path.read_text())}


def without_ours(text: str) -> str:
    """Return a file's text without our own blocks."""
    return _BLOCK.sub("", text)


def assert_wg_parses(path: Path) -> None:
    """Have `wg` itself parse the file: it does so before it finds that there is no such interface."""
    stripped = subprocess.run(["wg-quick", "strip", path], capture_output=True, check=True).stdout
    done = subprocess.run(
        ["wg", "setconf", "nosuchif", "/dev/stdin"], input=stripped, capture_output=True, check=False
    )
    assert done.stderr.startswith(b"Unable to modify interface"), done.stderr


def assert_in_step(service: ServiceProcess, hub: HubInterface) -> dict[str, str]:
    """Check that the three say the same and nothing is held twice; return node -> address."""
    peers = listed(service)
    file = in_file(hub.config_path)
    addresses = {node: peer["assigned_ip"] for node, peer in peers.items()}
    assert {node: address for node, (_, address) in file.items()} == addresses
    assert len(set(addresses.values())) == len(addresses)
    keys = {key for key, _ in file.values()}
    assert len(keys) == len(file)
    assert {key: {f"{address}/32"} for key, address in file.values()} == hub.peers()
    assert_wg_parses(hub.config_path)
    assert hub.config_path.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in hub.config_path.parent.glob(".*.tmp")] == []
    return addresses
