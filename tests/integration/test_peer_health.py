"""The health of real peers, told over HTTP, against what `wg show` prints."""

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.harness.nodes import Node, NodeHost, hub_health, shown
from tests.harness.patience import eventually
from tests.harness.requests import API, AUDIT, PEERS, PROVISION, bearer, new_key, provision_body
from tests.harness.requirements import require
from tests.harness.scrapes import Scrape
from tests.harness.service import ServiceProcess, StartService
from tests.harness.three_places import settings_for
from tests.harness.torture import TORTURE
from tests.harness.wireguard import HubInterface, genkey

# The times of a peer's state in seconds, instead of minutes.
_QUICK: Final = {
    "WIREGUARD_HEALTH_INTERVAL": 1,
    "WIREGUARD_SUSPECT_AFTER": 3,
    "WIREGUARD_OFFLINE_AFTER": 6,
}
# The longest time from one look of the service to the next by default, and what a busy machine adds: seconds.
_LATE: Final = 8.0
_OPERATORS_NETWORK: Final = "192.168.7.0/24"

NewHost = Callable[[str], NodeHost]


@pytest.fixture
def new_host(needs_wireguard: None, tmp_path: Path) -> Iterator[NewHost]:
    """Give the test a function that makes a host for nodes."""
    require("ping")
    hosts: list[NodeHost] = []

    def make(name: str) -> NodeHost:
        hosts.append(NodeHost(name, tmp_path))
        return hosts[-1]

    yield make
    for host in hosts:
        host.close()


@pytest.fixture
def service(hub_interface: HubInterface, start_service: StartService, tmp_path: Path) -> ServiceProcess:
    """Start a service that takes seconds to call a peer offline, on a hub with an operator's peer."""
    with hub_interface.config_path.open("a") as file:
        file.write(f"\n[Peer]\nPublicKey = {new_key()}\nAllowedIPs = {_OPERATORS_NETWORK}\n")
    return start_service(settings_for(hub_interface, tmp_path, **_QUICK))


def peer_health(service: ServiceProcess, node: Node) -> dict[str, Any]:
    """Return what GET /wireguard/peers/{node_id}/health answers."""
    answer = service.client.get(f"{PEERS}/{node.node_id}/health")
    answer.raise_for_status()
    health: dict[str, Any] = answer.json()
    return health


def states(service: ServiceProcess) -> dict[str, str]:
    """Return each peer's state by its node_id."""
    return {peer["node_id"]: peer["state"] for peer in hub_health(service, include_peers=True)["peers"]}


def looks(service: ServiceProcess) -> Iterator[dict[str, str]]:
    """Yield the peers' states after each new look of the service."""
    last = None
    while True:
        health = hub_health(service, include_peers=True)
        if health["timestamp"] != last:
            last = health["timestamp"]
            yield {peer["node_id"]: peer["state"] for peer in health["peers"]}
        time.sleep(0.1)


def runs(seen: list[str]) -> list[str]:
    """Return the states without repetitions that follow each other."""
    return [state for state, _ in itertools.groupby(seen)]


def wait_for_states(service: ServiceProcess, **expected: str) -> None:
    """Wait until the peers are in these states, and there is no other peer."""
    eventually(lambda: states(service) == expected)


def test_a_peer_that_talks_stays_online_and_a_killed_one_is_suspect_and_then_offline(
    service: ServiceProcess, hub_interface: HubInterface, new_host: NewHost
) -> None:
    _, victim = new_host("nodes").join(service, hub_interface, "talker", "victim", keepalive=1)
    wait_for_states(service, talker="online", victim="online")
    assert Scrape(service.client.get("/metrics").text).value("first_handshake_seconds_count") == 2
    # For longer than it takes a silent peer to be suspect.
    before = list(itertools.islice(looks(service), 5))
    victim.tunnel.kill()
    after = []
    for look in itertools.islice(looks(service), 20):
        after.append(look)
        if look["victim"] == "offline":
            break
    assert {look["victim"] for look in before} == {"online"}
    assert runs([look["victim"] for look in after]) == ["online", "suspect", "offline"]
    assert {look["talker"] for look in before + after} == {"online"}


@pytest.mark.torture
def test_a_peer_that_loses_a_twentieth_of_its_packets_is_never_called_offline(
    service: ServiceProcess, hub_interface: HubInterface, new_host: NewHost
) -> None:
    host = new_host("far-away")
    host.lose_packets()
    host.join(service, hub_interface, "node-1", keepalive=1)
    wait_for_states(service, **{"node-1": "online"})
    every_look = looks(service)
    # For longer than it takes a silent peer to be offline.
    assert "offline" not in {next(every_look)["node-1"] for _ in TORTURE.rounds(9)}


@pytest.mark.torture(only=True)
def test_a_killed_peer_is_suspect_after_75_s_and_offline_after_180_s(
    hub_interface: HubInterface, start_service: StartService, new_host: NewHost, tmp_path: Path
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path))
    far, near = new_host("far-away"), new_host("nodes")
    far.lose_packets()
    far.join(service, hub_interface, "far", keepalive=25)
    _, victim = near.join(service, hub_interface, "near", "victim", keepalive=25)
    wait_for_states(service, far="online", near="online", victim="online")
    victim.tunnel.kill()
    killed = time.monotonic()
    became: dict[str, float] = {}
    for look in looks(service):
        after = time.monotonic() - killed
        became.setdefault(look["victim"], after)
        assert (look["near"], look["far"] == "offline") == ("online", False)
        if "offline" in became or after > 240:
            break
    # Its last sign of life came up to a keepalive before it was killed, and was seen up to a look later.
    assert 75 - 25 <= became["suspect"] <= 75 + _LATE
    assert 180 - 25 <= became["offline"] <= 180 + _LATE


def test_health_says_what_wg_shows(
    service: ServiceProcess, hub_interface: HubInterface, new_host: NewHost
) -> None:
    (seen,) = new_host("nodes").join(service, hub_interface, "seen")
    never = provision_body("never")
    service.client.post(PROVISION, json=never).raise_for_status()
    eventually(lambda: seen.reaches(hub_interface))
    eventually(lambda: _agrees(service, hub_interface))

    health = hub_health(service)
    assert "peers" not in health
    assert health == hub_health(service, interface=hub_interface.name) | {"timestamp": health["timestamp"]}
    sums = ("peer_count", "healthy_peers", "stale_peers", "stale_peer_list", "status")
    assert [health[name] for name in sums] == [2, 1, 0, [], "healthy"]
    assert "reason" not in health
    told = peer_health(service, seen)
    assert 0 <= told["latest_handshake_seconds"] <= 60
    assert (told["state"], told["is_stale"], told["endpoint_flapping"]) == ("online", False, False)
    absent = service.client.get(f"{PEERS}/never/health").json()
    assert absent["public_key"] == never["wireguard_public_key"]
    assert (absent["state"], absent["endpoint"], absent["is_stale"]) == ("never", None, False)
    assert "latest_handshake_seconds" not in absent


def _agrees(service: ServiceProcess, hub: HubInterface) -> bool:
    """Say whether the health is what `wg show` prints just now; the counters grow by themselves."""
    health = hub_health(service, include_peers=True)
    columns = ("allowed-ips", "transfer", "endpoints", "persistent-keepalive")
    allowed, transfer, endpoints, keepalives = (shown(hub, what) for what in columns)
    ours = {key for key, networks in allowed.items() if networks != _OPERATORS_NETWORK}
    assert len(ours) == len(allowed) - 1
    told = {
        peer["public_key"]: (
            " ".join(peer["allowed_ips"]),
            f"{peer['received_bytes']}\t{peer['sent_bytes']}",
            peer["endpoint"] or "(none)",
            str(peer["persistent_keepalive"] or "off"),
        )
        for peer in health["peers"]
    }
    totals = [sum(int(transfer[key].split("\t")[column]) for key in ours) for column in (0, 1)]
    sums = ("interface", "public_key", "listening_port", "total_received_bytes", "total_sent_bytes")
    shows = [hub.name, hub.show("public-key"), int(hub.show("listen-port")), *totals]
    return (
        told == {key: (allowed[key], transfer[key], endpoints[key], keepalives[key]) for key in ours}
        and [health[name] for name in sums] == shows
    )


def test_wrong_questions_about_health_are_refused(service: ServiceProcess) -> None:
    service.client.post(PROVISION, json=provision_body("node-1")).raise_for_status()
    for path in (f"{API}/health", f"{PEERS}/node-1/health"):
        for query in ("stale_threshold=59", "stale_threshold=3601", "stale_threshold=", "verbose=true"):
            assert service.client.get(f"{path}?{query}").status_code == 422, (path, query)
        for query in ("stale_threshold=60", "stale_threshold=3600"):
            assert service.client.get(f"{path}?{query}").status_code == 200, (path, query)
    other = service.client.get(f"{API}/health", params={"interface": "wg-other"})
    assert other.status_code == 404
    assert "wg-other" not in other.text
    assert service.client.get(f"{PEERS}/stranger/health").status_code == 404
    key = bearer(service.credential("key", "create", "--role", "read"))
    token = bearer(service.credential("token", "create"))
    for path in (f"{API}/health", f"{PEERS}/node-1/health"):
        assert service.client.get(path, headers=key).status_code == 200
        assert service.client.get(path, headers=token).status_code == 403
        assert service.client.get(path, auth=None).status_code == 401


def test_a_hub_without_its_interface_is_unhealthy_and_says_why(
    service: ServiceProcess, hub_interface: HubInterface
) -> None:
    service.client.post(PROVISION, json=provision_body("node-1")).raise_for_status()
    assert hub_health(service)["status"] == "healthy"
    hub_interface.down()
    eventually(lambda: hub_health(service)["status"] == "unhealthy")
    health = hub_health(service, include_peers=True)
    assert hub_interface.name in health["reason"]
    assert [peer["node_id"] for peer in health["peers"]] == ["node-1"]
    hub_interface.start()
    eventually(lambda: hub_health(service)["status"] == "healthy")
    assert "reason" not in hub_health(service)
    assert "Traceback" not in service.log


def test_without_an_interface_to_look_at_health_says_so(start_service: StartService, tmp_path: Path) -> None:
    private_key, _ = genkey()
    config = tmp_path / "wg0.conf"
    config.touch(mode=0o600)
    config.write_text(f"[Interface]\nPrivateKey = {private_key}\nListenPort = 51820\n")
    service = start_service(
        {"WIREGUARD_CONFIG_PATH": config, "WIREGUARD_RELOAD": "off", "STATE_DIRECTORY": tmp_path / "state"}
    )
    service.client.post(PROVISION, json=provision_body("node-1")).raise_for_status()
    health = hub_health(service, include_peers=True)
    assert "WIREGUARD_RELOAD=off" in health["reason"]
    assert (health["status"], health["peer_count"], health["listening_port"]) == ("unhealthy", 1, None)
    assert [peer["state"] for peer in health["peers"]] == ["never"]


def test_two_nodes_with_one_key_are_flagged_and_audited(
    service: ServiceProcess, hub_interface: HubInterface, new_host: NewHost
) -> None:
    (node,) = new_host("first").join(service, hub_interface, "node-1")
    second = new_host("second")
    clone = second.node("node-1")
    clone.private_key, clone.public_key, clone.address = node.private_key, node.public_key, node.address
    clone.join(hub_interface, second.underlay)
    endpoints = {}
    for talker in (node, clone):
        eventually(lambda: talker.reaches(hub_interface))  # noqa: B023 - called at once
        endpoints[talker] = shown(hub_interface, "endpoints")[node.public_key]
    assert endpoints[node] != endpoints[clone]
    turns = 0
    while not peer_health(service, node)["endpoint_flapping"]:
        talker = (node, clone)[turns % 2]
        turns += 1
        eventually(lambda: _is_heard(service, hub_interface, talker, endpoints[talker]))  # noqa: B023 - at once
        assert turns < 10
    # It has come back three times by then.
    assert turns >= 3
    rows = service.client.get(AUDIT, params={"action": "endpoint_flapping"}).json()
    assert "node-1" in str(rows)


def _is_heard(service: ServiceProcess, hub: HubInterface, node: Node, endpoint: str) -> bool:
    """Have a node send a packet; say whether the service has seen the peer at its endpoint."""
    # Not answered while the hub's newest session is the other one's.
    node.reaches(hub, seconds=0.05)
    return bool(peer_health(service, node)["endpoint"] == endpoint)
