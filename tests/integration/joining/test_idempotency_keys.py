"""Requests that are repeated with the same Idempotency-Key get the first answer."""

import secrets
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from backend.client.node import PROVISION_PATH
from tests.harness.credentials import audit_entries, new_token, token_id, uses
from tests.harness.proofs import newest
from tests.harness.requests import PEERS, provision_body
from tests.harness.service import ServiceProcess
from tests.harness.three_places import in_file, listed
from tests.harness.wireguard import HubInterface


def ask_once(service: ServiceProcess, token: str, body: dict[str, Any], *keys: str | bytes) -> httpx.Response:
    """Ask to provision with these Idempotency-Keys."""
    headers: list[tuple[str, str | bytes]] = [("Authorization", f"Bearer {token}")]
    headers += [("Idempotency-Key", key) for key in keys]
    raw = [(name.encode(), value if isinstance(value, bytes) else value.encode()) for name, value in headers]
    return service.client.post(PROVISION_PATH, json=body, headers=raw)


def node_body() -> dict[str, Any]:
    return provision_body(f"node-{secrets.token_hex(4)}")


def test_repeated_request_gets_the_same_bytes(
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


def test_concurrent_repeats_provision_once(
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


def test_concurrent_bodies_under_one_key_admit_the_first(
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


def test_key_reused_with_another_body_is_refused(trusting: tuple[ServiceProcess, HubInterface]) -> None:
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


def test_same_key_of_two_callers_is_two_keys(trusting: tuple[ServiceProcess, HubInterface]) -> None:
    service, _ = trusting
    one, other = new_token(service, max_uses=10), new_token(service, max_uses=10)
    body = node_body()
    ask_once(service, one, body, "key").raise_for_status()
    # The other's key of the same name is fresh: it gets no answer of the first's, and may be used.
    spied = ask_once(service, other, body, "key")
    assert spied.status_code == 409
    assert spied.json()["detail"]["existing_config"] == {}
    assert ask_once(service, other, node_body(), "key").status_code == 200


def test_stored_answer_is_deleted_with_its_node(trusting: tuple[ServiceProcess, HubInterface]) -> None:
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


def test_the_key_of_a_removed_node_may_come_with_another_body_at_once(
    trusting: tuple[ServiceProcess, HubInterface],
) -> None:
    service, _ = trusting
    token, body, other = new_token(service, max_uses=9), node_body(), node_body()
    ask_once(service, token, body, "key").raise_for_status()
    service.client.delete(f"{PEERS}/{body['node_id']}").raise_for_status()
    answer = ask_once(service, token, other, "key")
    assert (answer.status_code, answer.json()["config"]["node_id"]) == (200, other["node_id"])
    # And is the other's from here on.
    assert ask_once(service, token, other, "key").content == answer.content
    assert ask_once(service, token, body, "key").status_code == 422


def test_only_successful_answers_are_stored(trusting: tuple[ServiceProcess, HubInterface]) -> None:
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
def test_invalid_idempotency_key_is_refused(
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
