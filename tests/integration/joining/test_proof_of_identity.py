"""A node proves its identity and its WireGuard key, and a captured request can't be used again."""

import contextlib
import hashlib
import secrets
import sqlite3
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from backend.client.errors import RefusedError
from backend.client.node import CHALLENGE_PATH, PROVISION_PATH, Client, Node, _Answer
from backend.models.access.proof import (
    CHALLENGE_HEADER,
    NONCE_HEADER,
    SIGNATURE_HEADER,
    TIMESTAMP_HEADER,
    WIREGUARD_PROOF_HEADER,
    WireGuardProof,
    answer_challenge,
)
from tests.harness.credentials import new_token, token_id, uses
from tests.harness.proofs import PROOF_HEADERS, Attempt, new_node, newest, nothing_changed
from tests.harness.requests import API, PEERS, bearer, new_key, provision_body
from tests.harness.service import ServiceProcess
from tests.harness.three_places import assert_in_step, listed
from tests.harness.wireguard import HubInterface


class Wiretap(Client):
    """The client, with the requests that it sends."""

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


def test_captured_request_cannot_be_used_in_any_way(service: ServiceProcess, hub: HubInterface) -> None:
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
    # The node itself still joins.
    assert Client(service.url, token).provision(node, version="1.0.0").node_id == node.node_id


def test_signature_is_accepted_once_even_with_a_new_challenge(
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


def test_one_of_many_concurrent_copies_of_a_request_succeeds(service: ServiceProcess) -> None:
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


def test_name_or_identity_of_another_node_is_refused_without_its_configuration(
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


def test_invalid_identity_is_a_422(service: ServiceProcess, hub: HubInterface) -> None:
    token, node = new_token(service), new_node()
    with nothing_changed(service, hub):
        answer = Attempt(service, node, token, {"public_key": "peer_libp2p_public_key"}).send()
        assert answer.status_code == 422
        assert answer.json()["detail"][0]["loc"] == ["body", "public_key"]


def test_operators_must_prove_the_keys_too(service: ServiceProcess, hub: HubInterface) -> None:
    node = new_node()
    key = service.client.headers["Authorization"].removeprefix("Bearer ")
    with nothing_changed(service, hub):
        body = provision_body(node.node_id, public_key=node.identity.peer_id)
        answer = service.client.post(PROVISION_PATH, json=body)
        assert answer.status_code == 401
        assert TIMESTAMP_HEADER in answer.json()["detail"]
    assert Client(service.url, key).provision(node, version="1.0.0").node_id == node.node_id


def test_repeated_request_needs_a_proof_too(service: ServiceProcess, hub: HubInterface) -> None:
    token, node = new_token(service), new_node()
    key = ("Idempotency-Key", "once")
    first = Attempt(service, node, token)
    answer = first.send(key)
    assert answer.status_code == 200
    with nothing_changed(service, hub):
        assert first.send(key).status_code == 401
        again = Attempt(service, node, token).send(key)
        assert (again.status_code, again.content) == (200, answer.content)


def test_challenge_needs_the_permission_to_provision(service: ServiceProcess) -> None:
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


def test_client_joins_without_proofs_where_none_are_required(
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
