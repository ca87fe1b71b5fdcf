"""What the interface is told, and what it is never told: the whole service, without a real interface."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from backend import errors
from backend.models.wireguard.interface import InterfaceState
from backend.models.wireguard.keys import WireGuardPrivateKey
from backend.services.hub import interface_sync
from backend.services.hub.drift import Drift
from tests.harness.core import NEVER, World, Worlds
from tests.harness.fakes import FakeHub
from tests.harness.patience import eventually
from tests.harness.requests import new_key

OTHER_VPN = WireGuardPrivateKey.generate().public_key()


@pytest.fixture
def undisturbed(make_world: Worlds) -> World:
    """Start a service that notices by its batches alone what has changed."""
    return make_world(look_every=NEVER)


def told(hub: FakeHub) -> tuple[object, ...]:
    """Return what the interface has, and how often it was told anything."""
    return dict(hub.table), hub.syncs, hub.changes


def does_nothing(_added: object, _removed: object) -> Callable[[], None]:
    """Say that the peers were changed, and change none."""
    return lambda: None


# A few changes, or everything


def test_a_change_of_peers_disturbs_no_other_peer(world: World, fake_hub: FakeHub) -> None:
    # `wg syncconf` sets the port, and wireguard-go drops what arrives while it opens its socket anew.
    at_the_start = fake_hub.syncs
    for number in range(3):
        world.provision(f"node-{number}")
    world.deprovision("node-1")
    assert (fake_hub.syncs, fake_hub.changes) == (at_the_start, 4)


def test_a_removal_that_did_not_happen_is_followed_by_a_full_sync(
    world: World, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.provision("node-1")
    monkeypatch.setattr(fake_hub, "change", does_nothing)
    world.deprovision("node-1")
    eventually(lambda: fake_hub.table == {})


def test_an_addition_that_did_not_happen_is_followed_by_a_full_sync(
    world: World, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_the_start = fake_hub.syncs
    monkeypatch.setattr(fake_hub, "change", does_nothing)
    key = new_key()
    world.provision("node-1", key)
    eventually(lambda: fake_hub.table == {key: frozenset({"10.0.0.2/32"})})
    assert fake_hub.syncs == at_the_start + 1


def test_a_change_that_fails_is_followed_by_a_full_sync_before_the_answer(
    undisturbed: World, fake_hub: FakeHub
) -> None:
    at_the_start = fake_hub.syncs
    fake_hub.failures = 1
    key = new_key()
    undisturbed.provision("node-1", key)
    assert fake_hub.table == {key: frozenset({"10.0.0.2/32"})}
    assert fake_hub.syncs == at_the_start + 1


def test_an_interface_that_took_a_refused_peer_loses_it_again(world: World, fake_hub: FakeHub) -> None:
    fake_hub.takes_it_but_fails = True
    with pytest.raises(errors.HubUpdateError):
        world.provision("node-1")
    fake_hub.takes_it_but_fails = False
    eventually(lambda: fake_hub.table == {})
    assert world.service.list_provisioned_peers() == {}


@pytest.mark.parametrize("shared", ["key", "address"])
def test_removal_keeps_the_key_or_address_of_an_operators_peer(
    world: World, fake_hub: FakeHub, shared: str
) -> None:
    key = new_key()
    address = str(world.provision("node-1", key).assigned_ip)
    theirs = key if shared == "key" else new_key()
    allowed = address if shared == "address" else "10.0.0.9"
    before_the_edit = fake_hub.syncs
    world.append(theirs, f"{allowed}/32")
    # Else it would be the removal's batch that notices the edit, and tells the interface everything for that.
    eventually(lambda: fake_hub.syncs > before_the_edit)
    assert fake_hub.table[key] == {f"{address}/32"}
    world.deprovision("node-1")
    assert fake_hub.table == {theirs: frozenset({f"{allowed}/32"})}


# Comparing the interface with the file


def test_changes_of_the_interface_by_hand_are_undone(
    world: World, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interface_sync, "_VERIFY_INTERVAL_SECONDS", 0.0)
    key = new_key()
    world.provision("node-1", key)
    table = dict(fake_hub.table)
    fake_hub.table = {}
    eventually(lambda: fake_hub.table == table)
    fake_hub.table = {**table, new_key(): frozenset({"10.0.0.9/32"})}
    eventually(lambda: fake_hub.table == table)


def test_an_interface_that_silently_drops_a_peer_turns_readiness_red(make_world: Worlds) -> None:
    class Forgetful(FakeHub):
        def state(self) -> InterfaceState:
            return replace(super().state(), peers={})

    world = make_world(hub=Forgetful())
    world.provision("node-1")
    eventually(lambda: world.reconciler.problem is not None)
    with pytest.raises(errors.HubUpdateError, match=r"did not take the config: 1 peer\(s\) missing"):
        world.check()
    # From here on no peer is added before the interface is what it should be.
    with pytest.raises(errors.HubUpdateError, match=r"did not take the config: 1 peer\(s\) missing"):
        world.provision("node-2")


def test_values_that_a_sync_leaves_behind_are_cleared(make_world: Worlds) -> None:
    class Marked(FakeHub):
        mark = 5

        def state(self) -> InterfaceState:
            return replace(super().state(), fwmark=self.mark)

        def clear(self, drift: Drift) -> None:
            assert drift.fwmark
            self.mark = 0

    hub = Marked()
    world = make_world(hub=hub, look_every=NEVER)
    world.check()
    assert hub.mark == 0


def test_a_link_problem_turns_readiness_red(
    undisturbed: World, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(fake_hub, "link_problem", lambda: "the link of wg0 is down")
        with pytest.raises(errors.HubUpdateError, match="link of wg0 is down"):
            undisturbed.check()
    undisturbed.check()


# Another program's interface


@pytest.mark.parametrize("key", [OTHER_VPN, None], ids=["another key", "no key"])
def test_an_interface_with_another_key_or_with_peers_but_no_key_is_never_written_to(
    make_world: Worlds, fake_hub: FakeHub, key: str | None
) -> None:
    fake_hub.key = key
    fake_hub.table = {new_key(): frozenset({"10.9.0.2/32"})}
    before = told(fake_hub)
    world = make_world()
    with pytest.raises(errors.HubUpdateError, match="another private key"):
        world.provision("node-1")
    with pytest.raises(errors.HubUpdateError, match="another private key"):
        world.check()
    assert (told(fake_hub), fake_hub.key) == (before, key)


def test_an_interface_of_another_program_that_came_between_two_batches_is_never_written_to(
    undisturbed: World, fake_hub: FakeHub
) -> None:
    undisturbed.provision("node-1")
    fake_hub.vanish()
    fake_hub.come_back()
    fake_hub.key, fake_hub.table = OTHER_VPN, {new_key(): frozenset({"10.9.0.2/32"})}
    before = told(fake_hub)
    for _ in range(2):
        with pytest.raises(errors.HubUpdateError, match="another private key"):
            undisturbed.provision("node-2")
    assert told(fake_hub) == before
    assert undisturbed.text.count("[Peer]") == 1
