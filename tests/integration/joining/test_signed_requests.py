"""A request that differs from what was signed is refused, whatever differs."""

import time
from collections.abc import Callable
from typing import Any, Final

import pytest

from backend.client.node import CHALLENGE_PATH
from backend.models.access.encodings import BASE36, encode_base32, encode_base64, to_digits
from backend.models.access.identity import NodeIdentity
from backend.models.access.proof import (
    CHALLENGE_HEADER,
    NONCE_HEADER,
    SIGNATURE_HEADER,
    TIMESTAMP_HEADER,
    WIREGUARD_PROOF_HEADER,
    WireGuardProof,
    answer_challenge,
)
from tests.harness.credentials import new_token, token_id
from tests.harness.proofs import PROOF_HEADERS, Attempt, new_node, newest, nothing_changed
from tests.harness.requests import new_key
from tests.harness.service import ServiceProcess
from tests.harness.wireguard import HubInterface

_PROTOBUF: Final = bytes.fromhex("08011220")


_CID: Final = bytes.fromhex("01720024")


SPELLINGS: Final[dict[str, Callable[[NodeIdentity], str]]] = {
    "raw key in base64": lambda identity: encode_base64(identity.raw),
    "protobuf in hex": lambda identity: (_PROTOBUF + identity.raw).hex(),
    "protobuf in upper-case hex": lambda identity: (_PROTOBUF + identity.raw).hex().upper(),
    "protobuf in base64": lambda identity: encode_base64(_PROTOBUF + identity.raw),
    "PeerID": lambda identity: identity.peer_id,
    "CIDv1 in base32": lambda identity: "b" + encode_base32(_CID + _PROTOBUF + identity.raw),
    "CIDv1 in base36": lambda identity: "k" + to_digits(_CID + _PROTOBUF + identity.raw, BASE36),
}


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
        pytest.param(_with(CHALLENGE_HEADER, "0" * 32), "challenge", id="an unknown challenge"),
        pytest.param(_answer_to_another_body, "challenge", id="an answer for another body"),
        pytest.param(_challenge_that_was_used, "challenge", id="a challenge that had its one try"),
        pytest.param(_with(WIREGUARD_PROOF_HEADER, "AA=="), "challenge", id="no answer"),
    ],
)
def test_request_that_differs_from_its_signature_is_refused(
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
def test_missing_or_repeated_proof_header_is_refused(
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
