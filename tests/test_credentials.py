"""What a credential is, whom it lets in, and that its secret shows itself to nobody."""

import copy
import json
import pickle
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Network, IPv6Network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from backend.models.access.credentials import (
    Credential,
    CredentialKind,
    CredentialState,
    KeyInfo,
    KeyRequest,
    MadeKey,
    MadeToken,
    Permission,
    Role,
    Secret,
    TokenInfo,
    TokenRequest,
)

NOON = datetime(2026, 2, 19, 12, tzinfo=UTC)
TEXT = "ocw_0123456789abcdef_" + "5" * 64


def token(**asked: Any) -> Credential:
    made, _ = TokenRequest.model_validate(asked).make("cli:root", NOON)
    return made


def key(role: Role = Role.READ, **asked: Any) -> Credential:
    made, _ = KeyRequest.model_validate({"role": role, **asked}).make("cli:root", NOON)
    return made


def test_a_secret_is_read_as_it_was_written_and_matches_its_credential_alone() -> None:
    credential, secret = TokenRequest().make("cli:root", NOON)
    assert Secret.parse(secret.reveal()) == secret
    assert credential.matches(Secret.parse(secret.reveal()))
    assert not credential.matches(Secret(secret.id, Secret.generate()._secret))
    assert not credential.matches(Secret(Secret.generate().id, secret._secret))


def test_what_is_stored_is_the_sha256_of_the_secret_part() -> None:
    # printf '%064d' 0 | tr 0 5 | sha256sum
    assert Secret.parse(TEXT).digest == "911878b1ff94a6daecaba1d7ef6fda0b97116a16291389427b402a013a2ae79f"
    assert Secret.parse(TEXT).id == "0123456789abcdef"


def test_two_secrets_are_never_the_same() -> None:
    texts = {Secret.generate().reveal() for _ in range(100)}
    assert len(texts) == 100
    assert all(len(text) == len(TEXT) for text in texts)


@pytest.mark.parametrize(
    "text",
    [
        "",
        TEXT[:-1],
        TEXT + "5",
        TEXT + "\n",
        " " + TEXT,
        TEXT.upper(),
        TEXT.replace("ocw", "OCW"),
        TEXT.replace("_", "-"),
        TEXT.replace("5", "\u0665"),
        TEXT.replace("a", "A"),
    ],
)
def test_another_spelling_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ValueError, match="64 more") as refused:
        Secret.parse(text)
    assert "5555" not in str(refused.value)


@given(st.text())
def test_any_text_is_parsed_or_refused_with_the_documented_error(text: str) -> None:
    with pytest.raises(ValueError, match="a credential is"):
        Secret.parse(text)


@pytest.mark.parametrize("pickled", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_secret_shows_itself_to_nobody(pickled: Callable[[object], object]) -> None:
    secret = Secret.parse(TEXT)
    for text in (str(secret), repr(secret), f"{secret}", f"{[secret]}", "%s" % secret):  # noqa: UP031 - each way to format
        assert "5555" not in text
        assert secret.id in text
    with pytest.raises(TypeError, match="not pickled"):
        pickled(secret)
    credential, made = TokenRequest().make("cli:root", NOON)
    assert made.digest not in repr(credential)
    assert made.reveal() not in repr(MadeToken.of(credential, NOON, secret=made.reveal()))


def test_a_role_covers_the_ones_before_it() -> None:
    covered = {role: {other for other in Role if role.covers(other)} for role in Role}
    assert covered == {
        Role.READ: {Role.READ},
        Role.OPERATE: {Role.READ, Role.OPERATE},
        Role.ADMIN: set(Role),
    }


def test_each_role_has_its_permissions() -> None:
    may = {
        name: {permission.value for permission in Permission if credential.may(permission)}
        for name, credential in {"token": token(), **{role.value: key(role) for role in Role}}.items()
    }
    assert may == {
        "token": {"provision"},
        "read": {"read"},
        "operate": {"provision", "read", "operate"},
        "admin": {"provision", "read", "operate", "administer"},
    }


@pytest.mark.parametrize(
    ("asked", "source", "word"),
    [
        ({}, "192.0.2.1", None),
        ({}, None, None),
        ({"source_cidr": "192.0.2.0/24"}, "192.0.2.255", None),
        ({"source_cidr": "192.0.2.0/24"}, "::ffff:192.0.2.1", None),
        ({"source_cidr": "192.0.2.0/24"}, "192.0.3.1", "source"),
        ({"source_cidr": "192.0.2.0/24"}, "::ffff:192.0.3.1", "source"),
        ({"source_cidr": "192.0.2.0/24"}, "::1", "source"),
        ({"source_cidr": "192.0.2.0/24"}, None, "source"),
        ({"source_cidr": "192.0.2.0/24"}, "testclient", "source"),
        ({"source_cidr": "::/0"}, "::ffff:192.0.2.1", "source"),
        ({"source_cidr": "fe80::/10"}, "fe80::1%eth0", None),
        ({"node_id_pattern": "a", "source_cidr": "::/0"}, "192.0.2.1", "source"),
    ],
)
def test_token_is_good_for_callers_from_its_network(
    asked: dict[str, Any], source: str | None, word: str | None
) -> None:
    assert token(**asked).refusal(NOON, source) == word


def test_token_is_for_the_nodes_that_its_pattern_matches() -> None:
    assert token().is_for("node-1")
    some = token(node_id_pattern="node-*")
    assert (some.is_for("node-1"), some.is_for("a-node-1")) == (True, False)


def test_a_credential_ends_at_its_second_and_when_it_is_revoked() -> None:
    made = token(expires_in=60, source_cidr="::/0")
    last = NOON + timedelta(seconds=59, microseconds=999_999)
    assert made.refusal(last, "::1") is None
    assert made.refusal(NOON + timedelta(seconds=60), "127.0.0.1") == "expired"
    assert key().refusal(NOON + timedelta(days=9999), None) is None
    revoked = Credential(**{**fields(made), "revoked_at": NOON})
    assert revoked.refusal(NOON + timedelta(seconds=60), "127.0.0.1") == "revoked"


def fields(credential: Credential) -> dict[str, Any]:
    return {name: getattr(credential, name) for name in Credential.__dataclass_fields__}


def test_the_state_is_the_first_that_applies() -> None:
    later = NOON + timedelta(hours=2)
    made = token(max_uses=2)
    used = Credential(**{**fields(made), "uses": 2})
    revoked = Credential(**{**fields(used), "revoked_at": NOON})
    assert [made.state(NOON), used.state(NOON), used.state(later), revoked.state(later)] == [
        CredentialState.ACTIVE,
        CredentialState.USED_UP,
        CredentialState.EXPIRED,
        CredentialState.REVOKED,
    ]
    assert key().state(NOON) is CredentialState.ACTIVE


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("*a*a*a*a*b", "a" * 128),
        ("*a" * 63 + "*b", "a" * 128),
        ("*?" * 64, "a" * 63),
        ("*" * 128, "a" * 128),
        ("*" + "a" * 63 + "b", "a" * 128),
        ("?" * 128, "a" * 127),
    ],
)
def test_no_pattern_keeps_the_hub_busy(pattern: str, name: str) -> None:
    made = token(node_id_pattern=pattern)
    # Below a millisecond each; trying again at every star would take longer than the universe has.
    for _ in range(100):
        made.is_for(name)


@pytest.mark.parametrize("pattern", ["", "a" * 129, "a.b", "[ab]", "a\n", "*\n", "é", "a b", "\\*"])
def test_what_no_name_can_be_is_no_pattern(pattern: str) -> None:
    with pytest.raises(ValidationError, match=r"\{1,128\}|at most 128"):
        TokenRequest(node_id_pattern=pattern)


@pytest.mark.parametrize(
    ("text", "network"),
    [
        ("192.0.2.0/24", IPv4Network("192.0.2.0/24")),
        ("192.0.2.7", IPv4Network("192.0.2.7/32")),
        ("2001:DB8::/32", IPv6Network("2001:db8::/32")),
        ("192.0.2.1/24", None),
        ("::ffff:192.0.2.0/120", None),
        ("fe80::%eth0/64", None),
        ("localhost", None),
        (3221225985, None),
        ("", None),
    ],
)
def test_a_source_is_a_network_in_its_one_spelling(
    text: object, network: IPv4Network | IPv6Network | None
) -> None:
    body = {"source_cidr": text}
    if network is None:
        with pytest.raises(ValidationError):
            TokenRequest.model_validate(body)
        return
    assert TokenRequest.model_validate(body).source_cidr == network
    assert TokenRequest.model_validate_json(json.dumps(body)).source_cidr == network


@pytest.mark.parametrize(
    "body",
    [
        {"max_uses": 0},
        {"max_uses": 1_000_001},
        {"max_uses": True},
        {"max_uses": None},
        {"expires_in": 0},
        {"expires_in": 31_536_001},
        {"expires_in": 1.5},
        {"expires_in": None},
        {"ephemeral": False},
        {"note": "\x1b[2J"},
        {"note": "x" * 257},
        {"note": "\ud800"},
        {"colour": "red"},
    ],
)
def test_a_token_is_asked_for_within_its_bounds(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TokenRequest.model_validate(body)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"role": "owner"},
        {"role": "ADMIN"},
        {"role": None},
        {"role": "read", "expires_in": 0},
        {"role": "read", "expires_in": 315_360_001},
        {"role": "read", "max_uses": 1},
    ],
)
def test_a_key_is_asked_for_within_its_bounds(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        KeyRequest.model_validate(body)


def test_a_token_is_made_as_it_was_asked_for_and_tells_its_secret_once() -> None:
    request = TokenRequest.model_validate(
        {
            "max_uses": 3,
            "expires_in": 60,
            "source_cidr": "192.0.2.0/24",
            "node_id_pattern": "n*",
            "note": "ü",
        }
    )
    credential, secret = request.make("key:0123456789abcdef", NOON.replace(microsecond=7))
    info = json.loads(TokenInfo.of(credential, NOON).model_dump_json())
    assert info == {
        "id": secret.id,
        "note": "ü",
        "created_at": "2026-02-19T12:00:00Z",
        "created_by": "key:0123456789abcdef",
        "expires_at": "2026-02-19T12:01:00Z",
        "max_uses": 3,
        "uses": 0,
        "node_id_pattern": "n*",
        "source_cidr": "192.0.2.0/24",
        "revoked_at": None,
        "last_used_at": None,
        "state": "active",
    }
    made = json.loads(MadeToken.of(credential, NOON, secret=secret.reveal()).model_dump_json())
    assert made == {**info, "secret": secret.reveal()}


def test_a_key_is_made_as_it_was_asked_for_and_tells_its_secret_once() -> None:
    credential, secret = KeyRequest.model_validate({"role": "operate"}).make("cli:root", NOON)
    info = json.loads(KeyInfo.of(credential, NOON).model_dump_json())
    assert info == {
        "id": secret.id,
        "role": "operate",
        "note": "",
        "created_at": "2026-02-19T12:00:00Z",
        "created_by": "cli:root",
        "expires_at": None,
        "revoked_at": None,
        "last_used_at": None,
        "state": "active",
    }
    made = json.loads(MadeKey.of(credential, NOON, secret=secret.reveal()).model_dump_json())
    assert made == {**info, "secret": secret.reveal()}
    assert credential.kind is CredentialKind.KEY


def test_no_answer_tells_a_hash() -> None:
    for model in (TokenInfo, KeyInfo, MadeToken, MadeKey):
        assert "secret_hash" not in model.model_fields
