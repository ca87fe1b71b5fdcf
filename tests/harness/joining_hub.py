"""A hub that nodes join with the client: in memory, on a socket of its own, and as wrong as a test says."""

import hashlib
import json
import ssl
import sys
import threading
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from backend.client.node import CHALLENGE_PATH, PROVISION_PATH
from backend.errors import NonceError, ProofError
from backend.models.access.identity import NodeIdentity
from backend.models.access.proof import (
    CHALLENGE_HEADER,
    NONCE_HEADER,
    SIGNATURE_HEADER,
    TIMESTAMP_HEADER,
    WIREGUARD_PROOF_HEADER,
    IdentityProof,
    SignedRequest,
    WireGuardProof,
    check_clock,
    check_signature,
)
from backend.models.wireguard.keys import WireGuardKey, WireGuardPrivateKey
from backend.models.wireguard.provisioning import ProvisioningRequest
from backend.services.access.challenges import WireGuardChallenges

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
    """An answer that a test chose."""

    status: int
    body: bytes = b'{"detail": "not now"}'
    headers: dict[str, str] = field(default_factory=dict)
    # The connection is closed after so many bytes of the body.
    cut_at: int | None = None


@dataclass
class Seen:
    """A request as it came."""

    path: str
    headers: dict[str, str]
    body: bytes


class Server(ThreadingHTTPServer):
    """Lets a client hang up without a traceback."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that has read enough hangs up.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Hub:
    """Answers challenges and provisions. `replies` come first, one for each request, by path."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.key = WireGuardPrivateKey.generate().public_key()
        self.asks_for_proof = True
        self.challenges = WireGuardChallenges()
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
        """The base URL."""
        return f"{self._scheme}://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        """Stop it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def provisions(self) -> list[Seen]:
        """Return the requests to provision, in their order."""
        return [request for request in self.seen if request.path == PROVISION_PATH]

    def answer(self, request: Seen) -> Reply:
        """Note the request, and return what is sent back."""
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
        signed = SignedRequest("POST", PROVISION_PATH, self.key, body_sha256)
        check_signature(NodeIdentity.parse(asked.public_key), proof, signed)
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


class Naps:
    """Stands in for time.sleep: doesn't sleep, and keeps the seconds."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)

    def are(self, *asked: float) -> bool:
        """Say whether they are these, each up to a quarter longer."""
        return len(asked) == len(self.seconds) and all(
            least <= seconds <= least * 1.25 for least, seconds in zip(asked, self.seconds, strict=True)
        )
