"""Whoever joins proves both keys, and whoever captured what they sent can do nothing with it."""

import contextlib
import hashlib
import json
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from backend.client.errors import RefusedError
from backend.client.node import CHALLENGE_PATH, PROVISION_PATH, Client, Node, _Answer
from backend.models.access.encodings import encode_base32, encode_base36, encode_base64
from backend.models.access.identity import NodeIdentity
from backend.models.access.proof import (
    CHALLENGE_HEADER,
    NONCE_HEADER,
    SIGNATURE_HEADER,
    TIMESTAMP_HEADER,
    WIREGUARD_PROOF_HEADER,
    Challenge,
    WireGuardProof,
    answer_challenge,
    sign,
)
from backend.models.wireguard.keys import WireGuardPrivateKey
from tests.harness.credentials import audit_entries, new_token, token_id, uses, with_admin_key
from tests.harness.hosts import LocalHost
from tests.harness.requests import API, PEERS, bearer, new_key, provision_body
from tests.harness.service import ServiceProcess
from tests.harness.three_places import assert_in_step, in_file, listed, settings_for
from tests.harness.wireguard import HubInterface

PROOF_HEADERS: Final = (
    TIMESTAMP_HEADER,
    NONCE_HEADER,
    SIGNATURE_HEADER,
    CHALLENGE_HEADER,
    WIREGUARD_PROOF_HEADER,
)
_PROTOBUF: Final = bytes.fromhex("08011220")
_CID: Final = bytes.fromhex("01720024")
SPELLINGS: Final[dict[str, Callable[[NodeIdentity], str]]] = {
    "raw key in base64": lambda identity: encode_base64(identity.raw),
    "protobuf in hex": lambda identity: (_PROTOBUF + identity.raw).hex(),
    "protobuf in upper-case hex": lambda identity: (_PROTOBUF + identity.raw).hex().upper(),
    "protobuf in base64": lambda identity: encode_base64(_PROTOBUF + identity.raw),
    "PeerID": lambda identity: identity.peer_id,
    "CIDv1 in base32": lambda identity: "b" + encode_base32(_CID + _PROTOBUF + identity.raw),
    "CIDv1 in base36": lambda identity: "k" + encode_base36(_CID + _PROTOBUF + identity.raw),
}


@pytest.fixture(scope="module")
def hub(needs_wireguard: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubInterface]:
    with HubInterface(LocalHost(), "wgproof", tmp_path_factory.mktemp("proof"), listen_port=39100) as hub:
        hub.start()
        yield hub


@pytest.fixture(scope="module")
def service(hub: HubInterface) -> Iterator[ServiceProcess]:
    """Give the module a hub that asks for proofs, and has an admin's key."""
    directory = hub.config_path.parent
    settings = settings_for(hub, directory, WIREGUARD_REQUIRE_PROOF="true")
    with ServiceProcess(directory, settings) as service:
        yield with_admin_key(service)


@pytest.fixture(scope="module")
def trusting(
    needs_wireguard: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ServiceProcess, HubInterface]]:
    """Give the module a hub that asks for no proof, and has no interface."""
    directory = tmp_path_factory.mktemp("trusting")
    hub = HubInterface(LocalHost(), "wgtrusting", directory)
    with ServiceProcess(directory, settings_for(hub, directory, WIREGUARD_RELOAD="off")) as service:
        yield with_admin_key(service), hub


def new_node(node_id: str = "") -> Node:
    name = node_id or f"node-{secrets.token_hex(4)}"
    return Node(name, Ed25519PrivateKey.generate(), WireGuardPrivateKey.generate().reveal())


@contextmanager
def nothing_changed(service: ServiceProcess, hub: HubInterface) -> Iterator[None]:
    """Check that records, file, interface and tokens are as they were."""

    def state() -> tuple[object, ...]:
        return listed(service), hub.config_path.read_bytes(), hub.peers(), uses(service)

    before = state()
    yield
    assert state() == before
    assert_in_step(service, hub)


def newest(service: ServiceProcess, node_id: str) -> tuple[str, str, str, str]:
    """Return what the audit log has of the newest act on a node."""
    entry = audit_entries(service, subject=node_id)[0]
    return entry["action"], entry["outcome"], entry["reason"], entry["actor"]


@dataclass
class Attempt:
    """A request of a node, of which each part can be made false before it is signed or sent."""

    service: ServiceProcess
    node: Node
    token: str
    over: Mapping[str, Any] = field(default_factory=dict)
    body: bytes = b""
    headers: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        fields = provision_body(self.node.node_id, self.node.wireguard_public_key)
        self.body = json.dumps({**fields, "public_key": self.node.identity.peer_id, **self.over}).encode()
        self.proof = self.sign()

    def challenge(self, key: str | None = None) -> Challenge:
        """Ask for a challenge, for the key in the body."""
        wanted = key or json.loads(self.body)["wireguard_public_key"]
        answer = self.service.client.post(
            CHALLENGE_PATH, json={"wireguard_public_key": wanted}, headers=bearer(self.token)
        ).raise_for_status()
        fields = answer.json()
        return Challenge(fields["challenge_id"], fields["server_public_key"], fields["challenge"])

    def sign(self, **lies: Any) -> dict[str, str]:
        """Sign it, but for the lies; return all five headers of the proof."""
        digest = hashlib.sha256(self.body).digest()
        question = self.service.client.post(
            CHALLENGE_PATH,
            json={"wireguard_public_key": self.node.wireguard_public_key},
            headers=bearer(self.token),
        )
        truth = {
            "method": "POST",
            "path": PROVISION_PATH,
            "audience": question.json()["audience"],
            "body_sha256": digest,
            "timestamp": int(time.time()),
        }
        identity = sign(self.node.identity_private_key, **{**truth, **lies})
        return identity.headers() | self.answer()

    def answer(self) -> dict[str, str]:
        """Answer a new challenge for the body; return both headers."""
        challenge = self.challenge()
        digest = hashlib.sha256(self.body).digest()
        mac = answer_challenge(self.node.wireguard_private_key, challenge, digest)
        return WireGuardProof(challenge.challenge_id, mac).headers()

    def send(self, *more: tuple[str, str]) -> httpx.Response:
        """Send it with its proof, and with more headers."""
        headers = [
            ("Content-Type", "application/json"),
            *bearer(self.token).items(),
            *self.proof.items(),
            *more,
        ]
        return self.service.client.post(PROVISION_PATH, content=self.body, headers=headers)


class Wiretap(Client):
    """The reference client, with somebody who listens."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.seen: list[tuple[str, bytes, dict[str, str]]] = []

    def _post(self, path: str, body: bytes, headers: Mapping[str, str]) -> _Answer:
        self.seen.append((path, body, {**self._headers, **headers}))
        return super()._post(path, body, headers)


def test_a_node_joins_with_the_client_and_asks_again_for_what_it_got(
    service: ServiceProcess, hub: HubInterface
) -> None:
    token, node = new_token(service), new_node()
    client = Client(service.url, token, hub_public_key=hub.public_key)
    joined = client.provision(node, version="1.0.0", metadata={"region": "eu-1"})
    assert assert_in_step(service, hub)[node.node_id] == str(joined.assigned_ip)
    assert hub.peers()[node.wireguard_public_key] == {f"{joined.assigned_ip}/32"}
    assert uses(service)[token_id(token)] == 1
    with nothing_changed(service, hub):
        assert client.provision(node, version="1.0.1") == joined
    assert newest(service, node.node_id) == ("provision", "refused", "duplicate", f"token:{token_id(token)}")


def test_a_captured_request_is_good_for_nothing(service: ServiceProcess, hub: HubInterface) -> None:
    token, node = new_token(service, max_uses=10), new_node()
    tapped = Wiretap(service.url, token)
    tapped.provision(node, version="1.0.0")
    path, body, headers = tapped.seen[-1]
    assert path == PROVISION_PATH

    def replay(**over: str) -> httpx.Response:
        answer = service.client.post(path, content=body, headers={**headers, **over})
        assert answer.status_code == 401, answer.text
        return answer

    # Neither the idempotency key nor the challenge that came with it makes it better.
    anew = Attempt(service, node, token)
    with nothing_changed(service, hub):
        replay()
        refused = ("provision", "refused", "challenge", f"token:{token_id(token)}")
        assert newest(service, node.node_id) == refused
        replay(**{"Idempotency-Key": "another"})
        replay(**{name: anew.proof[name] for name in (CHALLENGE_HEADER, WIREGUARD_PROOF_HEADER)})
        replay(**{NONCE_HEADER: secrets.token_urlsafe(24)})
    service.client.delete(f"{PEERS}/{node.node_id}").raise_for_status()
    with nothing_changed(service, hub):
        replay()
        assert newest(service, node.node_id)[2] == "challenge"
    service.restart()
    with nothing_changed(service, hub):
        replay()
        assert newest(service, node.node_id)[2] == "challenge"
    assert node.node_id not in listed(service)
    # Nobody but the replay was in the node's way.
    assert Client(service.url, token).provision(node, version="1.0.0").node_id == node.node_id


def test_a_signature_is_good_once_whatever_challenge_is_answered_beside_it(
    service: ServiceProcess, hub: HubInterface
) -> None:
    token, node = new_token(service, max_uses=10), new_node()
    attempt = Attempt(service, node, token)
    assert attempt.send().status_code == 200
    for known in (True, False):
        if not known:
            service.client.delete(f"{PEERS}/{node.node_id}").raise_for_status()
            # Which has forgotten what it has seen, but for what is in the records.
            service.restart()
        attempt.proof |= Attempt(service, node, token).answer()
        with nothing_changed(service, hub):
            assert attempt.send().status_code == 401
            assert newest(service, node.node_id)[2] == "nonce"


def test_of_copies_of_a_request_that_come_at_once_one_gets_in(service: ServiceProcess) -> None:
    token = new_token(service, max_uses=50)
    attempts = [Attempt(service, new_node(), token) for _ in range(4)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda attempt: attempt.send(), attempts * 8))
    assert Counter(answer.status_code for answer in answers) == {200: 4, 401: 28}
    assert uses(service)[token_id(token)] == 4


def kept_nonces(service: ServiceProcess) -> int:
    """Return how many nonces are in the records."""
    path = f"file:{service.settings['STATE_DIRECTORY']}/provisioning.sqlite?mode=ro"
    with contextlib.closing(sqlite3.connect(path, uri=True)) as connection:
        (count,) = connection.execute("SELECT count(*) FROM nonces").fetchone()
    return int(count)


def test_only_a_provision_that_succeeds_has_its_nonce_written(
    service: ServiceProcess, hub: HubInterface
) -> None:
    """Otherwise each request that is refused costs the hub a durable write."""
    token, node, other = new_token(service, max_uses=10), new_node(), new_node()
    for_another = Attempt(service, other, pattern_token(service, "swarm-*"))
    assert Attempt(service, node, token).send().status_code == 200
    once = ("Idempotency-Key", secrets.token_hex(8))
    assert Attempt(service, other, token).send(once).status_code == 200
    before = kept_nonces(service)
    assert before >= 2
    stranger = new_node()
    stranger_with_the_key = Node(
        stranger.node_id, stranger.identity_private_key, node.wireguard_private_key.reveal()
    )
    with nothing_changed(service, hub):
        assert for_another.send().status_code == 401
        assert Attempt(service, node, token).send().status_code == 409
        assert Attempt(service, new_node(node.node_id), token).send().status_code == 409
        assert Attempt(service, stranger_with_the_key, token).send().status_code == 409
        assert Attempt(service, stranger, token, {"public_key": "no identity"}).send().status_code == 422
        assert Attempt(service, other, token).send(once).status_code == 200
        forged = Attempt(service, stranger, token)
        forged.proof[SIGNATURE_HEADER] = Attempt(service, stranger, token).proof[SIGNATURE_HEADER]
        assert forged.send().status_code == 401
    assert kept_nonces(service) == before


def pattern_token(service: ServiceProcess, pattern: str) -> str:
    made = service.client.post(f"{API}/tokens", json={"node_id_pattern": pattern}).raise_for_status()
    secret: str = made.json()["secret"]
    return secret


def test_a_wireguard_key_without_its_private_half_is_refused(
    service: ServiceProcess, hub: HubInterface
) -> None:
    token, victim = new_token(service, max_uses=10), new_node()
    thief = new_node()
    stolen = {"wireguard_public_key": victim.wireguard_public_key}
    with nothing_changed(service, hub):
        # Before the victim has come, which would lock it out.
        answer = Attempt(service, thief, token, stolen).send()
        assert answer.status_code == 401
        assert newest(service, thief.node_id)[1:3] == ("refused", "challenge")
    Client(service.url, token).provision(victim, version="1.0.0")
    with nothing_changed(service, hub):
        assert Attempt(service, thief, token, stolen).send().status_code == 401
        # With a challenge that the thief can answer, because it is one to another key.
        attempt = Attempt(service, thief, token, stolen)
        challenge = attempt.challenge(thief.wireguard_public_key)
        mac = answer_challenge(thief.wireguard_private_key, challenge, hashlib.sha256(attempt.body).digest())
        attempt.proof |= WireGuardProof(challenge.challenge_id, mac).headers()
        assert attempt.send().status_code == 401
        assert newest(service, thief.node_id)[1:3] == ("refused", "challenge")


def test_anothers_name_or_identity_is_refused_without_its_configuration(
    service: ServiceProcess, hub: HubInterface
) -> None:
    token, victim = new_token(service, max_uses=10), new_node()
    address = str(Client(service.url, token).provision(victim, version="1.0.0").assigned_ip)
    with nothing_changed(service, hub):
        renamed = Attempt(service, new_node(victim.node_id), token).send()
        assert renamed.status_code == 409
        known = {"node_id": victim.node_id, "assigned_ip": address}
        assert renamed.json()["detail"]["existing_config"] == known
        assert newest(service, victim.node_id)[1:3] == ("refused", "duplicate")
        # The right name and identity, with the victim's identity only claimed.
        claimed = {"public_key": victim.identity.peer_id}
        assert Attempt(service, new_node(victim.node_id), token, claimed).send().status_code == 401
        assert newest(service, victim.node_id)[1:3] == ("refused", "signature")
        # The victim's own WireGuard key, under another identity.
        thief = Node(victim.node_id, Ed25519PrivateKey.generate(), victim.wireguard_private_key.reveal())
        answer = Attempt(service, thief, token).send()
        assert answer.json()["detail"]["existing_config"] == known
        thief = Node(
            f"{victim.node_id}-2", Ed25519PrivateKey.generate(), thief.wireguard_private_key.reveal()
        )
        answer = Attempt(service, thief, token).send()
        assert (answer.status_code, answer.json()["detail"]["existing_config"]) == (409, {})
        with pytest.raises(RefusedError, match="409"):
            Client(service.url, token).provision(thief, version="1.0.0")


def _other_body(attempt: Attempt) -> None:
    attempt.body = attempt.body.replace(b"1.0.0", b"1.0.1")


def _other_body_with_its_challenge(attempt: Attempt) -> None:
    _other_body(attempt)
    attempt.proof |= attempt.answer()


def _body_of_other_bytes(attempt: Attempt) -> None:
    attempt.body += b" "


def _signed(**lies: Any) -> Callable[[Attempt], None]:
    def lie(attempt: Attempt) -> None:
        attempt.proof = attempt.sign(**lies)

    return lie


def _signed_seconds_off(seconds: int) -> Callable[[Attempt], None]:
    def lie(attempt: Attempt) -> None:
        attempt.proof = attempt.sign(timestamp=int(time.time()) + seconds)

    return lie


def _with(header: str, value: str) -> Callable[[Attempt], None]:
    def lie(attempt: Attempt) -> None:
        attempt.proof[header] = value

    return lie


def _another_time(attempt: Attempt) -> None:
    attempt.proof[TIMESTAMP_HEADER] = str(int(attempt.proof[TIMESTAMP_HEADER]) + 1)


def _anothers_signature(attempt: Attempt) -> None:
    attempt.proof[SIGNATURE_HEADER] = Attempt(attempt.service, new_node(), attempt.token).proof[
        SIGNATURE_HEADER
    ]


def _answer_to_another_body(attempt: Attempt) -> None:
    challenge = attempt.challenge()
    mac = answer_challenge(attempt.node.wireguard_private_key, challenge, bytes(32))
    attempt.proof |= WireGuardProof(challenge.challenge_id, mac).headers()


def _challenge_that_was_used(attempt: Attempt) -> None:
    wrong = Attempt(attempt.service, attempt.node, attempt.token, {"version": "9.9.9"})
    wrong.proof[CHALLENGE_HEADER] = attempt.proof[CHALLENGE_HEADER]
    assert wrong.send().status_code == 401


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        pytest.param(_other_body, "challenge", id="another body"),
        pytest.param(_body_of_other_bytes, "challenge", id="the same body in other bytes"),
        pytest.param(_other_body_with_its_challenge, "signature", id="another body with its challenge"),
        pytest.param(_signed(path=CHALLENGE_PATH), "signature", id="another path"),
        pytest.param(_signed(method="PUT"), "signature", id="another method"),
        pytest.param(_signed(audience=new_key()), "signature", id="another hub"),
        pytest.param(_signed(body_sha256=bytes(32)), "signature", id="another hash"),
        pytest.param(_signed_seconds_off(-62), "clock", id="too old"),
        pytest.param(_signed_seconds_off(90), "clock", id="of the future"),
        pytest.param(_another_time, "signature", id="another time than was signed"),
        pytest.param(_with(TIMESTAMP_HEADER, "now"), "clock", id="no time at all"),
        pytest.param(_with(NONCE_HEADER, "n" * 32), "signature", id="another nonce"),
        pytest.param(_with(NONCE_HEADER, "short"), "nonce", id="a nonce that is too short"),
        pytest.param(_anothers_signature, "signature", id="another node's signature"),
        pytest.param(_with(SIGNATURE_HEADER, "AA=="), "signature", id="no signature"),
        pytest.param(_with(CHALLENGE_HEADER, "0" * 32), "challenge", id="a challenge of nobody's"),
        pytest.param(_answer_to_another_body, "challenge", id="an answer for another body"),
        pytest.param(_challenge_that_was_used, "challenge", id="a challenge that had its one try"),
        pytest.param(_with(WIREGUARD_PROOF_HEADER, "AA=="), "challenge", id="no answer"),
    ],
)
def test_what_isnt_what_was_signed_is_refused(
    service: ServiceProcess, hub: HubInterface, tamper: Callable[[Attempt], None], reason: str
) -> None:
    token, node = new_token(service), new_node()
    with nothing_changed(service, hub):
        attempt = Attempt(service, node, token)
        tamper(attempt)
        answer = attempt.send()
        assert answer.status_code == 401, answer.text
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert newest(service, node.node_id) == (
            "provision",
            "refused",
            reason,
            f"token:{token_id(token)}",
        )
    # And what is right is let in, so that it was the lie that wasn't.
    assert Attempt(service, node, token).send().status_code == 200


@pytest.mark.parametrize("header", PROOF_HEADERS)
def test_a_header_that_is_missing_or_there_twice_is_no_proof(
    service: ServiceProcess, hub: HubInterface, header: str
) -> None:
    token, node = new_token(service), new_node()
    with nothing_changed(service, hub):
        twice = Attempt(service, node, token)
        answer = twice.send((header, twice.proof[header]))
        assert answer.status_code == 401
        assert newest(service, node.node_id)[1:3] == ("refused", "missing")
        missing = Attempt(service, node, token)
        del missing.proof[header]
        answer = missing.send()
        assert answer.status_code == 401
        assert header in answer.json()["detail"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_an_identity_is_the_same_node(
    service: ServiceProcess, hub: HubInterface, spelling: str
) -> None:
    token, node = new_token(service), new_node()
    joined = Attempt(service, node, token, {"public_key": SPELLINGS[spelling](node.identity)}).send()
    assert joined.status_code == 200, joined.text
    with nothing_changed(service, hub):
        for other in SPELLINGS.values():
            retry = Attempt(service, node, token, {"public_key": other(node.identity)}).send()
            assert retry.status_code == 409
            assert retry.json()["detail"]["existing_config"] == joined.json()["config"]


def test_what_is_no_identity_is_invalid(service: ServiceProcess, hub: HubInterface) -> None:
    token, node = new_token(service), new_node()
    with nothing_changed(service, hub):
        answer = Attempt(service, node, token, {"public_key": "peer_libp2p_public_key"}).send()
        assert answer.status_code == 422
        assert answer.json()["detail"][0]["loc"] == ["body", "public_key"]


def test_an_operator_proves_no_less(service: ServiceProcess, hub: HubInterface) -> None:
    node = new_node()
    key = service.client.headers["Authorization"].removeprefix("Bearer ")
    with nothing_changed(service, hub):
        body = provision_body(node.node_id, public_key=node.identity.peer_id)
        answer = service.client.post(PROVISION_PATH, json=body)
        assert answer.status_code == 401
        assert TIMESTAMP_HEADER in answer.json()["detail"]
    assert Client(service.url, key).provision(node, version="1.0.0").node_id == node.node_id


def test_an_idempotency_key_spares_nobody_the_proof(service: ServiceProcess, hub: HubInterface) -> None:
    token, node = new_token(service), new_node()
    key = ("Idempotency-Key", "once")
    first = Attempt(service, node, token)
    answer = first.send(key)
    assert answer.status_code == 200
    with nothing_changed(service, hub):
        assert first.send(key).status_code == 401
        again = Attempt(service, node, token).send(key)
        assert (again.status_code, again.content) == (200, answer.content)


def test_a_challenge_is_for_whoever_may_come_in(service: ServiceProcess) -> None:
    token = new_token(service)
    question = {"wireguard_public_key": new_key()}

    def ask(body: Any, **headers: str) -> httpx.Response:
        return service.client.post(CHALLENGE_PATH, json=body, headers=headers)

    given = ask(question, **bearer(token))
    assert given.status_code == 200
    fields = given.json()
    assert fields.keys() == {"challenge_id", "server_public_key", "challenge", "expires_in", "audience"}
    assert fields["expires_in"] == 60
    assert given.headers["Cache-Control"] == "no-store"
    assert ask(question, **bearer(token)).json()["challenge"] != fields["challenge"]
    assert ask(question, Authorization="Bearer none").status_code == 401
    reader = service.client.post(f"{API}/keys", json={"role": "read"}).json()["secret"]
    assert ask(question, **bearer(reader)).status_code == 403
    for wrong in ({}, {"wireguard_public_key": "A" * 43 + "="}, {**question, "more": 1}, [question]):
        assert ask(wrong, **bearer(token)).status_code == 422
    # Whose token is used up may still have to ask again, for the node that it let in.
    node = new_node()
    Client(service.url, token).provision(node, version="1.0.0")
    assert ask({"wireguard_public_key": node.wireguard_public_key}, **bearer(token)).status_code == 200
    assert ask(question, **bearer(token)).status_code == 401


def test_where_no_proof_is_asked_for_the_client_gives_none(
    trusting: tuple[ServiceProcess, HubInterface],
) -> None:
    service, _ = trusting
    token, node = new_token(service), new_node()
    answer = service.client.post(
        CHALLENGE_PATH, json={"wireguard_public_key": node.wireguard_public_key}, headers=bearer(token)
    )
    assert answer.status_code == 404
    assert "no proof" in answer.json()["detail"]
    client = Wiretap(service.url, token)
    joined = client.provision(node, version="1.0.0")
    assert not set(PROOF_HEADERS) & client.seen[-1][2].keys()
    assert listed(service)[node.node_id]["assigned_ip"] == str(joined.assigned_ip)
    assert client.provision(node, version="1.0.0") == joined


def ask_once(service: ServiceProcess, token: str, body: dict[str, Any], *keys: str | bytes) -> httpx.Response:
    """Ask to provision with these Idempotency-Keys."""
    headers: list[tuple[str, str | bytes]] = [("Authorization", f"Bearer {token}")]
    headers += [("Idempotency-Key", key) for key in keys]
    raw = [(name.encode(), value if isinstance(value, bytes) else value.encode()) for name, value in headers]
    return service.client.post(PROVISION_PATH, json=body, headers=raw)


def node_body() -> dict[str, Any]:
    return provision_body(f"node-{secrets.token_hex(4)}")


def test_the_same_key_and_body_get_the_same_bytes_again(
    trusting: tuple[ServiceProcess, HubInterface],
) -> None:
    service, hub = trusting
    # The one use is gone with the first answer.
    token, body = new_token(service), node_body()
    first = ask_once(service, token, body, "key-1")
    assert first.status_code == 200
    for _ in range(3):
        again = ask_once(service, token, body, "key-1")
        assert (again.status_code, again.content) == (200, first.content)
    service.restart()
    again = ask_once(service, token, body, "key-1")
    assert (again.status_code, again.content) == (200, first.content)
    assert uses(service)[token_id(token)] == 1
    assert len(audit_entries(service, subject=body["node_id"])) == 1
    # Without the key, or with another, it is a node that is known.
    assert ask_once(service, token, body).status_code == 409
    assert ask_once(service, token, body, "key-2").status_code == 409
    assert body["node_id"] in in_file(hub.config_path)


def test_the_same_key_at_the_same_time_provisions_once(
    trusting: tuple[ServiceProcess, HubInterface],
) -> None:
    service, _ = trusting
    token, body = new_token(service, max_uses=40), node_body()
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda _: ask_once(service, token, body, "key"), range(32)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert uses(service)[token_id(token)] == 1
    assert [entry["outcome"] for entry in audit_entries(service, subject=body["node_id"])] == ["accepted"]


def test_the_same_key_with_other_bodies_at_the_same_time_is_the_first_ones(
    trusting: tuple[ServiceProcess, HubInterface],
) -> None:
    service, _ = trusting
    token = new_token(service, max_uses=40)
    bodies = [node_body() for _ in range(32)]
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda body: ask_once(service, token, body, "key"), bodies))
    assert Counter(answer.status_code for answer in answers) == {200: 1, 422: 31}
    assert uses(service)[token_id(token)] == 1
    assert len(listed(service).keys() & {body["node_id"] for body in bodies}) == 1


def test_the_same_key_with_another_body_is_refused(trusting: tuple[ServiceProcess, HubInterface]) -> None:
    service, hub = trusting
    token, body = new_token(service, max_uses=10), node_body()
    ask_once(service, token, body, "key").raise_for_status()
    file = hub.config_path.read_bytes()
    for other in (node_body(), {**body, "version": "1.0.1"}):
        answer = ask_once(service, token, other, "key")
        assert answer.status_code == 422
        assert answer.json()["detail"][0]["loc"] == ["header", "Idempotency-Key"]
        # Looked at each time: together they are one row, without a name.
        assert newest(service, other["node_id"])[1:3] == ("refused", "idempotency_key")
    assert hub.config_path.read_bytes() == file
    assert uses(service)[token_id(token)] == 1


def test_a_key_is_its_callers_own(trusting: tuple[ServiceProcess, HubInterface]) -> None:
    service, _ = trusting
    one, other = new_token(service, max_uses=10), new_token(service, max_uses=10)
    body = node_body()
    ask_once(service, one, body, "key").raise_for_status()
    # The other's key of the same name is fresh: it gets no answer of the first's, and may be used.
    spied = ask_once(service, other, body, "key")
    assert spied.status_code == 409
    assert spied.json()["detail"]["existing_config"] == {}
    assert ask_once(service, other, node_body(), "key").status_code == 200


def test_what_a_node_was_told_is_forgotten_with_it(trusting: tuple[ServiceProcess, HubInterface]) -> None:
    service, _ = trusting
    token, body = new_token(service, max_uses=2), node_body()
    # Let in anew the second time, which takes a use; and the third time none is left.
    for status, used in ((200, 1), (200, 2), (401, 2)):
        answer = ask_once(service, token, body, "key")
        assert answer.status_code == status
        assert uses(service)[token_id(token)] == used
        if status == 200:
            service.client.delete(f"{PEERS}/{body['node_id']}").raise_for_status()
    assert body["node_id"] not in listed(service)


def test_only_a_success_is_kept(trusting: tuple[ServiceProcess, HubInterface]) -> None:
    service, _ = trusting
    token, body = new_token(service, max_uses=10), node_body()
    ask_once(service, token, {**body, "node_id": "in-the-way"}).raise_for_status()
    assert ask_once(service, token, body, "key").status_code == 409
    service.client.delete(f"{PEERS}/in-the-way").raise_for_status()
    assert ask_once(service, token, body, "key").status_code == 200


@pytest.mark.parametrize(
    "keys",
    [
        ("",),
        ("k" * 256,),
        ("two words",),
        ("tab\there",),
        ("schlüssel".encode(),),
        ("one", "two"),
        ("o", "o"),
    ],
    ids=["empty", "too long", "a space", "a tab", "no ASCII", "two", "twice"],
)
def test_an_idempotency_key_that_is_none_is_refused(
    trusting: tuple[ServiceProcess, HubInterface], keys: tuple[str | bytes, ...]
) -> None:
    service, hub = trusting
    token, body = new_token(service), node_body()
    file = hub.config_path.read_bytes()
    answer = ask_once(service, token, body, *keys)
    assert answer.status_code == 422, answer.text
    assert answer.json()["detail"][0]["loc"] == ["header", "Idempotency-Key"]
    assert hub.config_path.read_bytes() == file
    assert uses(service)[token_id(token)] == 0
    assert ask_once(service, token, body, "k" * 255).status_code == 200
