"""The configuration that a hub answers with: what the client takes of it, and refuses."""

from typing import Any

import pytest

from backend.client.configuration import Configuration
from backend.client.errors import AnswerError, JoinError
from backend.client.node import CHALLENGE_PATH, PROVISION_PATH, Client, Node
from backend.models.wireguard.keys import WireGuardPrivateKey
from tests.harness.joining_hub import GOOD, Hub, Reply


def test_the_file_for_wg_quick_has_the_nodes_key_and_the_hubs_answer(
    hub: Hub, client: Client, node: Node
) -> None:
    configuration = client.provision(node, version="1.0.0")
    expected = (
        f"[Interface]\nPrivateKey = {node.wireguard_private_key.reveal()}\nAddress = 10.0.0.2/24\n\n"
        f"[Peer]\nPublicKey = {hub.key}\nEndpoint = hub.example.com:51820\n"
        "AllowedIPs = 10.0.0.0/24\nPersistentKeepalive = 25\n"
    )
    assert configuration.wg_quick(node.wireguard_private_key) == expected
    with_dns = expected.replace("/24\n\n", "/24\nDNS = 10.0.0.1\n\n")
    assert configuration.wg_quick(node.wireguard_private_key, dns=True) == with_dns


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"config": null}', b"\xff", b"[" * 100_000, b" " * 70_000]
)
@pytest.mark.parametrize("path", [CHALLENGE_PATH, PROVISION_PATH])
def test_malformed_answer_is_a_join_error(
    hub: Hub, client: Client, node: Node, path: str, body: bytes
) -> None:
    hub.replies[path].append(Reply(200, body))
    with pytest.raises(JoinError):
        client.provision(node, version="1.0.0")


@pytest.mark.parametrize(
    "change",
    [
        {"node_id": "another-node"},
        {"assigned_ip": "10.0.0.2\nPostUp = id"},
        {"assigned_ip": 167772162},
        {"subnet_mask": "255.0.255.0"},
        {"subnet_mask": "24 "},
        {"hub_public_key": "key"},
        {"hub_endpoint": "hub:51820\nPostUp = id"},
        {"hub_endpoint": "hub:51820\n"},
        {"hub_endpoint": "hub 1:51820"},
        {"hub_endpoint": "hub"},
        {"allowed_ips": "10.0.0.0/24\n[Peer]"},
        {"allowed_ips": None},
        {"allowed_ips": "10.0.0.0/24, fd00::%0\nPostUp = id/64"},
        {"persistent_keepalive": "25\n[Peer]"},
        {"persistent_keepalive": -1},
        {"persistent_keepalive": 65536},
        {"persistent_keepalive": True},
        {"dns_servers": ["10.0.0.1\nPostUp = id"]},
        {"dns_servers": ["fd00::1%0\nPostUp = id"]},
        {"dns_servers": None},
        {"provisioned_at": "yesterday"},
    ],
)
def test_answer_cannot_inject_lines_into_the_nodes_file(
    hub: Hub, client: Client, node: Node, change: dict[str, Any]
) -> None:
    """A line such as PostUp would be run by wg-quick, as root."""
    hub.in_config = change
    with pytest.raises(AnswerError):
        client.provision(node, version="1.0.0")


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"allowed_ips": "0.0.0.0/0"}, id="everything"),
        pytest.param({"allowed_ips": "0.0.0.0/1, 128.0.0.0/1"}, id="everything in halves"),
        pytest.param({"allowed_ips": "10.0.0.0/24, 192.0.2.0/24"}, id="a public network beside its own"),
        pytest.param({"allowed_ips": "10.0.0.0/7"}, id="more than a private network"),
        pytest.param({"allowed_ips": "10.0.0.0/24, ::/0"}, id="all of IPv6"),
        pytest.param({"allowed_ips": "10.0.1.0/24"}, id="not the node's address"),
        pytest.param({"allowed_ips": "10.0.0.0/24, 192.168.0.0/16"}, id="the LAN beside its own"),
        pytest.param({"allowed_ips": ""}, id="none"),
        pytest.param({"subnet_mask": "128.0.0.0"}, id="half of everything by the mask"),
        pytest.param({"subnet_mask": "255.0.0.0"}, id="a mask that is wider than the prefix"),
        pytest.param({"dns_servers": ["8.8.8.8"]}, id="a public name server"),
        pytest.param({"dns_servers": ["10.0.0.1", "127.0.0.1"]}, id="the node's own name server"),
        pytest.param({"dns_servers": ["2001:db8::1"]}, id="a public name server by IPv6"),
    ],
)
def test_answer_cannot_route_other_traffic_to_the_hub(
    hub: Hub, client: Client, node: Node, change: dict[str, Any]
) -> None:
    hub.in_config = change
    with pytest.raises(AnswerError):
        client.provision(node, version="1.0.0")


@pytest.mark.parametrize(
    ("address", "allowed_ips", "server"),
    [
        ("10.0.0.2", "10.0.0.0/8", "10.255.0.1"),
        ("172.31.255.2", "172.31.255.0/24", "172.16.0.1"),
        ("192.168.7.2", "192.168.7.0/24", "fd00::1"),
        ("100.64.0.2", "fd00:1::/64,100.64.0.0/10", "100.127.0.1"),
    ],
)
def test_private_networks_are_accepted(address: str, allowed_ips: str, server: str) -> None:
    configuration = Configuration.from_json(
        {**GOOD, "assigned_ip": address, "allowed_ips": allowed_ips, "dns_servers": [server]}
    )
    text = configuration.wg_quick(WireGuardPrivateKey.generate(), dns=True)
    assert f"AllowedIPs = {allowed_ips.replace(',', ', ')}\n" in text
    assert f"DNS = {server}\n" in text


def test_unknown_fields_of_an_answer_are_ignored(hub: Hub, client: Client, node: Node) -> None:
    hub.in_challenge = hub.in_config = {"something_new": [1, 2, 3]}
    client.provision(node, version="1.0.0")


@pytest.mark.parametrize("field_", sorted(GOOD))
def test_missing_field_of_a_configuration_is_refused(field_: str) -> None:
    assert Configuration.from_json(GOOD).persistent_keepalive == 25
    with pytest.raises(AnswerError, match=field_):
        Configuration.from_json({key: value for key, value in GOOD.items() if key != field_})


@pytest.mark.parametrize(
    "endpoint", ["localhost:51820", "192.0.2.1:1", "[2001:db8::1]:65535", "a-b.example.:9"]
)
def test_valid_endpoints_are_accepted(endpoint: str) -> None:
    assert Configuration.from_json({**GOOD, "hub_endpoint": endpoint}).hub_endpoint == endpoint
