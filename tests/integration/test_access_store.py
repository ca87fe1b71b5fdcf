"""The access store writes related rows in one transaction, and keeps answers and nonces long enough."""

import secrets
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from backend.adapters.records import audit, credentials, idempotency
from backend.adapters.records.access_store import SqlAccessStore
from backend.adapters.records.database import Database
from backend.errors import RecordsUnavailableError
from backend.models.access.audit import AuditAction, AuditEvent, AuditOutcome, AuditQuery
from backend.models.access.callers import SERVICE
from backend.models.access.credentials import Credential, TokenRequest
from backend.models.access.idempotency import ANSWERS_KEPT, Answer
from backend.models.access.identity import NodeIdentity
from backend.models.access.proof import (
    WINDOW_SECONDS,
    Nonce,
    SignedRequest,
    WireGuardProof,
    answer_challenge,
    sign,
)
from backend.models.wireguard.keys import WireGuardPrivateKey
from backend.services.access.challenges import Proof, ProofVerifier, WireGuardChallenges
from tests.harness.requests import PROVISION, new_key

NOON = datetime(2026, 2, 19, 12, tzinfo=UTC)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    sqlite = f"sqlite:///{tmp_path}/state/records.sqlite"
    database = Database(sqlite if request.param == "sqlite" else request.getfixturevalue("postgres_database"))
    database.migrate()
    yield database
    database.close()


@pytest.fixture
def store(database: Database) -> SqlAccessStore:
    return SqlAccessStore(database)


def event(action: AuditAction, subject: str) -> AuditEvent:
    return SERVICE.event(NOON, action, AuditOutcome.ACCEPTED, subject)


def new_token() -> Credential:
    token, _ = TokenRequest().make("cli:root", NOON)
    return token


def everything(store: SqlAccessStore) -> tuple[object, ...]:
    """Return all that the store's transactions write: credentials, their version, the audit log."""
    wrong, head, _ = store.verify_audit()
    assert wrong is None
    return *store.load_credentials(), store.audit_page(AuditQuery(limit=1000)), head


@pytest.mark.parametrize(
    ("act", "part"),
    [
        ("make", "insert_credential"),
        ("make", "append_audit"),
        ("revoke", "revoke_credential"),
        ("revoke", "append_audit"),
        ("write", "note_used"),
        ("write", "append_audit"),
    ],
)
def test_credential_and_audit_row_are_written_together_or_not_at_all(
    store: SqlAccessStore, monkeypatch: pytest.MonkeyPatch, act: str, part: str
) -> None:
    known, other = new_token(), new_token()
    store.keep_credential(known, event(AuditAction.TOKEN_MADE, known.id))
    before = everything(store)
    acts: dict[str, Callable[[], object]] = {
        "make": lambda: store.keep_credential(other, event(AuditAction.TOKEN_MADE, other.id)),
        "revoke": lambda: store.revoke_credential(known.id, event(AuditAction.TOKEN_REVOKED, known.id)),
        "write": lambda: store.write([event(AuditAction.PROVISION, "node-1")], {known.id: NOON}),
    }
    module = audit if part == "append_audit" else credentials
    work = getattr(module, part)

    for done_first in (True, False):

        def fail(*arguments: Any, done_first: bool = done_first) -> None:
            if done_first:
                work(*arguments)
            raise sa.exc.OperationalError("no", None, Exception("power cut"))

        with monkeypatch.context() as patch:
            patch.setattr(module, part, fail)
            with pytest.raises(RecordsUnavailableError):
                acts[act]()
        assert everything(store) == before
    acts[act]()
    assert len(store.audit_page(AuditQuery(limit=1000))) == 2


def test_a_credential_that_is_unknown_is_not_logged_as_revoked(store: SqlAccessStore) -> None:
    before = everything(store)
    assert store.revoke_credential("unknown", event(AuditAction.TOKEN_REVOKED, "unknown")) is None
    assert everything(store) == before


def test_a_new_or_revoked_credential_makes_a_new_version(store: SqlAccessStore) -> None:
    # Otherwise a service that runs never hears of it.
    token, versions = new_token(), [store.credentials_version()]
    store.keep_credential(token, event(AuditAction.TOKEN_MADE, token.id))
    versions.append(store.credentials_version())
    store.revoke_credential(token.id, event(AuditAction.TOKEN_REVOKED, token.id))
    versions.append(store.credentials_version())
    assert len(set(versions)) == 3
    store.write([event(AuditAction.PROVISION, "node-1")], {token.id: NOON})
    assert store.credentials_version() == versions[-1]


def signed_nonce(timestamp: int) -> Nonce:
    """Return what a verifier says is to be kept of a request that was signed then."""
    owner, private = Ed25519PrivateKey.generate(), WireGuardPrivateKey.generate()
    verifier, key = ProofVerifier(WireGuardChallenges()), private.public_key()
    request = SignedRequest("POST", PROVISION, new_key(), secrets.token_bytes(32))
    challenge = verifier.challenges.issue(key)
    answer = WireGuardProof(challenge.challenge_id, answer_challenge(private, challenge, request.body_sha256))
    proof = Proof(sign(owner, request, timestamp), answer, request)
    return verifier.verify(proof, NodeIdentity(owner.public_key().public_bytes_raw()).peer_id, key)[1]


# The node's clock may be this far from the hub's; 5 s are left for the test itself.
@pytest.mark.parametrize("ahead", [0, 5 - WINDOW_SECONDS, WINDOW_SECONDS - 5])
def test_a_nonce_is_kept_for_as_long_as_its_signature_is_good(
    store: SqlAccessStore, database: Database, ahead: int
) -> None:
    timestamp = int(time.time()) + ahead
    nonce = signed_nonce(timestamp)

    def is_new() -> bool:
        with database.engine.begin() as connection:
            return bool(idempotency.burn_nonces(connection, [nonce]))

    assert is_new()
    last_moment = datetime.fromtimestamp(timestamp + WINDOW_SECONDS, UTC) + timedelta(seconds=0.999)
    for moment in (datetime.now(UTC), last_moment):
        store.tidy(moment)
        assert not is_new()
    store.tidy(last_moment + timedelta(seconds=3))
    assert is_new()


def test_an_answer_is_kept_for_24_hours(store: SqlAccessStore, database: Database) -> None:
    with database.engine.begin() as connection:
        idempotency.save_answers(connection, [Answer("service", "key", "body", "node-1", b"{}", NOON)])
    store.tidy(NOON + ANSWERS_KEPT)
    assert store.find_answer("service", "key") is not None
    store.tidy(NOON + ANSWERS_KEPT + timedelta(seconds=1))
    assert store.find_answer("service", "key") is None
