"""README's script for a node, as it stands there, on a host of its own."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.command_line import ROOT
from tests.harness.hosts import CommandFailedError, Host, LocalHost, connect
from tests.harness.requirements import require
from tests.harness.service import ServiceProcess
from tests.harness.wireguard import HubInterface

NODE = "swarm-node-001"


def script() -> str:
    """Return the one block that makes a key."""
    blocks: list[str] = re.findall(
        r"^```bash\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    (found,) = (block for block in blocks if "wg genkey" in block)
    return found


class PastingNode:
    """A host whose /etc/wireguard and root's home are directories of the test's."""

    def __init__(self, host: Host, directory: Path, api: str) -> None:
        self.host = host
        self.etc = directory / "etc"
        self.home = directory / "home"
        for made in (self.etc, self.home):
            made.mkdir()
        host.run(["mount", "--bind", self.etc, "/etc/wireguard"])
        self._environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(self.home), "API": api}

    def paste(self) -> str:
        """Run the script as one does who pastes it; raise CommandFailedError."""
        return self.host.run(["bash", "-c", script()], env=self._environment, timeout=60).stdout


@pytest.fixture
def cable(needs_namespaces: None) -> Iterator[tuple[str, Host]]:
    with Host("readme-node") as host:
        here, _ = connect(LocalHost(), host, "203.0.113.0/24")
        yield str(here), host


def test_readmes_script_lets_a_node_in_and_can_be_pasted_again(
    cable: tuple[str, Host],
    hub_interface: HubInterface,
    start_service: Callable[..., ServiceProcess],
    tmp_path: Path,
) -> None:
    require("jq", "curl", "wg-quick", "ping")
    address, host = cable
    service = start_service(
        {
            "WIREGUARD_CONFIG_PATH": hub_interface.config_path,
            "WIREGUARD_HUB_ENDPOINT": f"{address}:{hub_interface.listen_port}",
        },
        address=address,
    )
    # As wg-quick and `hub up` do: what is for the pool goes into the tunnel.
    hub_interface.host.run(["ip", "route", "add", "10.0.0.0/24", "dev", hub_interface.name])
    node = PastingNode(host, tmp_path, service.url)
    made = service.command(
        "token", "create", "--node-id-pattern", NODE, "--output", str(node.home / "node.token")
    )
    assert made.returncode == 0, made.stderr

    assert "3 received" in node.paste()
    assert [path.name for path in node.etc.iterdir() if path.stat().st_mode & 0o077] == []
    peers = service.client.get("/api/v1/wireguard/peers").json()
    assert peers[NODE]["assigned_ip"] == "10.0.0.2"
    key = (node.etc / "swarm.key").read_text().strip()
    assert key not in json.dumps(peers)

    # The token is used up; the same request gets the same configuration.
    assert "3 received" in node.paste()
    assert json.loads((node.etc / "swarm.json").read_text())["detail"]["existing_config"] == peers[NODE]

    token_id = (node.home / "node.token").read_text().split("_")[1]
    assert service.client.delete(f"/api/v1/wireguard/peers/{NODE}").status_code == 200
    assert service.command("token", "revoke", token_id).returncode == 0
    with pytest.raises(CommandFailedError, match="send a valid credential"):
        node.paste()
