"""Stored answers and used nonces, on both databases."""

from datetime import datetime, timedelta

import sqlalchemy as sa

from backend.adapters.records import idempotency
from backend.models.access.idempotency import ANSWERS_KEPT, Answer
from tests.harness.access_records import LATER, NOON, together


def answer(key_hash: str, node_id: str = "node-1", at: datetime = NOON, body: bytes = b"{}") -> Answer:
    return Answer("token:0123456789abcdef", key_hash, "b" * 64, node_id, body, at)


def find(engine: sa.Engine, key_hash: str) -> Answer | None:
    with engine.connect() as connection:
        return idempotency.find_answer(connection, "token:0123456789abcdef", key_hash)


def test_an_answer_is_found_by_its_callers_key_byte_for_byte(engine: sa.Engine) -> None:
    first, second = answer("1", body=bytes(range(256))), answer("2", at=LATER)
    with engine.begin() as connection:
        idempotency.save_answers(connection, [first, second])
        idempotency.save_answers(connection, [])
        idempotency.save_answers(connection, [answer("1", body=b"another")])
        assert idempotency.find_answer(connection, "local", "1") is None
    assert (find(engine, "1"), find(engine, "2"), find(engine, "3")) == (first, second, None)


def test_answers_are_forgotten_with_their_node_and_with_time(engine: sa.Engine) -> None:
    gone, old, kept = answer("1", "node-1", LATER), answer("2", "node-2"), answer("3", "node-3", LATER)
    with engine.begin() as connection:
        idempotency.save_answers(connection, [gone, old, kept])
        idempotency.forget_answers_of(connection, ["node-1", "node-9"])
        idempotency.forget_answers_of(connection, [])
        idempotency.tidy(connection, LATER + ANSWERS_KEPT)
    assert (find(engine, "1"), find(engine, "2"), find(engine, "3")) == (None, None, kept)


def test_a_nonce_is_accepted_once_for_each_identity(engine: sa.Engine) -> None:
    def burn(*given: tuple[str, str]) -> set[tuple[str, str]]:
        with engine.begin() as connection:
            return idempotency.burn_nonces(connection, [(*pair, LATER) for pair in given])

    assert burn() == set()
    assert burn(("a", "1"), ("a", "2"), ("b", "1"), ("a", "1")) == {("a", "1"), ("a", "2"), ("b", "1")}
    assert burn(("a", "1"), ("b", "2")) == {("b", "2")}
    with engine.begin() as connection:
        idempotency.tidy(connection, LATER + timedelta(seconds=1))
    assert burn(("a", "1"), ("a", "2"), ("b", "1"), ("b", "2")) == set()
    with engine.begin() as connection:
        idempotency.tidy(connection, LATER + timedelta(seconds=1, microseconds=1))
    assert len(burn(("a", "1"), ("a", "2"), ("b", "1"), ("b", "2"))) == 4


def test_a_nonce_that_many_bring_at_once_is_accepted_from_one(engine: sa.Engine) -> None:
    accepted: list[tuple[str, str]] = []

    def burn(index: int) -> None:
        for identity in map(str, range(10)):
            given = [(identity, str(number), LATER) for number in range(200)]
            with engine.begin() as connection:
                accepted.extend(idempotency.burn_nonces(connection, given[:: 1 if index % 2 else -1]))

    together(6, burn)
    assert len(accepted) == len(set(accepted)) == 2000
