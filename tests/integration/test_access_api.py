"""Tokens and keys over HTTP: their fields, their limits, their permissions, and the audit log."""

import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from backend.errors import UnauthenticatedError
from tests.harness.failing_wg import FailingWg
from tests.harness.hosts import LocalHost
from tests.harness.patience import eventually
from tests.harness.requests import API, AUDIT, KEYS, PEERS, PROVISION, TOKENS, new_key, provision_body
from tests.harness.service import ServiceProcess, StartService
from tests.harness.three_places import settings_for
from tests.harness.wireguard import HubInterface

UNAUTHENTICATED = {"detail": str(UnauthenticatedError("whatever"))}
MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
PATIENT = {"WIREGUARD_RATE_LIMIT_FAILED_AUTHENTICATION": "100000/minute"}


class Holder:
    """Somebody with a credential."""

    def __init__(self, client: httpx.Client, made: dict[str, Any]) -> None:
        self._client = client
        self.made = made
        self.id: str = made["id"]
        self.secret: str = made["secret"]

    def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.secret}", **more.pop("headers", {})}
        return self._client.request(method, path, headers=headers, **more)

    def make(self, path: str, **asked: Any) -> "Holder":
        answer = self.ask("POST", path, json=asked)
        assert answer.status_code == 201, answer.text
        return Holder(self._client, answer.json())

    def provision(self, body: dict[str, Any], **more: Any) -> httpx.Response:
        return self.ask("POST", PROVISION, json=body, **more)

    def listed(self, path: str) -> dict[str, dict[str, Any]]:
        return {entry["id"]: entry for entry in self.ask("GET", path).json()}

    def logged(self, **asked: Any) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = self.ask("GET", AUDIT, params=asked).json()["entries"]
        return entries


@pytest.fixture(scope="module")
def service(needs_wireguard: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """Give the module one service: each test makes credentials and nodes of its own."""
    directory = tmp_path_factory.mktemp("access")
    with HubInterface(LocalHost(), "wgaccess", directory, listen_port=39100) as hub:
        hub.start()
        with ServiceProcess(directory, settings_for(hub, directory, **PATIENT)) as service:
            yield service


@pytest.fixture(scope="module")
def admin(service: ServiceProcess) -> Holder:
    made = service.client.post(KEYS, json={"role": "admin"})
    assert made.status_code == 201
    return Holder(service.client, made.json())


@pytest.fixture
def node() -> str:
    """Return the name of a node that no other test has."""
    return f"node-{time.monotonic_ns()}"


def assert_refused(answer: httpx.Response) -> None:
    """Check that it is the one answer that tells nothing."""
    assert (answer.status_code, answer.json()) == (401, UNAUTHENTICATED)
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_new_token_is_shown_with_its_fields_and_its_secret_once(admin: Holder) -> None:
    asked = {"max_uses": 3, "expires_in": 60, "node_id_pattern": "gpu-*", "source_cidr": "10.0.0.0/8"}
    token = admin.make(TOKENS, **asked, note="for the lab").made
    secret = token.pop("secret")
    assert re.fullmatch(rf"ocw_{token['id']}_[0-9a-f]{{64}}", secret)
    assert MOMENT.fullmatch(token["created_at"])
    assert MOMENT.fullmatch(token["expires_at"])
    assert {
        name: value for name, value in token.items() if name not in {"id", "created_at", "expires_at"}
    } == {
        "note": "for the lab",
        "created_by": f"key:{admin.id}",
        "revoked_at": None,
        "last_used_at": None,
        "state": "active",
        "max_uses": 3,
        "uses": 0,
        "node_id_pattern": "gpu-*",
        "source_cidr": "10.0.0.0/8",
    }
    assert admin.listed(TOKENS)[token["id"]] == token


def test_new_key_is_shown_with_its_fields_and_its_secret_once(admin: Holder) -> None:
    key = admin.make(KEYS, role="read", expires_in=60, note="dashboard").made
    secret = key.pop("secret")
    assert re.fullmatch(rf"ocw_{key['id']}_[0-9a-f]{{64}}", secret)
    assert {name: value for name, value in key.items() if name not in {"id", "created_at", "expires_at"}} == {
        "note": "dashboard",
        "created_by": f"key:{admin.id}",
        "revoked_at": None,
        "last_used_at": None,
        "state": "active",
        "role": "read",
    }
    assert admin.listed(KEYS)[key["id"]] == key
    assert admin.listed(KEYS)[admin.id]["created_by"] == "local"
    assert admin.listed(KEYS)[admin.id]["expires_at"] is None


def test_no_answer_has_a_hash_or_a_secret_but_the_one_that_makes_it(
    admin: Holder, service: ServiceProcess, node: str
) -> None:
    token, key = admin.make(TOKENS), admin.make(KEYS, role="operate")
    token.provision(provision_body(node))
    told = [admin.ask("GET", path).text for path in (TOKENS, KEYS, AUDIT, PEERS)]
    told += [admin.ask("DELETE", path).text for path in (f"{TOKENS}/{token.id}", f"{KEYS}/{key.id}")]
    told.append(service.log)
    for holder in (token, key, admin):
        assert holder.id in "".join(told)
        assert holder.secret.rpartition("_")[2] not in "".join(told)
    for name in ("secret", "secret_hash"):
        assert f'"{name}"' not in "".join(told)


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        *[(TOKENS, "max_uses", value) for value in (0, -1, 1_000_001, 1.5, "1", True, None)],
        *[(TOKENS, "expires_in", value) for value in (0, -1, 365 * 24 * 3600 + 1, "60", None, 10**15)],
        *[(TOKENS, "node_id_pattern", value) for value in ("", "a.b", "[ab]", "a" * 129, "a\n", "ä", 1)],
        *[
            (TOKENS, "source_cidr", value)
            for value in ("192.0.2.1/24", "::ffff:0:0/96", "fe80::%1/64", "", 1)
        ],
        *[(TOKENS, "note", value) for value in ("x" * 257, "a\nb", "\u202e", None)],
        *[(TOKENS, name, "x") for name in ("secret", "id", "uses", "role", "ephemeral")],
        *[(KEYS, "role", value) for value in ("root", "", "ADMIN", None, 1)],
        *[(KEYS, "expires_in", value) for value in (0, 10 * 365 * 24 * 3600 + 1, "60")],
        *[(KEYS, "note", value) for value in ("x" * 257, "\x00")],
        (KEYS, "max_uses", 1),
    ],
)
def test_invalid_credential_fields_are_refused_with_a_sentence(
    admin: Holder, path: str, field: str, value: object
) -> None:
    before = admin.listed(path).keys()
    asked = {field: value} if path == TOKENS or field == "role" else {"role": "read", field: value}
    answer = admin.ask("POST", path, json=asked)
    assert answer.status_code == 422
    (problem,) = answer.json()["detail"]
    assert problem["loc"][:2] == ["body", field]
    assert len(problem["msg"]) > 5
    assert admin.listed(path).keys() == before


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        (TOKENS, {"max_uses": 1_000_000, "expires_in": 365 * 24 * 3600, "node_id_pattern": "*" * 128}),
        (TOKENS, {"note": "\N{SNOWMAN}" * 256, "source_cidr": "0.0.0.0/0", "node_id_pattern": None}),
        (TOKENS, {"max_uses": 1, "expires_in": 1, "source_cidr": "2001:db8::1/128"}),
        (KEYS, {"role": "read", "expires_in": 10 * 365 * 24 * 3600}),
        (KEYS, {"role": "operate", "expires_in": None, "note": ""}),
    ],
)
def test_limits_of_credential_fields_are_inclusive(admin: Holder, path: str, asked: dict[str, Any]) -> None:
    made = admin.make(path, **asked).made
    for name, value in asked.items():
        if name != "expires_in":
            assert made[name] == value


def test_second_revocation_keeps_the_first_ones_time(admin: Holder) -> None:
    token = admin.make(TOKENS)
    first = admin.ask("DELETE", f"{TOKENS}/{token.id}")
    assert (first.status_code, first.json()["state"]) == (200, "revoked")
    assert MOMENT.fullmatch(first.json()["revoked_at"])
    assert admin.ask("DELETE", f"{TOKENS}/{token.id}").json() == first.json()
    assert_refused(token.provision(provision_body("never")))


def test_a_key_may_revoke_itself_and_is_refused_from_then_on(admin: Holder) -> None:
    key = admin.make(KEYS, role="admin")
    assert key.ask("DELETE", f"{KEYS}/{key.id}").json()["state"] == "revoked"
    assert_refused(key.ask("GET", KEYS))
    revoked = admin.logged(action="key_revoked", subject=key.id)
    assert [entry["actor"] for entry in revoked] == [f"key:{key.id}"]


@pytest.mark.parametrize("name", ["0123456789abcdef", "x", "%00", "x" * 600])
@pytest.mark.parametrize("path", [TOKENS, KEYS])
def test_unknown_credential_cannot_be_revoked(admin: Holder, path: str, name: str) -> None:
    assert admin.ask("DELETE", f"{path}/{name}").status_code == 404


def test_a_token_is_not_among_the_keys_nor_a_key_among_the_tokens(admin: Holder) -> None:
    token, key = admin.make(TOKENS), admin.make(KEYS, role="read")
    assert admin.ask("DELETE", f"{TOKENS}/{key.id}").status_code == 404
    assert admin.ask("DELETE", f"{KEYS}/{token.id}").status_code == 404
    assert key.id not in admin.listed(TOKENS)
    assert token.id not in admin.listed(KEYS)
    assert admin.listed(KEYS)[key.id]["state"] == admin.listed(TOKENS)[token.id]["state"] == "active"


def test_credentials_state_is_active_revoked_expired_or_used_up(admin: Holder, node: str) -> None:
    active, used = admin.make(TOKENS, max_uses=2), admin.make(TOKENS)
    expired, revoked = admin.make(TOKENS, expires_in=1), admin.make(TOKENS)
    old_key = admin.make(KEYS, role="read", expires_in=1)
    assert active.provision(provision_body(f"{node}-a")).status_code == 200
    assert used.provision(provision_body(f"{node}-b")).status_code == 200
    admin.ask("DELETE", f"{TOKENS}/{revoked.id}")
    eventually(lambda: admin.listed(KEYS)[old_key.id]["state"] == "expired")
    eventually(lambda: admin.listed(TOKENS)[expired.id]["state"] == "expired")
    tokens = admin.listed(TOKENS)
    assert [tokens[holder.id]["state"] for holder in (active, used, revoked)] == [
        "active",
        "used_up",
        "revoked",
    ]
    assert [tokens[holder.id]["uses"] for holder in (active, used, revoked)] == [1, 1, 0]
    for holder, reason in ((used, "used_up"), (expired, "expired"), (revoked, "revoked")):
        assert_refused(holder.provision(provision_body(f"{node}-c")))
        refused = admin.logged(action="authenticate", subject=holder.id)
        assert [entry["reason"] for entry in refused] == [reason]
    assert_refused(old_key.ask("GET", PEERS))


def test_last_use_is_shown_soon(admin: Holder, node: str) -> None:
    key, token = admin.make(KEYS, role="read"), admin.make(TOKENS)
    unused = admin.make(KEYS, role="read")
    before = datetime.now(UTC).replace(microsecond=0)
    assert key.ask("GET", PEERS).status_code == 200
    assert token.provision(provision_body(node)).status_code == 200
    eventually(lambda: admin.listed(KEYS)[key.id]["last_used_at"] is not None)
    for used_at in (admin.listed(KEYS)[key.id], admin.listed(TOKENS)[token.id]):
        assert before <= datetime.fromisoformat(used_at["last_used_at"]) <= datetime.now(UTC)
    assert admin.listed(KEYS)[unused.id]["last_used_at"] is None


def test_token_admits_only_nodes_that_match_its_pattern(admin: Holder, node: str) -> None:
    token = admin.make(TOKENS, node_id_pattern=f"{node}-?")
    for name in (node, f"{node}-10", f"x{node}-1"):
        assert_refused(token.provision(provision_body(name)))
    assert {entry["reason"] for entry in admin.logged(subject=token.id, action="authenticate")} == {"node_id"}
    assert token.provision(provision_body(f"{node}-1")).status_code == 200
    assert admin.listed(TOKENS)[token.id]["uses"] == 1


def test_token_admits_only_callers_from_its_network(admin: Holder, node: str) -> None:
    for network, status in (("192.0.2.0/24", 401), ("::1/128", 401), ("127.0.0.0/8", 200)):
        token = admin.make(TOKENS, source_cidr=network)
        body = provision_body(f"{node}-{status}")
        answer = token.provision(body, headers={"X-Forwarded-For": "192.0.2.7"})
        assert answer.status_code == status
        if status == 401:
            assert_refused(answer)
            (entry,) = admin.logged(subject=token.id, action="authenticate")
            assert (entry["reason"], entry["source"]) == ("source", "127.0.0.1")


def test_operate_key_manages_peers_and_makes_no_credentials(admin: Holder, node: str) -> None:
    operator = admin.make(KEYS, role="operate")
    assert operator.provision(provision_body(node)).status_code == 200
    assert operator.ask("GET", f"{PEERS}/{node}").status_code == 200
    assert operator.ask("DELETE", f"{PEERS}/{node}").status_code == 200
    for method, path in (("GET", TOKENS), ("GET", KEYS), ("DELETE", f"{KEYS}/{admin.id}")):
        assert operator.ask(method, path).status_code == 403
    assert operator.ask("POST", KEYS, json={"role": "admin"}).status_code == 403
    acts = {entry["action"]: entry["actor"] for entry in admin.logged(subject=node)}
    assert acts == {"provision": f"key:{operator.id}", "deprovision": f"key:{operator.id}"}


def test_a_node_with_a_token_reads_and_removes_nothing(admin: Holder, node: str) -> None:
    token = admin.make(TOKENS, max_uses=2)
    assert token.provision(provision_body(node)).status_code == 200
    for method, path in (
        ("GET", PEERS),
        ("GET", f"{PEERS}/{node}"),
        ("DELETE", f"{PEERS}/{node}"),
        ("GET", f"{API}/pool/stats"),
        ("GET", AUDIT),
        ("GET", TOKENS),
        ("DELETE", f"{TOKENS}/{token.id}"),
    ):
        assert token.ask(method, path).status_code == 403
    assert admin.ask("GET", f"{PEERS}/{node}").status_code == 200


def test_conflict_shows_what_the_callers_credential_allows(admin: Holder, node: str) -> None:
    own, other = admin.make(TOKENS, max_uses=2), admin.make(TOKENS, max_uses=5)
    body = provision_body(node)
    whole = own.provision(body).json()["config"]
    short = {"node_id": node, "assigned_ip": whole["assigned_ip"]}
    same_node = provision_body(node)
    same_key = provision_body(f"{node}-b", body["wireguard_public_key"])
    for holder, asked, expected in (
        (own, body, whole),
        (own, same_node, short),
        (other, body, {}),
        (other, same_node, {}),
        (other, same_key, {}),
        (admin, body, whole),
        (admin, same_node, short),
        (admin, {**body, "public_key": "another"}, short),
        (admin, same_key, {}),
    ):
        answer = holder.provision(asked)
        assert answer.status_code == 409
        assert answer.json()["detail"]["existing_config"] == expected
    assert own.provision(provision_body(f"{node}-2")).status_code == 200
    # Used up, it is good for its own nodes' retries alone, and tells nothing of anybody.
    for asked in (same_node, same_key, provision_body(f"{node}-c")):
        assert_refused(own.provision(asked))
    tokens = admin.listed(TOKENS)
    assert [tokens[holder.id]["uses"] for holder in (own, other)] == [2, 0]


def test_stored_answer_is_repeated_to_the_same_token_only(admin: Holder, node: str) -> None:
    token, other = admin.make(TOKENS), admin.make(TOKENS)
    body, key = provision_body(node), {"Idempotency-Key": "once"}
    first = token.provision(body, headers=key)
    assert first.status_code == 200
    again = token.provision(body, headers=key)
    assert (again.status_code, again.content) == (200, first.content)
    assert token.provision({**body, "version": "1.0.1"}, headers=key).status_code == 422
    assert other.provision(body, headers=key).status_code == 409
    assert admin.ask("DELETE", f"{TOKENS}/{token.id}").status_code == 200
    assert_refused(token.provision(body, headers=key))


def dribble(service: ServiceProcess, path: str, body: dict[str, Any], secret: str | None) -> socket.socket:
    """Send a request but for the last byte of its body."""
    text = json.dumps(body).encode()
    head = [f"POST {path} HTTP/1.1", f"Host: 127.0.0.1:{service.port}", "Content-Type: application/json"]
    head += [f"Content-Length: {len(text)}", "Connection: close", "Expect: 100-continue"]
    head += [] if secret is None else [f"Authorization: Bearer {secret}"]
    connection = socket.create_connection(("127.0.0.1", service.port), timeout=20)
    connection.sendall("\r\n".join([*head, "", ""]).encode() + text[:-1])
    # It is asked for the body when it has been admitted.
    assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    return connection


def end(connection: socket.socket) -> int:
    """Send the last byte, a brace, and return the status."""
    with connection:
        connection.sendall(b"}")
        return int(connection.makefile("rb").readline().split()[1])


def test_a_key_that_is_revoked_while_a_body_comes_in_makes_nothing(
    admin: Holder, service: ServiceProcess
) -> None:
    key = admin.make(KEYS, role="admin")
    connection = dribble(service, KEYS, {"role": "admin"}, key.secret)
    assert admin.ask("DELETE", f"{KEYS}/{key.id}").status_code == 200
    before = admin.listed(KEYS).keys()
    assert end(connection) == 401
    assert admin.listed(KEYS).keys() == before


def test_a_use_that_was_seen_under_way_and_taken_back_can_be_made_again(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    wg = FailingWg(tmp_path / "bin")
    service = start_service(settings_for(hub_interface, tmp_path), path_prefix=wg.directory)
    admin = Holder(service.client, service.client.post(KEYS, json={"role": "admin"}).json())
    token, body = admin.make(TOKENS), provision_body("node-1")
    wg.be("held")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(token.provision, body, timeout=60.0)
        eventually(lambda: admin.listed(TOKENS)[token.id]["uses"] == 1)
        wg.be("fails")
        assert waiting.result().status_code == 503
    wg.be("works")
    eventually(lambda: service.client.get("/readyz").status_code == 200)
    assert admin.listed(TOKENS)[token.id]["uses"] == 0
    assert token.provision(body).status_code == 200
    assert_refused(token.provision(provision_body("node-2", new_key())))
