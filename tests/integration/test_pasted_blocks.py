"""The commands in README and docs work as they are pasted."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backend.adapters.records.peers import count_recorded_peers
from tests.harness.command_line import ROOT
from tests.harness.hosts import CommandFailedError, Host, LocalHost, connect
from tests.harness.patience import eventually
from tests.harness.requests import PEERS, PROVISION, provision_body
from tests.harness.requirements import require
from tests.harness.service import ServiceProcess
from tests.harness.wireguard import HubInterface

NODE = "swarm-node-001"


def block(document: str, mark: str) -> str:
    """Return the one block of a document in which `mark` stands."""
    text = (ROOT / document).read_text(encoding="utf-8")
    blocks: list[str] = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (found,) = (block for block in blocks if mark in block)
    return found


def elsewhere(text: str, **places: object) -> str:
    """Put other places where a block has the unit's or the first port."""
    usual = {"state": "/var/lib/wireguard-provisioning", "backups": "/var/backups", "api": "127.0.0.1:8000"}
    for name, place in places.items():
        assert usual[name] in text
        text = text.replace(usual[name], str(place))
    return text


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
        return self.host.run(
            ["bash", "-c", block("README.md", "wg genkey")], env=self._environment, timeout=60
        ).stdout


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
    peers = service.client.get(PEERS).json()
    assert peers[NODE]["assigned_ip"] == "10.0.0.2"
    key = (node.etc / "swarm.key").read_text().strip()
    assert key not in json.dumps(peers)

    health = elsewhere(
        block("docs/operations.md", "include_peers"), state=service.directory / "var", api=service.url
    )
    shown = rf'"status": "healthy".*\}}\n{NODE}\tonline\t10\.0\.0\.2/32\t[0-9]+\t[0-9.]+:[0-9]+\n'
    # A look may be a second old.
    eventually(
        lambda: re.search(shown, hub_interface.host.run(["bash", "-c", health]).stdout, re.DOTALL) is not None
    )

    # The token is used up; the same request gets the same configuration.
    assert "3 received" in node.paste()
    assert json.loads((node.etc / "swarm.json").read_text())["detail"]["existing_config"] == peers[NODE]

    token_id = (node.home / "node.token").read_text().split("_")[1]
    assert service.client.delete(f"{PEERS}/{NODE}").status_code == 200
    assert service.command("token", "revoke", token_id).returncode == 0
    with pytest.raises(CommandFailedError, match="send a valid credential"):
        node.paste()


def pasted(service: ServiceProcess, text: str) -> str:
    """Run the commands of a block beside a service that isn't the unit's; return what they print."""
    words = [line.split() for line in text.splitlines() if "wireguard-provisioning " in line]
    ran = [service.command(*line[2:]) for line in words if line[1] == "wireguard-provisioning"]
    assert [done.stderr for done in ran if done.returncode != 0] == []
    return "".join(done.stdout for done in ran)


def test_backup_by_the_docs_moves_a_hub_to_a_new_host(
    start_service: Callable[..., ServiceProcess], tmp_path: Path
) -> None:
    settings = {"WIREGUARD_RELOAD": "off", "WIREGUARD_CONFIG_PATH": "var/wg0.conf"}
    first = ServiceProcess(tmp_path, settings)
    made = first.command("hub", "init")
    assert made.returncode == 0, made.stderr
    with first:
        for number in range(4):
            first.client.post(PROVISION, json=provision_body(f"node-{number}")).raise_for_status()
        archive = pasted(first, block("docs/operations.md", "backup list")).splitlines()[0]
        shutil.copy(tmp_path / "var" / "provisioning.sqlite", tmp_path / "plain.sqlite")
        peers = first.client.get(PEERS).json()
    # Which is why there is a command.
    assert count_recorded_peers(f"sqlite:///{tmp_path}/plain.sqlite") < len(peers)
    (tmp_path / "second").mkdir()
    second = ServiceProcess(tmp_path / "second", settings)
    restoring = block("docs/operations.md", "backup restore ARCHIVE").replace("ARCHIVE", f"{archive} --yes")
    assert "comes:    node-3 " in pasted(second, restoring)
    with second as service:
        assert service.client.get(PEERS).json() == peers
