"""What refusals are merged into, and how many rows a flood of them makes."""

from dataclasses import replace
from datetime import UTC, datetime
from itertools import product
from typing import Any

import pytest

from backend.models.access.audit import AuditAction, AuditEvent, AuditOutcome
from backend.models.access.sources import network_of
from backend.services.access.audit_rows import AuditRows

NOON = datetime(2026, 2, 19, 12, tzinfo=UTC)
HERE, THERE = "192.0.2.1", "192.0.2.2"
KEY = "3f1c0e5a9b7d2468"
HOUR_SECONDS = 60 * 60


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rows(clock: Clock) -> AuditRows:
    return AuditRows(clock)


def event(subject: str | None = None, **over: Any) -> AuditEvent:
    base = AuditEvent(NOON, AuditAction.AUTHENTICATE, AuditOutcome.REFUSED, "nobody", subject, HERE)
    return replace(base, **over)


def taken(rows: AuditRows) -> list[AuditEvent]:
    return [event for _, event in rows.take()]


def test_text_that_callers_choose_makes_no_rows_of_its_own(rows: AuditRows) -> None:
    for number in range(1000):
        rows.add(event(f"node-{number}", reason="missing"))
    assert taken(rows) == [event(None, reason="missing", count=1000)]


def test_subject_that_all_events_share_is_kept(rows: AuditRows) -> None:
    for _ in range(3):
        rows.add(event("node-1", request_id="r"))
    assert taken(rows) == [event("node-1", count=3)]


def test_a_real_credential_has_rows_of_its_own_by_source(rows: AuditRows) -> None:
    for source, credential in ((HERE, KEY), (THERE, KEY), (HERE, "0" * 16), (HERE, KEY)):
        rows.add(event(credential, source=source, reason="secret"), credential)
    assert [(row.source, row.subject, row.count) for row in taken(rows)] == [
        (HERE, KEY, 2),
        (THERE, KEY, 1),
        (HERE, "0" * 16, 1),
    ]


def test_addresses_of_one_network_are_one_source(rows: AuditRows) -> None:
    """An IPv6 host has 2^64 of them: each would have a row, and a budget."""
    for number in range(1, 500):
        rows.add(event(source=f"2001:db8::{number:x}"))
    rows.add(event(source="2001:db8:0:1::1"))
    assert [(row.source, row.count) for row in taken(rows)] == [
        ("2001:db8::/64", 499),
        ("2001:db8:0:1::1", 1),
    ]


def test_a_source_that_floods_for_hours_does_not_fill_the_disk(rows: AuditRows, clock: Clock) -> None:
    """One address wrote 100 KB/s of refusals with names that it chose."""
    actions = (AuditAction.AUTHENTICATE, AuditAction.PROVISION, AuditAction.CHALLENGE)
    reasons = [f"status_{number}" for number in range(10)]
    written = 0
    for _ in range(2 * HOUR_SECONDS // 10):
        clock.now += 10
        for number, (action, reason) in enumerate(product(actions, reasons)):
            rows.add(event(f"node-{clock.now}-{number}", action=action, reason=reason))
        written += len(taken(rows))
    # 17,280 a day, of some 450 bytes each.
    assert written <= 1000 + 2 * HOUR_SECONDS / 5
    # Nothing is dropped: the others wait, merged.
    left = [event for _, event in rows.take(all_of_them=True)]
    assert len(left) <= len(actions) * len(reasons)
    assert {(row.action, row.reason) for row in left} <= set(product(actions, reasons))


def test_a_flood_loses_no_count(rows: AuditRows, clock: Clock) -> None:
    counted = 0
    for turn in range(2000):
        clock.now += 0.01
        rows.add(event(f"node-{turn}", reason=f"status_{turn % 7}"))
        counted += sum(row.count for row in taken(rows))
    assert counted < 2000
    counted += sum(event.count for _, event in rows.take(all_of_them=True))
    assert counted == 2000


def test_attempts_on_a_real_key_keep_their_source_in_an_anonymous_flood(
    rows: AuditRows, clock: Clock
) -> None:
    for turn in range(20):
        clock.now += 1
        for number in range(2000):
            rows.add(event(f"n-{turn}-{number}", source=f"198.51.{number // 250}.{number % 250}"))
        rows.add(event(KEY, source=THERE, reason="secret"), KEY)
        written = taken(rows)
        assert [row.source for row in written if row.subject == KEY] == [THERE]
        # From that many addresses: as many rows as wait at most, and one for the others.
        assert len(written) <= 200 + 1 + 1
        assert sum(row.count for row in written) == 2001


def test_source_over_its_budget_takes_no_rows_from_others(rows: AuditRows, clock: Clock) -> None:
    for number in range(1100):
        rows.add(event(reason=f"r{number % 2}"))
        taken(rows)
    rows.add(event(source=THERE))
    assert [row.source for row in taken(rows)] == [THERE]
    clock.now += 5
    assert [(row.source, row.reason, row.count) for row in taken(rows)] == [(HERE, "r0", 50)]
    clock.now += 5
    assert [(row.source, row.reason, row.count) for row in taken(rows)] == [(HERE, "r1", 50)]


def test_waiting_rows_are_bounded_however_many_credentials_there_are(rows: AuditRows) -> None:
    for number in range(10_000):
        credential = f"{number:016x}"
        rows.add(
            event(credential, reason="secret", source=f"10.0.{number // 250}.{number % 250}"), credential
        )
    written = [event for _, event in rows.take(all_of_them=True)]
    assert len(written) <= 2 * 1000 + 1
    assert sum(row.count for row in written) == 10_000
    # Nothing is said of many that is true of one alone.
    assert all(row.subject is row.source is row.request_id is None for row in written if row.count > 1)


def test_unwritten_rows_are_merged_with_later_events_and_cost_no_budget(
    rows: AuditRows, clock: Clock
) -> None:
    for turn in range(3000):
        rows.add(event(f"node-{turn}", at=NOON.replace(microsecond=turn)))
        rows.put_back(rows.take())
    (row,) = taken(rows)
    assert (row.at, row.count) == (NOON, 3000)


def test_a_notice_of_the_service_has_no_budget(rows: AuditRows) -> None:
    notice = event("node-1", outcome=AuditOutcome.NOTED, actor="service", source=None)
    for _ in range(1500):
        rows.add(notice)
        assert taken(rows) == [notice]


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8::1", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("no:address", "no:address"),
    ],
)
def test_a_source_is_a_network(address: str, network: str) -> None:
    assert network_of(address) == network
