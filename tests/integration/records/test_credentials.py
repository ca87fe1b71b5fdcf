"""Recorded credentials and how often tokens were used, on both databases."""

from datetime import datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from backend.adapters.records import credentials
from backend.models.access.credentials import Credential, KeyRequest, Role, TokenRequest
from tests.harness.access_records import LATER, NOON, make_token, together


def make_key(engine: sa.Engine, role: Role = Role.READ) -> str:
    key, _ = KeyRequest(role=role).make("cli:root", NOON)
    with engine.begin() as connection:
        credentials.insert_credential(connection, key)
    return key.id


def count(engine: sa.Engine, wanted: dict[str, int], now: datetime = NOON) -> dict[str, int]:
    with engine.begin() as connection:
        return credentials.count_uses(connection, wanted, now)


def stored(engine: sa.Engine) -> dict[str, Credential]:
    with engine.connect() as connection:
        return {found.id: found for found in credentials.load_credentials(connection)}


def uses(engine: sa.Engine) -> dict[str, int]:
    return {name: credential.uses for name, credential in stored(engine).items()}


def test_a_credential_comes_back_as_it_was(engine: sa.Engine) -> None:
    with engine.begin() as connection:
        assert credentials.load_credentials(connection) == []
        assert credentials.credentials_version(connection) == 0
    asked = {"max_uses": 3, "node_id_pattern": "n-*", "source_cidr": "2001:db8::/32"}
    token, _ = TokenRequest.model_validate({**asked, "note": "ünï"}).make("cli:root", NOON)
    key, _ = KeyRequest(role=Role.ADMIN).make("cli:root", NOON + timedelta(microseconds=1))
    with engine.begin() as connection:
        credentials.insert_credential(connection, key)
        credentials.insert_credential(connection, token)
    with engine.connect() as connection:
        assert credentials.load_credentials(connection) == [token, key]
        assert credentials.credentials_version(connection) == 2


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "guest"},
        {"kind": "key", "role": "owner", "max_uses": None},
        {"kind": "key", "role": None, "max_uses": None},
        {"kind": "key", "role": "read"},
        {"role": "admin"},
        {"max_uses": None},
        {"uses": 2},
        {"uses": -1},
    ],
)
def test_constraints_refuse_rows_that_are_no_credential(engine: sa.Engine, values: dict[str, Any]) -> None:
    name = make_token(engine)
    table = credentials.credentials
    with pytest.raises(sa.exc.IntegrityError), engine.begin() as connection:
        connection.execute(sa.update(table).where(table.c.id == name).values(**values))


def test_a_revoked_credential_is_kept_and_stays_as_it_was_revoked_first(engine: sa.Engine) -> None:
    name = make_key(engine)
    for at in (NOON, LATER):
        with engine.begin() as connection:
            revoked = credentials.revoke_credential(connection, name, at)
        assert revoked == stored(engine)[name]
        assert revoked is not None
        assert revoked.revoked_at == NOON
    with engine.begin() as connection:
        assert credentials.revoke_credential(connection, "0" * 16, NOON) is None
        # Made once, revoked once: an act without effect must not make every cache reload.
        assert credentials.credentials_version(connection) == 2


def test_the_last_use_never_goes_back(engine: sa.Engine) -> None:
    first, second = make_key(engine), make_key(engine)
    for used in ({first: LATER}, {first: NOON, second: NOON, "0" * 16: NOON}, {}):
        with engine.begin() as connection:
            credentials.note_used(connection, used)
    assert {name: found.last_used_at for name, found in stored(engine).items()} == {
        first: LATER,
        second: NOON,
    }


def test_a_token_has_no_more_uses_than_it_was_made_with(engine: sa.Engine) -> None:
    name = make_token(engine, max_uses=3)
    assert [count(engine, {name: 1})[name] for _ in range(5)] == [1, 1, 1, 0, 0]
    assert stored(engine)[name].last_used_at == NOON


def test_remaining_uses_are_granted_when_more_are_wanted(engine: sa.Engine) -> None:
    first, second, third = (make_token(engine, max_uses=number) for number in (5, 64, 2))
    key = make_key(engine)
    wanted = {first: 64, second: 64, third: 1, key: 1, "0" * 16: 2}
    assert count(engine, wanted) == {first: 5, second: 64, third: 1, key: 0, "0" * 16: 0}
    assert count(engine, wanted) == {first: 0, second: 0, third: 1, key: 0, "0" * 16: 0}
    assert uses(engine) == {first: 5, second: 64, third: 2, key: 0}
    assert count(engine, {}) == {}
    assert count(engine, {first: 0}) == {first: 0}


def test_many_tokens_of_one_use_are_counted_each(engine: sa.Engine) -> None:
    names = [make_token(engine) for _ in range(20)]
    count(engine, dict.fromkeys(names[::2], 1))
    granted = count(engine, dict.fromkeys(names, 1))
    assert granted == {name: index % 2 for index, name in enumerate(names)}
    assert set(uses(engine).values()) == {1}


@pytest.mark.parametrize("wanted", [1, 2])
def test_expired_or_revoked_token_is_not_counted(engine: sa.Engine, wanted: int) -> None:
    expired, revoked = (make_token(engine, max_uses=9, expires_in=60) for _ in range(2))
    with engine.begin() as connection:
        credentials.revoke_credential(connection, revoked, NOON)
    now = NOON + timedelta(seconds=60)
    assert count(engine, {expired: wanted, revoked: wanted}, now) == {expired: 0, revoked: 0}
    before = now - timedelta(microseconds=1)
    assert count(engine, {expired: wanted, revoked: wanted}, before) == {expired: wanted, revoked: 0}


def test_returned_uses_never_go_below_zero(engine: sa.Engine) -> None:
    first, second = make_token(engine, max_uses=5), make_token(engine, max_uses=5)
    count(engine, {first: 3, second: 3})
    with engine.begin() as connection:
        credentials.return_uses(connection, {first: 2, second: 9, "0" * 16: 1})
        credentials.return_uses(connection, {first: 0})
    assert uses(engine) == {first: 1, second: 0}


def test_uses_of_a_transaction_that_was_rolled_back_were_never_made(engine: sa.Engine) -> None:
    name = make_token(engine, max_uses=5)
    with engine.connect() as connection:
        assert credentials.count_uses(connection, {name: 9}, NOON) == {name: 5}
        connection.rollback()
    assert uses(engine) == {name: 0}


@pytest.mark.parametrize(("most", "each"), [(1, 1), (10, 3)])
def test_one_of_many_concurrent_transactions_gets_the_last_use(
    engine: sa.Engine, most: int, each: int
) -> None:
    for _ in range(5):
        name = make_token(engine, max_uses=most)
        granted: list[int] = []
        together(8, lambda _: granted.append(count(engine, {name: each})[name]))  # noqa: B023 - ends before
        assert sum(granted) == most
        assert uses(engine)[name] == most


def test_concurrent_transactions_with_many_tokens_do_not_deadlock(engine: sa.Engine) -> None:
    names = [make_token(engine, max_uses=60) for _ in range(10)]
    granted: list[int] = []

    def work(index: int) -> None:
        mine = names if index % 2 else names[::-1]
        for _ in range(10):
            wanted = {name: 1 + (index + place) % 3 for place, name in enumerate(mine)}
            granted.append(sum(count(engine, wanted).values()))

    together(6, work)
    assert sum(granted) == 600
    assert set(uses(engine).values()) == {60}
