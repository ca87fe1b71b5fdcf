"""Idle nodes are reachable again soon after the hub has lost its interface, or service and interface died.

An idle node sends nothing, so only the hub can begin: it needs the endpoint that the node had.
"""

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.harness.lost_records import names
from tests.harness.nodes import Node, NodeHost, hub_health, route_to_nodes, shown, silent
from tests.harness.patience import eventually
from tests.harness.requirements import require
from tests.harness.service import ServiceProcess, StartService
from tests.harness.three_places import assert_in_step, settings_for
from tests.harness.wireguard import HubInterface

_NODES: Final = 20
# From the moment when there is an interface again.
_SECONDS: Final = 10.0
# The records get new endpoints once a minute.
_RECORDED_SECONDS: Final = 90.0


@dataclass
class Site:
    """A hub, its service, and a host for nodes that send nothing by themselves."""

    hub: HubInterface
    service: ServiceProcess
    host: NodeHost
    records: Path

    def join(self, count: int) -> list[Node]:
        """Have nodes join and make a session each; return when the service knows their endpoints."""
        nodes = self.host.join(self.service, self.hub, *names(0, count))
        for node in nodes:
            eventually(lambda: node.reaches(self.hub))  # noqa: B023 - called at once
        endpoints = shown(self.hub, "endpoints")
        eventually(lambda: self._known_endpoints() == endpoints)
        return nodes

    def recorded(self) -> int:
        """Count the endpoints in the records."""
        with closing(sqlite3.connect(self.records)) as connection:
            count: int = connection.execute("SELECT count(*) FROM peer_endpoints").fetchone()[0]
            return count

    def age_record(self, node: Node, hours: int) -> None:
        """Have the records say that the node was seen so much earlier."""
        self._update(node, "seen_at = strftime('%Y-%m-%d %H:%M:%f', seen_at, ?)", f"-{hours} hours")

    def change_record(self, node: Node, endpoint: str) -> None:
        """Have the records say that the node was seen elsewhere."""
        self._update(node, "endpoint = ?", endpoint)

    def _update(self, node: Node, assignment: str, value: str) -> None:
        which = "peer = (SELECT sequence FROM peers WHERE node_id = ?)"
        statement = f"UPDATE peer_endpoints SET {assignment} WHERE {which}"  # noqa: S608 - of this class
        with closing(sqlite3.connect(self.records)) as connection, connection:
            assert connection.execute(statement, (value, node.node_id)).rowcount == 1

    def up_by_command(self) -> None:
        """Make the interface from its wg0.conf, as a boot does."""
        made = self.service.command("hub", "up")
        assert made.returncode == 0, made.stderr
        route_to_nodes(self.hub)

    def up_by_hand(self) -> None:
        """Make an interface with the hub's address, and without key or peers."""
        self.hub.up()
        self.hub.give_address()
        route_to_nodes(self.hub)

    def wait_for_all(self, nodes: list[Node], since: float) -> float:
        """Wait for a session with each, then ping each; return the seconds that it took."""
        # First without a ping, which would begin a session by itself.
        eventually(lambda: "0" not in shown(self.hub, "latest-handshakes").values())
        assert silent(self.hub, nodes) == []
        return time.monotonic() - since

    def _known_endpoints(self) -> dict[str, str]:
        peers = hub_health(self.service, include_peers=True)["peers"]
        return {peer["public_key"]: peer["endpoint"] for peer in peers}


@pytest.fixture
def site(hub_interface: HubInterface, start_service: StartService, tmp_path: Path) -> Iterator[Site]:
    """Build a hub without nodes."""
    require("ping")
    settings = settings_for(hub_interface, tmp_path, WIREGUARD_HEALTH_INTERVAL=1)
    service = start_service(settings)
    with NodeHost("nodes", tmp_path) as host:
        yield Site(hub_interface, service, host, tmp_path / "state" / "provisioning.sqlite")


@pytest.mark.parametrize("bring_up", [Site.up_by_command, Site.up_by_hand])
def test_idle_nodes_are_back_after_the_interface_was_deleted_and_made_again(
    site: Site, bring_up: Callable[[Site], None]
) -> None:
    nodes = site.join(_NODES)
    site.hub.down()
    bring_up(site)
    made = time.monotonic()
    eventually(lambda: len(site.hub.peers()) == _NODES)
    assert site.wait_for_all(nodes, made) < _SECONDS
    # The nudge has left nothing behind.
    assert set(shown(site.hub, "persistent-keepalive").values()) == {"off"}
    assert_in_step(site.service, site.hub)
    assert "interface_drifted" not in site.service.log


@pytest.mark.parametrize(
    "recorded_by", ["a clean stop", pytest.param("the loop", marks=pytest.mark.torture(only=True))]
)
def test_idle_nodes_are_back_after_service_and_interface_were_killed(site: Site, recorded_by: str) -> None:
    nodes = site.join(_NODES)
    if recorded_by == "a clean stop":
        site.service.restart()
    else:
        deadline = time.monotonic() + _RECORDED_SECONDS
        while site.recorded() < _NODES:
            assert time.monotonic() < deadline
            time.sleep(1)
    site.service.kill()
    site.hub.kill()
    site.up_by_command()
    made = time.monotonic()
    site.service.start()
    assert site.wait_for_all(nodes, made) < _SECONDS
    assert set(shown(site.hub, "persistent-keepalive").values()) == {"off"}
    assert_in_step(site.service, site.hub)


def test_no_endpoint_is_set_over_a_newer_one_and_none_that_is_older_than_a_day(site: Site) -> None:
    idle, aged, moved = site.join(3)
    before = shown(site.hub, "endpoints")
    site.service.terminate()
    site.age_record(idle, hours=23)
    site.age_record(aged, hours=25)
    site.hub.down()
    site.up_by_command()
    # It comes from elsewhere before the service is there again.
    moved.move(site.hub)
    eventually(lambda: moved.reaches(site.hub))
    new = shown(site.hub, "endpoints")[moved.public_key]
    assert new != before[moved.public_key]

    site.service.start()
    eventually(lambda: shown(site.hub, "latest-handshakes")[idle.public_key] != "0")
    assert shown(site.hub, "endpoints") == {
        idle.public_key: before[idle.public_key],
        aged.public_key: "(none)",
        moved.public_key: new,
    }
    assert silent(site.hub, [idle, aged, moved]) == [aged]
    # The next clean stop leaves what is known now.
    site.service.restart()
    assert shown(site.hub, "endpoints")[moved.public_key] == new


def test_a_link_local_endpoint_keeps_no_other_node_away(site: Site) -> None:
    local, idle = site.join(2)
    before = shown(site.hub, "endpoints")[idle.public_key]
    site.service.terminate()
    # Link-local, by an interface of the hub that has another name after a reboot.
    site.change_record(local, "[fe80::1%gone0]:51820")
    site.hub.down()
    site.up_by_command()
    site.service.start()
    eventually(lambda: shown(site.hub, "latest-handshakes")[idle.public_key] != "0")
    assert shown(site.hub, "endpoints") == {idle.public_key: before, local.public_key: "(none)"}
    assert silent(site.hub, [idle]) == []
    assert site.service.client.get("/readyz").status_code == 200
