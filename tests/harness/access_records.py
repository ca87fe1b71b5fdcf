"""What tests of the access records write and read."""

import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import sqlalchemy as sa

from backend.adapters.records import audit, credentials
from backend.models.access.audit import (
    AuditAction,
    AuditEvent,
    AuditOutcome,
)
from backend.models.access.credentials import TokenRequest

NOON: Final = datetime(2026, 2, 19, 12, tzinfo=UTC)
LATER: Final = NOON + timedelta(hours=2)


def make_token(engine: sa.Engine, **asked: Any) -> str:
    """Record a token; return its ID."""
    token, _ = TokenRequest.model_validate(asked).make("cli:root", NOON)
    with engine.begin() as connection:
        credentials.insert_credential(connection, token)
    return token.id


def event(subject: str | None = None, **over: Any) -> AuditEvent:
    """Return an event of that noon, with the fields in `over` put over it."""
    base = AuditEvent(NOON, AuditAction.PROVISION, AuditOutcome.ACCEPTED, "local", subject)
    return replace(base, **over)


def append(engine: sa.Engine, *events: AuditEvent) -> int:
    """Append to the audit log; return the sequence number of the last row."""
    with engine.begin() as connection:
        audit.append_audit(connection, events)
        return audit.audit_head(connection)[0]


def together(number: int, work: Callable[[int], None]) -> None:
    """Run `work` in so many threads at once, and raise what any of them raised."""
    barrier, failures = threading.Barrier(number), list[BaseException]()

    def run(index: int) -> None:
        try:
            barrier.wait(30)
            work(index)
        except BaseException as exc:  # noqa: BLE001 - raised below
            failures.append(exc)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if failures:
        raise failures[0]
