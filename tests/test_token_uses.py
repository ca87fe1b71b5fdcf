"""How many uses of a token are known in this process."""

import threading
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from backend.models.access.credentials import Credential, CredentialKind, KeyRequest, Role, TokenRequest
from backend.services.access.token_uses import TokenUses
from tests.harness.access import Access
from tests.harness.fakes import FakeAccessStore


@pytest.fixture
def uses() -> TokenUses:
    return TokenUses()


def token(max_uses: int) -> Credential:
    return TokenRequest(max_uses=max_uses).make("cli:root", datetime.now(UTC))[0]


def test_token_is_used_up_after_as_many_uses_as_it_has(uses: TokenUses) -> None:
    made = token(max_uses=2)
    for used in range(3):
        assert uses.used_up(made) == (used >= 2)
        uses.count(made.id)


def test_key_and_no_credential_are_never_used_up(uses: TokenUses) -> None:
    key, _ = KeyRequest(role=Role.READ).make("cli:root", datetime.now(UTC))
    uses.count(key.id)
    assert not uses.used_up(key)
    assert not uses.used_up(None)


def test_uses_that_the_records_counted_before_are_known(uses: TokenUses) -> None:
    made = replace(token(max_uses=3), uses=3)
    uses.load([made])
    assert uses.used_up(made)


def test_later_load_takes_back_no_use(uses: TokenUses) -> None:
    """A load that began before the records had counted a use must not give it back."""
    made = token(max_uses=3)
    uses.load([made])
    for _ in range(2):
        uses.count(made.id)
    uses.load([made])
    uses.count(made.id)
    assert uses.used_up(made)


def test_use_is_counted_once_however_often_the_credentials_are_loaded_meanwhile() -> None:
    store, made = FakeAccessStore(), token(max_uses=2)
    access = Access(store)
    store.credentials[made.id] = made
    access.cache.refresh()
    # The records have counted it, and the change is still under way.
    store.credentials[made.id] = replace(made, uses=1)
    access.credentials.of_kind(CredentialKind.TOKEN)
    access.uses.count(made.id)
    assert not access.uses.used_up(made)
    access.uses.count(made.id)
    assert access.uses.used_up(made)


def test_uses_that_are_counted_at_the_same_time_are_all_counted(uses: TokenUses) -> None:
    made = token(max_uses=4001)

    def count() -> None:
        for _ in range(1000):
            uses.count(made.id)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not uses.used_up(made)
    uses.count(made.id)
    assert uses.used_up(made)
