"""What the audit log is told of a refused request."""

import logging
from datetime import UTC, datetime
from typing import Any

import pytest
from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError

from backend.api.audit import log_refusal
from backend.errors import (
    DuplicatePeerError,
    ForbiddenError,
    PeerNotFoundError,
    RateLimitedError,
    UnauthenticatedError,
)
from backend.models.access.audit import AuditAction
from backend.models.access.callers import Caller, CallerKind
from backend.models.access.credentials import Secret, TokenRequest
from tests.harness.access import Access
from tests.harness.fakes import FakeAccessStore

NOON = datetime(2026, 2, 19, 12, tzinfo=UTC)
HERE = "192.0.2.1"
KEY = "3f1c0e5a9b7d2468"


class Refusals:
    """Refused requests, and the audit rows that are written of them."""

    def __init__(self) -> None:
        self.store = FakeAccessStore()
        self.access = Access(self.store).control
        credential, _ = TokenRequest().make("cli:root", NOON)
        self.token = credential.id
        self.node = Caller(CallerKind.TOKEN, credential, HERE, "r-1")
        self.stranger = Caller(CallerKind.UNAUTHENTICATED, None, HERE, "r-1")

    def told(self, caller: Caller, subject: str | None, *errors: Exception) -> list[tuple[Any, ...]]:
        """Return what is written of these refusals of one endpoint: action, actor, subject, reason, count."""
        self.store.events.clear()
        for error in errors:
            log_refusal(self.access, caller, AuditAction.PROVISION, subject, error)
        self.access.audit.flush()
        return [
            (row.action.value, row.actor, row.subject, row.reason, row.count) for row in self.store.events
        ]


@pytest.fixture
def refusals() -> Refusals:
    return Refusals()


def test_request_over_a_rate_limit_is_counted_and_has_no_row(refusals: Refusals, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        assert refusals.told(refusals.stranger, "node-1", *[RateLimitedError(7)] * 100) == []
        refusals.access.limited.report()
    (line,) = [record for record in caplog.records if record.message == "requests_limited"]
    assert (line.requests, line.sources, line.most_from, line.of_them) == (100, 1, HERE, 100)


def test_attempt_on_a_real_key_over_the_limit_has_a_row(refusals: Refusals) -> None:
    tries = [UnauthenticatedError("secret", KEY)] * 30 + [RateLimitedError(7, KEY)] * 70
    assert refusals.told(refusals.stranger, "node-1", *tries) == [
        ("authenticate", "nobody", KEY, "secret", 30),
        ("authenticate", "nobody", KEY, "rate", 70),
    ]
    assert {row.source for row in refusals.store.events} == {HERE}


def test_subject_that_is_no_node_id_is_not_logged(refusals: Refusals) -> None:
    secret = Secret.generate().reveal()
    for chosen in ("a" * 129, "../../etc", "node 1", "node-1\n", "\u202e", "", secret):
        told = refusals.told(refusals.stranger, chosen, UnauthenticatedError("missing"))
        assert told == [("authenticate", "nobody", None, "missing", 1)], chosen
    told = refusals.told(refusals.stranger, "node-1", UnauthenticatedError("missing"))
    assert told == [("authenticate", "nobody", "node-1", "missing", 1)]


def test_refusal_of_a_known_caller_is_logged_as_the_act(refusals: Refusals) -> None:
    token = f"token:{refusals.token}"
    told = refusals.told(
        refusals.node,
        "node-1",
        DuplicatePeerError("node-1", {}),
        PeerNotFoundError("node-1"),
        ForbiddenError("read"),
        UnauthenticatedError("used_up", refusals.token),
    )
    assert told == [
        ("provision", token, "node-1", "duplicate", 1),
        ("provision", token, "node-1", "not_found", 1),
        ("provision", token, "node-1", "forbidden", 1),
        ("authenticate", token, refusals.token, "used_up", 1),
    ]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RequestValidationError([]), "invalid"),
        (HTTPException(413, "what was sent"), "status_413"),
        (ValueError("what was sent"), "failed"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_refusal_for_another_reason_is_one_word_without_what_was_sent(
    refusals: Refusals, error: Exception, reason: str
) -> None:
    ((_, _, _, found, _),) = refusals.told(refusals.node, "node-1", error)
    assert found == reason
