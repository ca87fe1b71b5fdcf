"""A node joins with the client: proofs, tokens, addresses and certificates."""

import base64
import copy
import json
import socket
import ssl
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from backend import client as client_package
from backend.client.configuration import Configuration
from backend.client.errors import AnswerError, JoinError, RefusedError, UnreachableError
from backend.client.node import PROVISION_PATH, Client, Node
from backend.models.access.identity import NodeIdentity
from backend.models.access.proof import (
    CHALLENGE_HEADER,
    NONCE_HEADER,
)
from backend.models.wireguard.keys import WireGuardPrivateKey
from tests.harness.joining_hub import PROOF_HEADERS, TOKEN, Hub, Naps, Reply


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Make a key and a self-signed certificate for 127.0.0.1, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hub")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False
        )
        .sign(key, SHA256())
    )
    path = tmp_path / "hub.pem"
    path.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + made.public_bytes(Encoding.PEM)
    )
    return path


def test_a_node_proves_both_keys_and_is_let_in(hub: Hub, client: Client, node: Node) -> None:
    configuration = client.provision(
        node,
        version="1.0.0",
        capabilities={"gpu_count": 1, "models": ["llama-2-7b"]},
        metadata={"region": "eu-1"},
    )
    assert configuration == Configuration(
        node_id="swarm-node-001",
        assigned_ip=IPv4Address("10.0.0.2"),
        subnet_mask=IPv4Address("255.255.255.0"),
        hub_public_key=hub.key,
        hub_endpoint="hub.example.com:51820",
        allowed_ips=(IPv4Network("10.0.0.0/24"),),
        persistent_keepalive=25,
        dns_servers=(IPv4Address("10.0.0.1"),),
        provisioned_at=datetime(2026, 2, 19, 12, tzinfo=UTC),
    )
    kept = hub.peers["swarm-node-001"]
    assert kept.public_key == node.identity.peer_id
    assert kept.wireguard_public_key == node.wireguard_public_key
    assert (kept.capabilities.gpu_count, kept.capabilities.models) == (1, ["llama-2-7b"])
    assert (kept.version, kept.metadata) == ("1.0.0", {"region": "eu-1"})


def test_client_sends_no_proof_where_none_is_required(hub: Hub, client: Client, node: Node) -> None:
    hub.asks_for_proof = False
    client.provision(node, version="1.0.0")
    (request,) = hub.provisions()
    assert not PROOF_HEADERS & set(request.headers)
    assert "metadata" not in json.loads(request.body)


def test_another_node_of_that_name_is_refused(hub: Hub, client: Client, node: Node) -> None:
    client.provision(node, version="1.0.0")
    other = Node("swarm-node-001", Ed25519PrivateKey.generate(), WireGuardPrivateKey.generate().reveal())
    with pytest.raises(RefusedError, match="already provisioned") as refused:
        client.provision(other, version="1.0.0")
    assert refused.value.status == 409
    assert hub.peers["swarm-node-001"].public_key == node.identity.peer_id


def test_captured_request_cannot_be_replayed(hub: Hub, client: Client, node: Node) -> None:
    client.provision(node, version="1.0.0")
    hub.peers.clear()
    (captured,) = hub.provisions()
    assert hub.answer(captured).status == 401
    stolen = copy.deepcopy(captured)
    fresh = hub.challenges.issue(node.wireguard_public_key)
    stolen.headers[CHALLENGE_HEADER] = fresh.challenge_id
    stolen.headers[NONCE_HEADER] = "another-nonce-of-mine"
    assert hub.answer(stolen).status == 401
    assert hub.peers == {}


def test_token_is_sent_only_after_the_certificate_was_verified(
    certificate: Path, node: Node, naps: Naps
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    hub = Hub(context)
    try:
        with pytest.raises(UnreachableError, match="certificate verify failed"):
            Client(hub.url, TOKEN, attempts=2, sleep=naps).provision(node, version="1.0.0")
        assert hub.seen == []
        trusting = ssl.create_default_context(cafile=str(certificate))
        Client(hub.url, TOKEN, tls=trusting).provision(node, version="1.0.0")
        assert "swarm-node-001" in hub.peers
    finally:
        hub.close()


def test_path_prefix_of_a_proxy_is_not_signed(hub: Hub, node: Node, naps: Naps) -> None:
    Client(f"{hub.url}/behind/a/proxy/", TOKEN, sleep=naps).provision(node, version="1.0.0")
    assert "swarm-node-001" in hub.peers


def test_pinned_hub_key_is_enforced(hub: Hub, node: Node, naps: Naps) -> None:
    other = WireGuardPrivateKey.generate().public_key()
    Client(hub.url, TOKEN, hub_public_key=hub.key).provision(node, version="1.0.0")
    hub.peers.clear()
    hub.seen.clear()
    with pytest.raises(AnswerError, match="hub_public_key"):
        Client(hub.url, TOKEN, hub_public_key=other, sleep=naps).provision(node, version="1.0.0")
    # Nothing was signed for it.
    assert hub.provisions() == []
    hub.in_config = {"hub_public_key": other}
    with pytest.raises(AnswerError, match="hub_public_key"):
        Client(hub.url, TOKEN, hub_public_key=hub.key).provision(node, version="1.0.0")


def test_signature_for_one_hub_is_refused_by_another(hub: Hub, client: Client, node: Node) -> None:
    hub.in_challenge = {"audience": WireGuardPrivateKey.generate().public_key()}
    with pytest.raises(RefusedError, match="401"):
        client.provision(node, version="1.0.0")
    assert hub.peers == {}


@pytest.mark.parametrize(
    "change",
    [
        {"challenge_id": None},
        {"challenge_id": "a\r\nX-Other: 1"},
        {"challenge_id": ""},
        {"server_public_key": base64.b64encode(bytes(32)).decode()},
        {"server_public_key": 1},
        {"challenge": "not base64"},
        {"audience": "hub"},
    ],
)
def test_malformed_challenge_is_not_answered(
    hub: Hub, client: Client, node: Node, change: dict[str, Any]
) -> None:
    hub.in_challenge = change
    with pytest.raises(AnswerError, match="challenge"):
        client.provision(node, version="1.0.0")
    assert hub.provisions() == []


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hub.example.com",
        "ftp://hub",
        "https://",
        "https://user:pw@hub",
        "https://hub?x=1",
        "https://hub/#x",
        "https://h/a b",
    ],
)
def test_invalid_base_url_is_a_value_error(url: str) -> None:
    with pytest.raises(ValueError, match="base_url"):
        Client(url, TOKEN)


@pytest.mark.parametrize(
    "url", ["http://hub.example.com", "HTTP://10.0.0.1:8000", "http://localhost.example"]
)
def test_a_token_does_not_go_over_the_network_in_the_clear(url: str) -> None:
    with pytest.raises(ValueError, match=r"https://, or allow_http=True"):
        Client(url, TOKEN)
    Client(url, TOKEN, allow_http=True)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8000", "127.8.9.10", "[::1]:8000"])
def test_plain_http_is_allowed_to_the_nodes_own_host(host: str) -> None:
    assert Client(f"http://{host}", TOKEN)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("https://[fd00::1]", ("fd00::1", 443)),
        ("https://[fd00::abcd]/hub", ("fd00::abcd", 443)),
        ("https://[fd00::1]:8443", ("fd00::1", 8443)),
        ("http://[::1]", ("::1", 80)),
        ("https://hub.example.com", ("hub.example.com", 443)),
    ],
)
def test_last_group_of_an_ipv6_address_is_not_taken_for_a_port(
    url: str, address: tuple[str, int], node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token would be sent to another host, or to none."""
    asked = []

    def refuse(to: tuple[str, int], *_: object) -> socket.socket:
        asked.append(to)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(UnreachableError):
        Client(url, TOKEN, attempts=1).provision(node, version="1.0.0")
    assert asked == [address]


def test_a_client_that_requires_proofs_does_not_go_on_without(hub: Hub, node: Node, naps: Naps) -> None:
    client = Client(hub.url, TOKEN, require_proof=True, sleep=naps)
    client.provision(node, version="1.0.0")
    hub.asks_for_proof = False
    with pytest.raises(AnswerError, match="asks for no proof"):
        client.provision(node, version="1.0.0")
    assert len(hub.provisions()) == 1
    assert naps.are()


def test_the_package_has_what_its_callers_need() -> None:
    assert client_package.Client is Client
    assert client_package.Node is Node
    assert {error.__name__ for error in (JoinError, RefusedError, UnreachableError, AnswerError)} <= set(
        client_package.__all__
    )


@pytest.mark.parametrize("token", ["", " ", "a b", "a\nb", "caf\xe9", "\u0661"])
def test_invalid_token_is_refused_without_being_shown(token: str) -> None:
    with pytest.raises(ValueError) as refused:
        Client("https://hub", token)
    assert str(refused.value) == "the token has characters that no token has"


def test_a_token_read_from_a_file_may_end_its_line(hub: Hub, node: Node) -> None:
    Client(hub.url, f"{TOKEN}\n").provision(node, version="1.0.0")


def test_client_without_a_token_sends_no_authorization_header(hub: Hub, node: Node) -> None:
    with pytest.raises(RefusedError, match="401"):
        Client(hub.url).provision(node, version="1.0.0")
    assert "Authorization" not in hub.seen[0].headers


def test_the_identitys_key_is_taken_in_the_forms_that_libp2p_keeps_it_in() -> None:
    wireguard = WireGuardPrivateKey.generate().reveal()
    key = Ed25519PrivateKey.generate()
    seed, public = key.private_bytes_raw(), key.public_key().public_bytes_raw()
    forms: list[Ed25519PrivateKey | bytes] = [key, seed, seed + public, b"\x08\x01\x12\x40" + seed + public]
    assert {Node("a", form, wireguard).identity for form in forms} == {NodeIdentity(public)}
    for wrong in (b"", seed[:-1], seed + bytes(32), b"\x08\x01\x12\x20" + seed, bytes(68)):
        with pytest.raises(ValueError, match="Ed25519"):
            Node("a", wrong, wireguard)
    with pytest.raises(ValueError, match="44 characters"):
        Node("a", key, "short")


def test_secrets_are_in_no_representation_and_no_request(hub: Hub, client: Client, node: Node) -> None:
    hub.replies[PROVISION_PATH].append(Reply(400))
    with pytest.raises(RefusedError) as refused:
        client.provision(node, version="1.0.0")
    configuration = client.provision(node, version="1.0.0")
    shown = "".join([repr(node), str(node), repr(client), repr(configuration), repr(refused.value)])
    sent = b"".join(str(request.headers).encode() + request.body for request in hub.seen)
    seed = node.identity_private_key.private_bytes_raw()
    for secret in (node.wireguard_private_key.reveal(), base64.b64encode(seed).decode(), seed.hex()):
        assert secret not in shown
        assert secret.encode() not in sent
    assert TOKEN not in shown
