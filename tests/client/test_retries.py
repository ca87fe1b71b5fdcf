"""When the client asks again, when it gives up, and the reason that it reports."""

import json
import socket
from ipaddress import IPv4Address

import pytest

from backend.client.errors import RefusedError, UnreachableError
from backend.client.node import CHALLENGE_PATH, PROVISION_PATH, Client, Node
from backend.models.access.proof import (
    TIMESTAMP_HEADER,
)
from tests.harness.joining_hub import GOOD, PROOF_HEADERS, TOKEN, Hub, Naps, Reply
from tests.harness.service import free_port


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


@pytest.mark.parametrize("path", [CHALLENGE_PATH, PROVISION_PATH])
@pytest.mark.parametrize("status", [301, 400, 401, 403, 413, 422, 500])
def test_refusal_is_not_retried(hub: Hub, client: Client, node: Node, path: str, status: int) -> None:
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
def test_reason_of_a_refusal_is_shown_in_any_form(
    hub: Hub, client: Client, node: Node, body: bytes, detail: str
) -> None:
    hub.replies[PROVISION_PATH].append(Reply(422, body))
    with pytest.raises(RefusedError) as refused:
        client.provision(node, version="1.0.0")
    assert refused.value.detail == detail


def test_last_attempt_reports_the_hubs_reason(hub: Hub, node: Node, naps: Naps) -> None:
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
def test_retry_after_is_followed_within_bounds(
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


def test_unreachable_hub_is_reported_after_the_last_attempt(node: Node, naps: Naps) -> None:
    client = Client(f"http://127.0.0.1:{free_port()}", TOKEN, attempts=7, sleep=naps)
    with pytest.raises(UnreachableError, match="refused"):
        client.provision(node, version="1.0.0")
    assert naps.are(1, 2, 4, 8, 16, 30)


def test_silent_hub_times_out(node: Node, naps: Naps) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        client = Client(url, TOKEN, timeout=0.05, attempts=2, sleep=naps)
        with pytest.raises(UnreachableError, match="timed out"):
            client.provision(node, version="1.0.0")
    assert naps.are(1)
