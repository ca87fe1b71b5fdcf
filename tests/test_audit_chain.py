"""Whatever is done to the audit log by hand, the first row that suffered is named."""

import json
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.models.access.audit import (
    GENESIS,
    AuditAction,
    AuditEntry,
    AuditEvent,
    AuditOutcome,
    AuditRecord,
    chain_hash,
    verify,
)

NOON = datetime(2026, 2, 19, 12, tzinfo=UTC)

# What a careless encoding would take for its own: separators, quotes, names of nothing, parts of others.
awkward = st.text('",[]\\:ab01 \x00\n\u2028\u00e9\U0001f600') | st.sampled_from(["null", "1", GENESIS])
events = st.builds(
    AuditEvent,
    at=st.datetimes(timezones=st.just(UTC)),
    # A checkpoint says where the log begins; it has tests of its own.
    action=st.sampled_from([action for action in AuditAction if action is not AuditAction.AUDIT_PRUNED]),
    outcome=st.sampled_from(AuditOutcome),
    actor=awkward,
    subject=st.none() | awkward,
    source=st.none() | awkward,
    request_id=st.none() | awkward,
    reason=st.none() | awkward,
    count=st.integers(1, 10**6),
)
logs = st.lists(events, min_size=1, max_size=6)


def record(sequence: int, event: AuditEvent, previous: str) -> AuditRecord:
    return AuditRecord(sequence, event, previous, chain_hash(previous, sequence, event))


def written(log: list[AuditEvent]) -> tuple[list[AuditRecord], tuple[int, str]]:
    """Return the rows of a log, and its head."""
    rows: list[AuditRecord] = []
    for sequence, event in enumerate(log, start=1):
        rows.append(record(sequence, event, rows[-1].hash if rows else GENESIS))
    return rows, (len(rows), rows[-1].hash if rows else GENESIS)


def named(rows: list[AuditRecord], head: tuple[int, str]) -> int:
    """Return the row that `verify` names first."""
    said = verify(iter(rows), head)
    assert said is not None
    assert said.endswith(".")
    found = re.match(r"Row (\d+) ", said)
    assert found is not None
    return int(found[1])


@given(st.lists(events, max_size=6))
def test_an_untouched_log_holds(log: list[AuditEvent]) -> None:
    rows, head = written(log)
    assert verify(rows, head) is None


@given(logs, st.data())
def test_a_pruned_log_holds_from_the_start_that_its_newest_checkpoint_names(
    log: list[AuditEvent], data: st.DataObject
) -> None:
    first, last = sorted(data.draw(st.integers(1, len(log))) for _ in range(2))
    whole, _ = written(log)
    for pruned in (first, last):
        subject, reason = str(pruned), whole[pruned - 1].hash
        log = [*log, replace(log[0], action=AuditAction.AUDIT_PRUNED, subject=subject, reason=reason)]
    rows, head = written(log)
    assert verify(rows[last:], head, (last, rows[last - 1].hash)) is None
    other = data.draw(st.integers(0, len(rows) - 1))
    if other != last:
        assert verify(rows[other:], head, (other, rows[other - 1].hash if other else GENESIS)) is not None


@given(logs, events, st.data())
def test_a_changed_row_is_named(log: list[AuditEvent], other: AuditEvent, data: st.DataObject) -> None:
    rows, head = written(log)
    at = data.draw(st.integers(0, len(rows) - 1))
    field = data.draw(st.sampled_from([*AuditEvent.__dataclass_fields__, "hash", "previous_hash"]))
    if field in AuditEvent.__dataclass_fields__:
        changed = replace(rows[at], event=replace(rows[at].event, **{field: getattr(other, field)}))
    else:
        forged: dict[str, Any] = {field: chain_hash(GENESIS, 0, other)}
        changed = replace(rows[at], **forged)
    if changed != rows[at]:
        assert named([*rows[:at], changed, *rows[at + 1 :]], head) == at + 1


@given(logs, events, st.data())
def test_a_row_that_was_changed_with_its_hash_is_named(
    log: list[AuditEvent], other: AuditEvent, data: st.DataObject
) -> None:
    rows, head = written(log)
    at = data.draw(st.integers(0, len(rows) - 1))
    if other != rows[at].event:
        forged = record(at + 1, other, rows[at].previous_hash)
        assert named([*rows[:at], forged, *rows[at + 1 :]], head) == at + 1


@given(logs, st.data())
def test_a_dropped_row_is_named_the_first_and_the_last_ones_too(
    log: list[AuditEvent], data: st.DataObject
) -> None:
    rows, head = written(log)
    first = data.draw(st.integers(0, len(rows) - 1))
    behind = data.draw(st.integers(first + 1, len(rows)))
    assert named(rows[:first] + rows[behind:], head) == first + 1


@given(logs, st.data())
def test_a_dropped_row_is_named_where_the_others_moved_up(log: list[AuditEvent], data: st.DataObject) -> None:
    rows, head = written(log)
    at = data.draw(st.integers(0, len(rows) - 1))
    moved = [replace(row, sequence=row.sequence - 1) for row in rows[at + 1 :]]
    assert named(rows[:at] + moved, head) == at + 1


@pytest.mark.parametrize("with_sequences", [True, False])
@given(logs, st.data())
def test_the_first_row_of_another_order_is_named(
    with_sequences: bool, log: list[AuditEvent], data: st.DataObject
) -> None:
    rows, head = written(log)
    order = data.draw(st.permutations(range(len(rows))))
    moved = [rows[old] for old in order]
    if not with_sequences:
        moved = [replace(row, sequence=sequence) for sequence, row in enumerate(moved, start=1)]
    wrong = next((new for new, old in enumerate(order) if new != old), None)
    if wrong is None:
        assert verify(moved, head) is None
    else:
        assert named(moved, head) == wrong + 1


@given(logs, events, st.data())
def test_an_inserted_row_is_named_or_the_one_behind_it(
    log: list[AuditEvent], other: AuditEvent, data: st.DataObject
) -> None:
    rows, head = written(log)
    at = data.draw(st.integers(0, len(rows)))
    # As well as it can be done: it follows the row before it, and its own hash is right.
    forged = record(at + 1, other, rows[at - 1].hash if at else GENESIS)
    moved = [replace(row, sequence=row.sequence + 1) for row in rows[at:]]
    assert named([*rows[:at], forged, *moved], head) in {at + 1, at + 2}
    assert named([*rows[:at], forged, *rows[at:]], head) == at + 1


@given(logs, st.data())
def test_log_that_begins_or_ends_elsewhere_is_named(log: list[AuditEvent], data: st.DataObject) -> None:
    rows, head = written(log)
    behind = data.draw(st.integers(0, len(rows) - 1))
    # The rows before it gone, and all others written anew.
    again, _ = written([row.event for row in rows[behind + 1 :]])
    assert named(again, head) >= 1
    assert named(rows, (head[0], GENESIS)) == len(rows)
    assert named([], head) == 1
    other = record(1, rows[0].event, rows[-1].hash)
    assert named([other], (1, other.hash)) == 1


@given(events, events, st.integers(1, 3), st.integers(1, 3), st.sampled_from([GENESIS, "1" * 64]))
def test_two_rows_have_one_hash_only_if_they_are_the_same(
    one: AuditEvent, other: AuditEvent, sequence: int, another: int, previous: str
) -> None:
    same = (one, sequence, GENESIS) == (other, another, previous)
    assert (chain_hash(GENESIS, sequence, one) == chain_hash(previous, another, other)) == same


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"subject": "a", "source": None}, {"subject": None, "source": "a"}),
        ({"subject": "null"}, {"subject": None}),
        ({"subject": ""}, {"subject": None}),
        ({"actor": 'a","b'}, {"actor": "a", "subject": "b"}),
        ({"actor": "\u00e9"}, {"actor": "e\u0301"}),
        ({"actor": "\\u00e9"}, {"actor": "\u00e9"}),
        ({"reason": "a\x00"}, {"reason": "a"}),
        ({"reason": "1"}, {"reason": None, "count": 1}),
    ],
)
def test_rows_that_look_alike_have_different_hashes(one: dict[str, str], other: dict[str, str]) -> None:
    base = AuditEvent(NOON, AuditAction.PROVISION, AuditOutcome.ACCEPTED, "local")

    def hashed(values: dict[str, Any]) -> str:
        return chain_hash(GENESIS, 1, replace(base, **values))

    assert hashed(one) != hashed(other)


def test_the_hash_is_that_of_the_documented_text() -> None:
    event = AuditEvent(
        NOON.astimezone(timezone(timedelta(hours=2))),
        AuditAction.PROVISION,
        AuditOutcome.ACCEPTED,
        "token:0123456789abcdef",
        "swarm-node-001",
        "192.0.2.1",
        "r\u00e9-1",
    )
    # By sha256sum, of
    # ["wireguard-provisioning audit 1","000...000",1,"2026-02-19T12:00:00.000000Z","provision",
    # "accepted","token:0123456789abcdef","swarm-node-001","192.0.2.1","r\u00e9-1",null,1]
    # in one line, with 64 zeros.
    assert chain_hash(GENESIS, 1, event) == "ce4943ed79f7df404c95e11f97862b8a87be7257c31d7943dc1ce68a8309c0c4"


@given(st.text(st.characters(), max_size=600), st.none() | st.text(st.characters(), max_size=600))
def test_any_text_of_a_caller_is_storable(actor: str, subject: str | None) -> None:
    event = AuditEvent(NOON, AuditAction.AUTHENTICATE, AuditOutcome.REFUSED, actor, subject)
    kept = event.storable()
    for text in (kept.actor, kept.subject):
        assert text is None or (text.isprintable() and len(text) <= 512)
    assert kept.storable() is kept
    if actor.isprintable() and len(actor) <= 512:
        assert kept.actor == actor


@pytest.mark.parametrize(
    ("text", "kept"),
    [("a\x00b", "a\\x00b"), ("\ud800", "\\ud800"), ("\x1b[2J", "\\x1b[2J"), ("é\n", "é\\n")],
)
def test_unprintable_characters_are_escaped(text: str, kept: str) -> None:
    event = AuditEvent(NOON, AuditAction.AUTHENTICATE, AuditOutcome.REFUSED, "nobody", reason=text)
    assert event.storable().reason == kept


def test_entry_has_every_field_of_the_hash() -> None:
    event = AuditEvent(
        NOON.replace(microsecond=5),
        AuditAction.KEY_MADE,
        AuditOutcome.ACCEPTED,
        "cli:root",
        "key",
    )
    row = record(1, event, GENESIS)
    entry = json.loads(AuditEntry.of(row).model_dump_json())
    assert entry == {
        "sequence": 1,
        "at": "2026-02-19T12:00:00.000005Z",
        "action": "key_made",
        "outcome": "accepted",
        "actor": "cli:root",
        "subject": "key",
        "source": None,
        "request_id": None,
        "reason": None,
        "count": 1,
        "previous_hash": GENESIS,
        "hash": row.hash,
    }


def test_a_log_is_read_once_and_no_further_than_it_must_be() -> None:
    rows, head = written([AuditEvent(NOON, AuditAction.REVERT, AuditOutcome.NOTED, "service")] * 9)
    rows[2] = replace(rows[2], hash=GENESIS)
    reader = iter(rows)
    verify(reader, head)
    assert [row.sequence for row in reader] == [4, 5, 6, 7, 8, 9]
