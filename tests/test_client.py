"""A node gets in, through whatever the hub and the network do to it, and gives nothing away."""

import base64
import copy
import hashlib
import json
import socket
import ssl
import sys
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, Final

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
from backend.client.node import CHALLENGE_PATH, PROVISION_PATH, Client, Node
from backend.errors import NonceError, ProofError
from backend.models.access.identity import NodeIdentity
from backend.models.access.proof import (
    CHALLENGE_HEADER,
    NONCE_HEADER,
    SIGNATURE_HEADER,
    TIMESTAMP_HEADER,
    WIREGUARD_PROOF_HEADER,
    IdentityProof,
    WireGuardChallenges,
    WireGuardProof,
    check_clock,
    check_signature,
)
from backend.models.wireguard.keys import WireGuardKey, WireGuardPrivateKey
from backend.models.wireguard.provisioning import ProvisioningRequest
from tests.harness.service import free_port

TOKEN: Final = "ocw_0123456789abcdef_" + "5e" * 32
PROOF_HEADERS: Final = {
    TIMESTAMP_HEADER,
    NONCE_HEADER,
    SIGNATURE_HEADER,
    CHALLENGE_HEADER,
    WIREGUARD_PROOF_HEADER,
}
GOOD: Final[dict[str, Any]] = {
    "node_id": "swarm-node-001",
    "assigned_ip": "10.0.0.2",
    "subnet_mask": "255.255.255.0",
    "hub_public_key": "vXs/2igcEtnCFS8dJ1SSp1Gi6AHrqL0h4uvGXghFwS8=",
    "hub_endpoint": "hub.example.com:51820",
    "allowed_ips": "10.0.0.0/24",
    "persistent_keepalive": 25,
    "dns_servers": ["10.0.0.1"],
    "provisioned_at": "2026-02-19T12:00:00Z",
}


@dataclass
class Reply:
    """What the hub says instead of what it should."""

    status: int
    body: bytes = b'{"detail": "not now"}'
    headers: dict[str, str] = field(default_factory=dict)
    # The connection is closed after so many bytes of the body.
    cut_at: int | None = None


@dataclass
class Seen:
    path: str
    headers: dict[str, str]
    body: bytes


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that has read enough hangs up.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Hub:
    """The server's side of joining, in memory, on a socket of its own."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.key = WireGuardPrivateKey.generate().public_key()
        self.asks_for_proof = True
        self.challenges = WireGuardChallenges()
        # Said first, one a request, by path.
        self.replies: dict[str, deque[Reply]] = {CHALLENGE_PATH: deque(), PROVISION_PATH: deque()}
        # Put into every challenge and configuration.
        self.in_challenge: dict[str, Any] = {}
        self.in_config: dict[str, Any] = {}
        self.loses_the_next_answer = False
        self.seen: list[Seen] = []
        self.peers: dict[str, ProvisioningRequest] = {}
        self._nonces: set[str] = set()
        self._server = Server(("127.0.0.1", 0), self._handler())
        self._scheme = "https" if tls else "http"
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def provisions(self) -> list[Seen]:
        return [request for request in self.seen if request.path == PROVISION_PATH]

    def answer(self, request: Seen) -> Reply:
        self.seen.append(request)
        if self.replies[request.path]:
            return self.replies[request.path].popleft()
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._reply(401, {"detail": "let in by the operator only"})
        if request.path == CHALLENGE_PATH:
            return self._challenge(request)
        return self._provision(request)

    def _challenge(self, request: Seen) -> Reply:
        if not self.asks_for_proof:
            return self._reply(404, {"detail": "Not Found"})
        key = WireGuardKey.parse(json.loads(request.body)["wireguard_public_key"])
        challenge = self.challenges.issue(key)
        return self._reply(
            200,
            {
                "challenge_id": challenge.challenge_id,
                "server_public_key": challenge.server_public_key,
                "challenge": challenge.challenge,
                "audience": self.key,
                "expires_in": challenge.expires_in,
                **self.in_challenge,
            },
        )

    def _provision(self, request: Seen) -> Reply:
        asked = ProvisioningRequest.model_validate_json(request.body)
        if self.asks_for_proof:
            try:
                self._check(request, asked)
            except ProofError as error:
                return self._reply(401, {"detail": str(error)})
        known = self.peers.setdefault(asked.node_id, asked)
        config = {**GOOD, "node_id": asked.node_id, "hub_public_key": self.key, **self.in_config}
        if known is asked:
            return self._reply(200, {"status": "success", "config": config, "message": "in"})
        same = (known.public_key, known.wireguard_public_key) == (
            asked.public_key,
            asked.wireguard_public_key,
        )
        existing = config if same else {key: config[key] for key in ("node_id", "assigned_ip")}
        return self._reply(
            409,
            {
                "detail": {
                    "message": f"Peer {asked.node_id} is already provisioned",
                    "existing_config": existing,
                }
            },
        )

    def _check(self, request: Seen, asked: ProvisioningRequest) -> None:
        headers, body_sha256 = request.headers, hashlib.sha256(request.body).digest()
        proof = IdentityProof.parse(
            headers.get(TIMESTAMP_HEADER), headers.get(NONCE_HEADER), headers.get(SIGNATURE_HEADER)
        )
        check_clock(proof)
        check_signature(
            NodeIdentity.parse(asked.public_key),
            proof,
            method="POST",
            path=PROVISION_PATH,
            audience=self.key,
            body_sha256=body_sha256,
        )
        if proof.nonce in self._nonces:
            raise NonceError
        self._nonces.add(proof.nonce)
        answer = WireGuardProof.parse(headers.get(CHALLENGE_HEADER), headers.get(WIREGUARD_PROOF_HEADER))
        self.challenges.redeem(answer.challenge_id, asked.wireguard_public_key, answer.mac, body_sha256)

    @staticmethod
    def _reply(status: int, content: object) -> Reply:
        return Reply(status, json.dumps(content).encode())

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                reply = hub.answer(Seen(self.path.removeprefix("/behind/a/proxy"), dict(self.headers), body))
                if self.path == PROVISION_PATH and hub.loses_the_next_answer:
                    hub.loses_the_next_answer = False
                    self.close_connection = True
                    return
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(reply.body)))
                self.end_headers()
                self.wfile.write(reply.body[: reply.cut_at])
                self.close_connection = reply.cut_at is not None

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in the library
                pass

        return Handler


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    try:
        yield hub
    finally:
        hub.close()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Make a key and a certificate for 127.0.0.1 that nobody has signed but itself, in one file."""
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


@pytest.fixture
def node() -> Node:
    return Node("swarm-node-001", Ed25519PrivateKey.generate(), WireGuardPrivateKey.generate().reveal())


class Naps:
    """Takes the place of sleep, and keeps the seconds."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)

    def are(self, *asked: float) -> bool:
        """Say whether they are these, each up to a quarter longer."""
        return len(asked) == len(self.seconds) and all(
            least <= seconds <= least * 1.25 for least, seconds in zip(asked, self.seconds, strict=True)
        )


@pytest.fixture
def naps() -> Naps:
    return Naps()


@pytest.fixture
def client(hub: Hub, naps: Naps) -> Client:
    return Client(hub.url, TOKEN, sleep=naps)


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


def test_a_hub_that_asks_for_no_proof_gets_none(hub: Hub, client: Client, node: Node) -> None:
    hub.asks_for_proof = False
    client.provision(node, version="1.0.0")
    (request,) = hub.provisions()
    assert not PROOF_HEADERS & set(request.headers)
    assert "metadata" not in json.loads(request.body)


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


def test_a_retry_has_the_same_body_and_key_and_a_new_proof(
    hub: Hub, client: Client, node: Node, naps: Naps
) -> None:
    hub.replies[PROVISION_PATH].extend([Reply(503, headers={"Retry-After": "7"}), Reply(502), Reply(504)])
    client.provision(node, version="1.0.0")
    requests = hub.provisions()
    assert len(requests) == 4
    assert len({request.body for request in requests}) == 1
    assert len({request.headers["Idempotency-Key"] for request in requests}) == 1
    for name in PROOF_HEADERS - {TIMESTAMP_HEADER}:
        assert len({request.headers[name] for request in requests}) == 4
    assert naps.are(7, 2, 4)


def test_another_call_has_another_idempotency_key(hub: Hub, client: Client, node: Node) -> None:
    client.provision(node, version="1.0.0")
    client.provision(node, version="1.0.0")
    assert len({request.headers["Idempotency-Key"] for request in hub.provisions()}) == 2


def test_a_busy_hub_is_asked_again_when_it_says_also_for_a_challenge(
    hub: Hub, client: Client, node: Node, naps: Naps
) -> None:
    hub.replies[CHALLENGE_PATH].extend([Reply(429, headers={"Retry-After": "3"}), Reply(503)])
    client.provision(node, version="1.0.0")
    assert naps.are(3, 2)
    assert len(hub.provisions()) == 1


def test_a_node_whose_answer_was_lost_gets_it_from_the_conflict(
    hub: Hub, client: Client, node: Node, naps: Naps
) -> None:
    hub.loses_the_next_answer = True
    configuration = client.provision(node, version="1.0.0")
    assert configuration.assigned_ip == IPv4Address("10.0.0.2")
    assert len(hub.provisions()) == 2
    assert naps.are(1)


def test_an_answer_that_breaks_off_is_asked_for_again(hub: Hub, client: Client, node: Node) -> None:
    hub.replies[PROVISION_PATH].append(Reply(200, json.dumps({"config": GOOD}).encode(), cut_at=20))
    client.provision(node, version="1.0.0")
    assert len(hub.provisions()) == 2


def test_another_node_of_that_name_is_refused(hub: Hub, client: Client, node: Node) -> None:
    client.provision(node, version="1.0.0")
    other = Node("swarm-node-001", Ed25519PrivateKey.generate(), WireGuardPrivateKey.generate().reveal())
    with pytest.raises(RefusedError, match="already provisioned") as refused:
        client.provision(other, version="1.0.0")
    assert refused.value.status == 409
    assert hub.peers["swarm-node-001"].public_key == node.identity.peer_id


def test_a_captured_request_is_good_for_nobody(hub: Hub, client: Client, node: Node) -> None:
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


@pytest.mark.parametrize("path", [CHALLENGE_PATH, PROVISION_PATH])
@pytest.mark.parametrize("status", [301, 400, 401, 403, 413, 422, 500])
def test_a_refusal_is_not_argued_with(hub: Hub, client: Client, node: Node, path: str, status: int) -> None:
    elsewhere = {"Location": f"{hub.url}{PROVISION_PATH}", "Retry-After": "1"}
    hub.replies[path].append(Reply(status, headers=elsewhere))
    with pytest.raises(RefusedError) as refused:
        client.provision(node, version="1.0.0")
    assert (refused.value.status, refused.value.detail) == (status, "not now")
    assert str(refused.value) == f"the hub answered {status}: not now"
    assert [request.path for request in hub.seen][-1] == path
    assert len(hub.seen) == (1 if path == CHALLENGE_PATH else 2)
    assert hub.peers == {}


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b'{"detail": {"message": "no"}}', "no"),
        (b'{"detail": [{"loc": ["body"], "msg": "no"}]}', '[{"loc": ["body"], "msg": "no"}]'),
        (b"<html>no</html>", "<html>no</html>"),
        (b"[]", "[]"),
        (b"\xff", "\\xff"),
        (b"[" * 5000, "[" * 1000),
        (b"", ""),
        # Neither a terminal nor a log does what the hub says, and every reason can be printed.
        (b'{"detail": "\\u001b[2J\\nERROR"}', "\\x1b[2J\\nERROR"),
        (b'{"detail": "\\ud800 caf\\u00e9"}', "\\ud800 caf\xe9"),
    ],
)
def test_a_reason_is_told_whatever_form_it_has(
    hub: Hub, client: Client, node: Node, body: bytes, detail: str
) -> None:
    hub.replies[PROVISION_PATH].append(Reply(422, body))
    with pytest.raises(RefusedError) as refused:
        client.provision(node, version="1.0.0")
    assert refused.value.detail == detail


def test_it_gives_up_after_so_many_tries_with_the_hubs_own_words(hub: Hub, node: Node, naps: Naps) -> None:
    hub.replies[PROVISION_PATH].extend(Reply(503) for _ in range(9))
    client = Client(hub.url, TOKEN, attempts=3, sleep=naps)
    with pytest.raises(RefusedError, match="503: not now"):
        client.provision(node, version="1.0.0")
    assert len(hub.provisions()) == 3
    assert naps.are(1, 2)


@pytest.mark.parametrize(
    ("retry_after", "waits"),
    [
        ("0", [0]),
        ("300", [300]),
        # Asking sooner than the hub wants is no use, and so is waiting for an hour.
        ("301", None),
        ("999999999", None),
        ("Wed, 21 Oct 2026 07:28:00 GMT", [1]),
        ("-5", [1]),
        ("1.5", [1]),
        ("9" * 5000, [1]),
    ],
)
def test_the_hub_says_when_to_ask_again_within_reason(
    hub: Hub, node: Node, naps: Naps, retry_after: str, waits: list[float] | None
) -> None:
    client = Client(hub.url, TOKEN, sleep=naps)
    hub.replies[PROVISION_PATH].append(Reply(503, headers={"Retry-After": retry_after}))
    if waits is None:
        with pytest.raises(RefusedError):
            client.provision(node, version="1.0.0")
        assert naps.seconds == []
    else:
        client.provision(node, version="1.0.0")
        assert naps.are(*waits)


def test_a_hub_that_is_not_there_is_tried_and_then_reported(node: Node, naps: Naps) -> None:
    client = Client(f"http://127.0.0.1:{free_port()}", TOKEN, attempts=7, sleep=naps)
    with pytest.raises(UnreachableError, match="refused"):
        client.provision(node, version="1.0.0")
    assert naps.are(1, 2, 4, 8, 16, 30)


def test_a_hub_that_says_nothing_is_not_waited_for_for_ever(node: Node, naps: Naps) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        client = Client(url, TOKEN, timeout=0.05, attempts=2, sleep=naps)
        with pytest.raises(UnreachableError, match="timed out"):
            client.provision(node, version="1.0.0")
    assert naps.are(1)


def test_over_https_the_token_goes_to_whom_the_certificate_names_alone(
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


def test_a_prefix_is_the_proxys_and_is_not_signed(hub: Hub, node: Node, naps: Naps) -> None:
    Client(f"{hub.url}/behind/a/proxy/", TOKEN, sleep=naps).provision(node, version="1.0.0")
    assert "swarm-node-001" in hub.peers


def test_a_hub_that_is_known_beforehand_is_held_to_it(hub: Hub, node: Node, naps: Naps) -> None:
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


def test_what_was_signed_for_one_hub_is_no_good_for_another(hub: Hub, client: Client, node: Node) -> None:
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
def test_a_challenge_that_is_none_is_not_answered(
    hub: Hub, client: Client, node: Node, change: dict[str, Any]
) -> None:
    hub.in_challenge = change
    with pytest.raises(AnswerError, match="challenge"):
        client.provision(node, version="1.0.0")
    assert hub.provisions() == []


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"config": null}', b"\xff", b"[" * 100_000, b" " * 70_000]
)
@pytest.mark.parametrize("path", [CHALLENGE_PATH, PROVISION_PATH])
def test_an_answer_that_is_none_is_a_join_error(
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
def test_a_hub_can_write_nothing_else_into_the_nodes_file(
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
def test_a_hub_cannot_take_the_nodes_traffic_to_itself(
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
def test_private_networks_are_taken_from_a_hub(address: str, allowed_ips: str, server: str) -> None:
    configuration = Configuration.from_json(
        {**GOOD, "assigned_ip": address, "allowed_ips": allowed_ips, "dns_servers": [server]}
    )
    text = configuration.wg_quick(WireGuardPrivateKey.generate(), dns=True)
    assert f"AllowedIPs = {allowed_ips.replace(',', ', ')}\n" in text
    assert f"DNS = {server}\n" in text


def test_a_newer_hub_may_say_more(hub: Hub, client: Client, node: Node) -> None:
    hub.in_challenge = hub.in_config = {"something_new": [1, 2, 3]}
    client.provision(node, version="1.0.0")


@pytest.mark.parametrize("field_", sorted(GOOD))
def test_a_configuration_lacks_nothing(field_: str) -> None:
    assert Configuration.from_json(GOOD).persistent_keepalive == 25
    with pytest.raises(AnswerError, match=field_):
        Configuration.from_json({key: value for key, value in GOOD.items() if key != field_})


@pytest.mark.parametrize(
    "endpoint", ["localhost:51820", "192.0.2.1:1", "[2001:db8::1]:65535", "a-b.example.:9"]
)
def test_the_endpoints_that_a_hub_may_have_are_taken(endpoint: str) -> None:
    assert Configuration.from_json({**GOOD, "hub_endpoint": endpoint}).hub_endpoint == endpoint


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
def test_an_address_that_is_none_is_the_callers_mistake(url: str) -> None:
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
def test_the_nodes_own_host_may_be_asked_by_http(host: str) -> None:
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
def test_the_end_of_an_ipv6_address_is_not_taken_for_a_port(
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
def test_a_token_that_is_none_is_refused_without_being_shown(token: str) -> None:
    with pytest.raises(ValueError) as refused:
        Client("https://hub", token)
    assert str(refused.value) == "the token has characters that no token has"


def test_a_token_read_from_a_file_may_end_its_line(hub: Hub, node: Node) -> None:
    Client(hub.url, f"{TOKEN}\n").provision(node, version="1.0.0")


def test_a_caller_without_a_token_sends_none(hub: Hub, node: Node) -> None:
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


def test_secrets_are_shown_to_nobody(hub: Hub, client: Client, node: Node) -> None:
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
