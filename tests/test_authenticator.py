"""Which callers are authenticated, what they are authorized for, and what is counted against them."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from backend import errors
from backend.models.access.callers import CallerKind
from backend.models.access.credentials import KeyRequest, Permission, Role, Secret, TokenRequest
from backend.models.access.sources import LimitKind
from tests.harness.access import SOMEWHERE, Access, CommandLine, CountingStore
from tests.harness.fakes import FakeAccessStore


class World(Access):
    """Access control, its store, and the command line beside it."""

    def __init__(self) -> None:
        self.store = CountingStore()
        super().__init__(self.store)
        self.command_line = CommandLine(self.store)
        self.cache.refresh()


@pytest.fixture
def world() -> World:
    return World()


def another_secret_of(known: Secret) -> Secret:
    """Return a secret with the ID of another one."""
    return Secret.parse(f"ocw_{known.id}_{Secret.generate().reveal().rpartition('_')[2]}")


def test_without_recorded_credentials_only_the_local_admin_is_authenticated(world: World) -> None:
    caller = world.authenticate(world.local, source="127.0.0.1")
    assert (caller.kind, caller.name, caller.request_id) == (CallerKind.LOCAL, "local", "r-1")
    for permission in Permission:
        world.authenticator.authorize(caller, permission)
    for source in ("127.0.0.1", "::1", None, SOMEWHERE):
        assert world.refused(source=source) == ("missing", None)
        assert world.refused(Secret.generate(), source=source) == ("unknown", None)
    assert world.refused(another_secret_of(world.local)) == ("unknown", None)
    assert world.authenticate(world.local, source=None).name == "local"


def test_local_admin_is_never_recorded(world: World) -> None:
    assert world.authenticate(world.local).name == "local"
    world.audit.flush()
    assert not world.store.credentials
    assert not world.store.used


def test_without_required_credentials_all_is_allowed_but_to_administer() -> None:
    store = FakeAccessStore()
    secret = CommandLine(store).make(KeyRequest(role=Role.ADMIN))
    access = Access(store, required=False)
    access.cache.refresh()
    for shown in (None, "Basic of-the-app-around-it", f"Bearer {secret.reveal()}"):
        caller = asyncio.run(access.authenticator.authenticate(shown, SOMEWHERE, "r-1"))
        assert (caller.kind, caller.name, caller.operates) == (CallerKind.ANYONE, "anyone", True)
        for permission in set(Permission) - {Permission.ADMINISTER}:
            access.authenticator.authorize(caller, permission)
        with pytest.raises(errors.AuthenticationOffError, match="WIREGUARD_AUTH=off"):
            access.authenticator.authorize(caller, Permission.ADMINISTER)
    assert any("WIREGUARD_AUTH=off" in notice for notice in access.control.notices)


def test_required_credentials_are_no_notice(world: World) -> None:
    assert world.control.notices == ()


def test_credential_made_by_the_command_line_is_known_as_soon_as_it_is_shown(world: World) -> None:
    secret = world.command_line.make(KeyRequest(role=Role.OPERATE))
    assert world.authenticate(secret).name == f"key:{secret.id}"


def test_known_and_malformed_credentials_cost_no_look_into_the_records(world: World) -> None:
    secret = world.command_line.make(KeyRequest(role=Role.ADMIN))
    world.cache.refresh()
    before = world.store.looks
    for _ in range(10):
        world.authenticate(secret)
        with pytest.raises(errors.UnauthenticatedError):
            asyncio.run(world.authenticator.authenticate("Bearer x", SOMEWHERE, "r-1"))
    assert world.store.looks == before


def test_known_credential_is_authenticated_while_the_records_are_away(world: World) -> None:
    secret = world.command_line.make(KeyRequest(role=Role.ADMIN))
    world.cache.refresh()
    world.store.away = True
    assert world.authenticate(secret).name == f"key:{secret.id}"
    with pytest.raises(errors.RecordsUnavailableError):
        world.authenticate(Secret.generate())


def test_refusal_names_what_is_wrong_with_a_credential(world: World) -> None:
    now = datetime.now(UTC)
    from_there = TokenRequest.model_validate({"source_cidr": "203.0.113.0/24"})
    expired = world.command_line.make(TokenRequest(expires_in=60), at=now - timedelta(seconds=61))
    key = world.command_line.make(KeyRequest(role=Role.READ))
    elsewhere = world.command_line.make(from_there)
    world.cache.refresh()
    assert world.refused(expired) == ("expired", expired.id)
    assert world.refused(elsewhere) == ("source", elsewhere.id)
    # A UNIX socket is in no network.
    assert world.refused(elsewhere, source=None) == ("source", elsewhere.id)
    assert world.authenticate(elsewhere, source="::ffff:203.0.113.9").token_id == elsewhere.id
    # The ID is no secret; what belongs to it is.
    assert world.refused(another_secret_of(key)) == ("secret", key.id)


def test_token_is_good_for_the_nodes_that_its_pattern_matches(world: World) -> None:
    secret = world.command_line.make(TokenRequest(node_id_pattern="swarm-*"))
    caller = world.authenticate(secret)
    caller.require_node("swarm-1")
    with pytest.raises(errors.UnauthenticatedError) as caught:
        caller.require_node("other-1")
    assert (caught.value.audit_reason, caught.value.credential_id) == ("node_id", secret.id)
    world.authenticate(world.local).require_node("other-1")


@pytest.mark.parametrize(
    ("role", "allowed"),
    [
        (Role.READ, {Permission.READ}),
        (Role.OPERATE, {Permission.READ, Permission.OPERATE, Permission.PROVISION}),
        (Role.ADMIN, set(Permission)),
    ],
)
def test_key_is_authorized_for_what_its_role_covers(
    world: World, role: Role, allowed: set[Permission]
) -> None:
    caller = world.authenticate(world.command_line.make(KeyRequest(role=role)))
    for permission in allowed:
        world.authenticator.authorize(caller, permission)
    for permission in set(Permission) - allowed:
        with pytest.raises(errors.ForbiddenError, match=f"role {permission.role}"):
            world.authenticator.authorize(caller, permission)


def test_token_is_authorized_to_provision_alone(world: World) -> None:
    caller = world.authenticate(world.command_line.make(TokenRequest()))
    world.authenticator.authorize(caller, Permission.PROVISION)
    for permission in set(Permission) - {Permission.PROVISION}:
        with pytest.raises(errors.ForbiddenError):
            world.authenticator.authorize(caller, permission)


def test_credential_that_was_revoked_while_the_body_came_in_is_refused(world: World) -> None:
    secret = world.command_line.make(KeyRequest(role=Role.ADMIN))
    caller = world.authenticate(secret)
    world.authenticator.authorize(caller, Permission.READ)
    world.command_line.revoke(secret)
    world.cache.refresh()
    with pytest.raises(errors.UnauthenticatedError) as refused:
        world.authenticator.authorize(caller, Permission.READ)
    assert (refused.value.audit_reason, refused.value.credential_id) == ("revoked", secret.id)


def test_credential_that_expired_while_the_body_came_in_is_refused(world: World) -> None:
    secret = world.command_line.make(KeyRequest(role=Role.READ, expires_in=60))
    caller = world.authenticate(secret)
    past = datetime.now(UTC) - timedelta(seconds=1)
    world.store.credentials[secret.id] = replace(world.store.credentials[secret.id], expires_at=past)
    world.cache.reload()
    with pytest.raises(errors.UnauthenticatedError) as refused:
        world.authenticator.authorize(caller, Permission.READ)
    assert (refused.value.audit_reason, refused.value.credential_id) == ("expired", secret.id)


def test_requests_are_counted_by_source_and_credential_and_failures_by_source(world: World) -> None:
    key = world.command_line.make(KeyRequest(role=Role.ADMIN))
    token = world.command_line.make(TokenRequest())
    world.cache.refresh()
    world.authenticate(key)
    world.authenticate(token, source="127.0.0.1")
    world.refused()
    world.refused(Secret.generate(), source=None)
    assert world.limits.hits == [
        (LimitKind.SOURCE, SOMEWHERE),
        (LimitKind.KEY, key.id),
        (LimitKind.SOURCE, "127.0.0.1"),
        (LimitKind.TOKEN, token.id),
        (LimitKind.SOURCE, SOMEWHERE),
        (LimitKind.FAILED_AUTHENTICATION, SOMEWHERE),
        (LimitKind.FAILED_AUTHENTICATION, "unix"),
    ]


@pytest.mark.parametrize("kind", [LimitKind.SOURCE, LimitKind.TOKEN])
def test_caller_over_a_limit_is_told_when_to_come_back(world: World, kind: LimitKind) -> None:
    secret = world.command_line.make(TokenRequest())
    world.limits.full = {kind}
    with pytest.raises(errors.RateLimitedError) as caught:
        world.authenticate(secret)
    assert caught.value.retry_after == 7


def test_source_over_its_limit_of_failures_is_limited_only_where_it_fails(world: World) -> None:
    secret = world.command_line.make(KeyRequest(role=Role.READ))
    world.cache.refresh()
    world.limits.full = {LimitKind.FAILED_AUTHENTICATION}
    for failed in (None, Secret.generate(), another_secret_of(secret)):
        with pytest.raises(errors.RateLimitedError):
            world.authenticate(failed)
    assert world.authenticate(secret).name == f"key:{secret.id}"


def test_used_up_token_may_only_repeat_and_counts_as_a_failure_of_its_source_and_of_itself(
    world: World,
) -> None:
    """Otherwise its holder has bodies read and compared as often as it likes, until the token expires."""
    secret = world.command_line.make(TokenRequest(max_uses=1))
    assert not world.authenticate(secret).may_only_repeat
    world.uses.count(secret.id)
    world.limits.hits.clear()
    assert world.authenticate(secret).may_only_repeat
    assert world.authenticate(secret, source=None).may_only_repeat
    failures = [who for kind, who in world.limits.hits if kind is LimitKind.FAILED_AUTHENTICATION]
    assert failures == [SOMEWHERE, secret.id, "unix", secret.id]
    world.limits.full = {LimitKind.FAILED_AUTHENTICATION}
    with pytest.raises(errors.RateLimitedError):
        world.authenticate(secret)


def test_last_use_is_noted_of_keys_and_counted_by_the_records_of_tokens(world: World) -> None:
    key = world.command_line.make(KeyRequest(role=Role.READ))
    token = world.command_line.make(TokenRequest())
    world.authenticate(key)
    world.authenticate(token)
    world.audit.flush()
    assert set(world.store.used) == {key.id}
    assert datetime.now(UTC) - world.store.used[key.id] < timedelta(minutes=1)
