"""The sequence, against a real file, and doubles of interface and records."""

import errno
import json
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from backend import errors
from backend.adapters.wireguard.wg import FileOnly
from backend.models.wireguard.interface_state import InterfaceState
from backend.models.wireguard.keys import WireGuardPrivateKey
from backend.models.wireguard.provisioning import ProvisioningRequest
from backend.services.configurations import Configurations
from backend.services.hub import hub_committer, hub_mirror
from backend.services.hub.history import HubHistory
from backend.services.hub.hub_committer import HubCommitter
from backend.services.hub.hub_mirror import HubMirror
from backend.services.hub.mark import HubMark
from backend.services.hub.operator_peers import OperatorPeers
from backend.services.hub.removal_guard import RemovalGuard
from backend.services.ip_pool_manager import IPPoolManager
from backend.services.ports import AccessStore, Batch, Hub, Journal
from backend.services.wireguard_config_manager import WireGuardConfigManager
from backend.services.wireguard_provisioning_service import (
    DuplicatePeerError,
    InvalidCredentialsError,
    IPPoolExhaustedError,
    WireGuardProvisioningService,
)
from tests.harness.access import Access
from tests.harness.fakes import FakeAccessStore, FakeHub, FlakyJournal, GatedJournal
from tests.harness.memory_journal import MemoryJournal
from tests.harness.patience import eventually
from tests.harness.requests import new_key, provision_body

WAIT = 10.0


class World:
    """A service with everything around it that a test may look at."""

    def __init__(
        self, directory: Path, journal: Journal, hub: Hub, network: str, store: AccessStore | None = None
    ) -> None:
        self.hub_key = WireGuardPrivateKey.generate()
        self.path = directory / "wg0.conf"
        if not self.path.exists():
            self.path.write_text(f"[Interface]\nPrivateKey = {self.hub_key.reveal()}\nListenPort = 51820\n")
            self.path.chmod(0o600)
        self.pool = IPPoolManager(network, ["10.0.0.1"])
        hand_made = OperatorPeers(self.pool)
        guard = RemovalGuard(journal.removed_keys)
        self.config = WireGuardConfigManager(self.path)
        store = store or FakeAccessStore()
        access = Access(store)
        mirror = HubMirror(self.config, hub, hand_made, guard=guard)
        self.service = WireGuardProvisioningService(
            pool=self.pool,
            hand_made=hand_made,
            committer=HubCommitter(
                journal, mirror, hand_made, HubHistory(journal, mirror, guard, HubMark(self.config.path))
            ),
            configurations=Configurations(
                self.pool.network, "hub.example.com:51820", IPv4Address("10.0.0.1"), hand_made
            ),
            access=access.control,
            token_uses=access.uses,
            store=store,
        )

    def provision(self, node_id: str, key: str | None = None, **over: Any) -> Any:
        return self.service.provision_peer(request(node_id, key, **over), timeout=WAIT)

    @property
    def text(self) -> str:
        return self.path.read_text()


def request(node_id: str, key: str | None = None, **over: Any) -> ProvisioningRequest:
    return ProvisioningRequest.model_validate(provision_body(node_id, key, **over))


MakeWorld = Callable[..., World]


@pytest.fixture
def hub() -> FakeHub:
    return FakeHub()


@pytest.fixture
def make_world(tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeWorld]:
    """Start worlds, and close them at the end."""
    monkeypatch.setattr(hub_committer, "HEAL_INTERVAL_SECONDS", 0.02)
    worlds: list[World] = []

    def make(journal: Journal | None = None, *, hub: Hub = hub, network: str = "10.0.0.0/24") -> World:
        world = World(tmp_path, journal or MemoryJournal(), hub, network)
        world.service.start()
        worlds.append(world)
        return world

    yield make
    for world in worlds:
        world.service.close()


@pytest.fixture
def world(make_world: MakeWorld) -> World:
    return make_world()


def test_a_provisioned_peer_is_in_list_file_and_interface(world: World, hub: FakeHub) -> None:
    key = new_key()
    config = world.provision("node-1", key)
    assert config.model_dump(mode="json") == {
        "node_id": "node-1",
        "assigned_ip": "10.0.0.2",
        "subnet_mask": "255.255.255.0",
        "hub_public_key": world.hub_key.public_key(),
        "hub_endpoint": "hub.example.com:51820",
        "allowed_ips": "10.0.0.0/24",
        "persistent_keepalive": 25,
        "dns_servers": ["10.0.0.1"],
        "provisioned_at": config.provisioned_at.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    assert world.service.list_provisioned_peers() == {"node-1": config}
    assert world.service.get_peer_config("node-1") == config
    assert hub.table == {key: frozenset({"10.0.0.2/32"})}
    assert f"PublicKey = {key}\nAllowedIPs = 10.0.0.2/32\n" in world.text


def test_the_json_of_a_configuration_is_that_of_the_model(world: World) -> None:
    configs = {node_id: world.provision(node_id) for node_id in ("node-1", "-", "n" * 128)}
    for node_id, config in configs.items():
        assert world.service.get_peer_json(node_id) == config.model_dump_json()
    for number in range(600):
        world.service._by_node[f"more-{number}"] = world.service._by_node["node-1"]
    listed = b"".join(world.service.list_json())
    assert json.loads(listed)["-"] == configs["-"].model_dump(mode="json")
    assert listed.count(b'"assigned_ip":"10.0.0.2"') == 601


def test_the_hub_gets_no_keepalive_of_its_own(world: World) -> None:
    world.provision("node-1")
    assert "PersistentKeepalive" not in world.text


def test_a_deprovisioned_peer_is_nowhere_and_its_address_comes_back(world: World, hub: FakeHub) -> None:
    before = world.text
    world.provision("node-1")
    world.service.deprovision_peer("node-1", WAIT)
    assert (world.text, hub.table, world.service.list_provisioned_peers()) == (before, {}, {})
    with pytest.raises(errors.PeerNotFoundError, match="Peer node-1 not found"):
        world.service.get_peer_config("node-1")
    assert str(world.provision("node-2").assigned_ip) == "10.0.0.2"


def test_deprovisioning_an_unknown_peer_is_refused(world: World) -> None:
    with pytest.raises(errors.PeerNotFoundError):
        world.service.deprovision_peer("nobody", WAIT)


def test_a_retry_with_the_same_keys_is_shown_the_whole_configuration(world: World) -> None:
    key = new_key()
    config = world.provision("node-1", key)
    with pytest.raises(DuplicatePeerError, match="Peer node-1 is already provisioned") as refused:
        world.provision("node-1", key)
    assert refused.value.existing_config == config.model_dump(mode="json")


@pytest.mark.parametrize("other", [{"public_key": "another"}, {"wireguard_public_key": new_key()}])
def test_the_same_node_with_another_key_learns_only_its_address(world: World, other: dict[str, str]) -> None:
    key = new_key()
    world.provision("node-1", key)
    with pytest.raises(DuplicatePeerError) as refused:
        world.provision("node-1", key, **other)
    assert refused.value.existing_config == {"node_id": "node-1", "assigned_ip": "10.0.0.2"}


def test_a_key_of_another_node_is_refused_without_a_word_about_that_node(world: World) -> None:
    key = new_key()
    world.provision("node-1", key)
    with pytest.raises(DuplicatePeerError) as refused:
        world.provision("node-2", key)
    assert refused.value.existing_config == {}
    assert "node-1" not in str(refused.value)


def test_the_hubs_own_key_is_refused(world: World, hub: FakeHub) -> None:
    before = world.text
    with pytest.raises(InvalidCredentialsError, match="the hub's own key"):
        world.provision("node-1", world.hub_key.public_key())
    assert (world.text, hub.table) == (before, {})


def test_an_exhausted_pool_refuses_without_touching_the_file(make_world: MakeWorld) -> None:
    world = make_world(network="10.0.0.0/30")
    world.provision("node-1")
    before = world.path.stat()
    with pytest.raises(IPPoolExhaustedError, match=r"1 addresses allocated from range 10\.0\.0\.0/30"):
        world.provision("node-2")
    with pytest.raises(IPPoolExhaustedError):
        world.service.check()
    assert world.path.stat() == before


def test_a_hub_that_fails_leaves_nothing_of_the_batch(world: World, hub: FakeHub) -> None:
    world.provision("node-1")
    before, table = world.text, dict(hub.table)
    hub.broken = "out of order"
    with pytest.raises(errors.HubUpdateError, match="out of order"):
        world.provision("node-2")
    with pytest.raises(errors.HubUpdateError):
        world.service.deprovision_peer("node-1", WAIT)
    assert (world.text, hub.table) == (before, table)
    assert list(world.service.list_provisioned_peers()) == ["node-1"]
    assert world.service.get_pool_stats()["allocated_addresses"] == 1
    with pytest.raises(errors.HubUpdateError):
        world.service.check()
    hub.broken = None
    assert str(world.provision("node-2").assigned_ip) == "10.0.0.3"
    world.service.check()


def test_an_interface_that_took_a_refused_peer_loses_it_again(world: World, hub: FakeHub) -> None:
    hub.takes_it_but_fails = True
    with pytest.raises(errors.HubUpdateError):
        world.provision("node-1")
    hub.takes_it_but_fails = False
    eventually(lambda: hub.table == {})
    assert world.service.list_provisioned_peers() == {}


def test_a_missing_interface_refuses_and_heals_by_itself(world: World, hub: FakeHub) -> None:
    key = new_key()
    world.provision("node-1", key)
    before = world.path.stat()
    hub.vanish()
    with pytest.raises(errors.HubUpdateError, match="interface wg0 does not exist; bring it up"):
        world.provision("node-2")
    with pytest.raises(errors.HubUpdateError):
        world.service.check()
    assert world.path.read_text().count("[Peer]") == 1
    hub.come_back()
    eventually(lambda: hub.table == {key: frozenset({"10.0.0.2/32"})})
    world.service.check()
    assert world.path.stat().st_size == before.st_size


def test_an_interface_that_was_missing_at_the_start_gets_its_peers_when_it_comes(
    make_world: MakeWorld, hub: FakeHub
) -> None:
    hub.vanish()
    world = make_world()
    with pytest.raises(errors.HubUpdateError):
        world.service.check()
    hub.come_back()
    eventually(lambda: hub.syncs > 0)
    world.provision("node-1")


def test_a_change_of_peers_disturbs_nobody_else(world: World, hub: FakeHub) -> None:
    # `wg syncconf` sets the port, and wireguard-go drops what arrives while it opens its socket anew.
    at_the_start = hub.syncs
    for number in range(3):
        world.provision(f"node-{number}")
    world.service.deprovision_peer("node-1", WAIT)
    assert (hub.syncs, hub.changes) == (at_the_start, 4)


def test_a_removal_that_did_not_happen_is_followed_by_the_whole_truth(
    world: World, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.provision("node-1")
    monkeypatch.setattr(hub, "change", lambda _added, _removed: None)
    world.service.deprovision_peer("node-1", WAIT)
    eventually(lambda: hub.table == {})


def test_a_change_that_did_not_do_what_it_said_is_followed_by_the_whole_truth(
    world: World, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_the_start = hub.syncs
    monkeypatch.setattr(hub, "change", lambda _added, _removed: None)
    key = new_key()
    world.provision("node-1", key)
    eventually(lambda: hub.table == {key: frozenset({"10.0.0.2/32"})})
    assert hub.syncs == at_the_start + 1


def test_an_edit_by_hand_reaches_the_interface_by_itself(world: World, hub: FakeHub) -> None:
    world.provision("node-1")
    at_the_start = hub.syncs
    world.path.write_text(world.text.replace("51820", "51821"))
    eventually(lambda: hub.syncs > at_the_start)
    key = new_key()
    with world.path.open("a") as file:
        file.write(f"\n[Peer]\nPublicKey = {key}\nAllowedIPs = 192.168.7.0/24\n")
    eventually(lambda: key in hub.table)


def test_a_backup_that_lacks_our_peers_is_completed_by_itself(world: World, hub: FakeHub) -> None:
    without = world.text
    key = new_key()
    world.provision("node-1", key)
    world.path.write_text(without)
    eventually(lambda: key in world.text)
    world.path.unlink()
    with pytest.raises(errors.ConfigFileError):
        world.service.check()
    world.path.write_text(without)
    eventually(lambda: key in world.text)
    world.service.check()


def test_what_somebody_did_to_the_interface_by_hand_is_undone(
    world: World, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_mirror, "_VERIFY_INTERVAL_SECONDS", 0.0)
    key = new_key()
    world.provision("node-1", key)
    table = dict(hub.table)
    hub.table = {}
    eventually(lambda: hub.table == table)
    hub.table = {**table, new_key(): frozenset({"10.0.0.9/32"})}
    eventually(lambda: hub.table == table)


@pytest.mark.parametrize("shared", ["key", "address"])
def test_a_hand_made_peer_keeps_what_a_deleted_peer_of_ours_had_too(
    world: World, hub: FakeHub, shared: str
) -> None:
    key = new_key()
    address = world.provision("node-1", key).assigned_ip
    theirs = key if shared == "key" else new_key()
    allowed = address if shared == "address" else "10.0.0.9"
    before_the_edit = hub.syncs
    with world.path.open("a") as file:
        file.write(f"\n[Peer]\nPublicKey = {theirs}\nAllowedIPs = {allowed}/32\n")
    # Else it would be the removal's batch that notices the edit, and tells the interface everything for that.
    eventually(lambda: hub.syncs > before_the_edit)
    assert hub.table[key] == {f"{address}/32"}
    world.service.deprovision_peer("node-1", WAIT)
    assert hub.table == {theirs: frozenset({f"{allowed}/32"})}


def test_readiness_says_what_a_provision_would_meet_now(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("backend.services.hub.staged_file._make_temporary", full)
        with pytest.raises(errors.HubUpdateError, match="No space left on device; make room on its disk"):
            world.service.check()
        with pytest.raises(errors.HubUpdateError, match="No space left"):
            world.provision("node-1")
    world.service.check()
    world.provision("node-1")


def test_whoever_was_answered_finds_the_service_ready(make_world: MakeWorld, hub: FakeHub) -> None:
    bookkeeping = threading.Event()

    class Slow(MemoryJournal):
        def apply(self, batch: Batch) -> str | None:
            failure = super().apply(batch)
            if failure is None:
                bookkeeping.wait(WAIT)
            return failure

    world = make_world(Slow())
    hub.failures = 3
    with pytest.raises(errors.HubUpdateError):
        world.provision("node-1")
    world.provision("node-1")
    world.service.check()  # although the batch that answered hasn't come to its end
    bookkeeping.set()


def test_a_full_disk_turns_readiness_red_before_anybody_asks(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_fd: int, _offset: int, size: int) -> None:
        assert size > len(world.text)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", full)
        with pytest.raises(errors.HubUpdateError, match="make room on its disk"):
            world.service.check()
    world.service.check()
    assert list(world.path.parent.glob("*.tmp")) == []


def test_a_batch_that_takes_long_turns_readiness_red(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_committer, "_LONG_BATCH_SECONDS", 0.0)
    gate, entered = threading.Event(), threading.Event()

    def enter(_: Batch) -> None:
        entered.set()
        gate.wait(WAIT)

    world = make_world(GatedJournal(enter))
    answer = world.service.submit_provision(request("node-1"))
    assert entered.wait(WAIT)
    with pytest.raises(errors.HubUpdateError, match="unusually long"):
        world.service.check()
    gate.set()
    answer.result(WAIT)


def test_a_process_whose_records_another_one_writes_stops_for_good(
    make_world: MakeWorld, hub: FakeHub
) -> None:
    journal = FlakyJournal()
    world = make_world(journal)
    world.provision("node-1")
    before, table = world.text, dict(hub.table)
    journal.overtake()
    for _ in range(2):
        with pytest.raises(errors.OvertakenError, match="Another process has written"):
            world.provision("node-2")
        with pytest.raises(errors.OvertakenError):
            world.service.deprovision_peer("node-1", WAIT)
        with pytest.raises(errors.OvertakenError):
            world.service.check()
    assert (world.text, hub.table) == (before, table)


def test_a_batch_in_doubt_whose_records_another_process_has_is_never_called_done(
    make_world: MakeWorld, hub: FakeHub
) -> None:
    journal = FlakyJournal()
    world = make_world(journal)
    journal.failing_at = {"intended", "load"}
    answer = world.service.submit_provision(request("node-1"))
    eventually(lambda: world.service._committer._doubtful is not None)
    assert not answer.done()
    journal.overtake()
    journal.failing_at = set()
    with pytest.raises(errors.OvertakenError):
        answer.result(WAIT)


def test_a_stop_does_not_wait_for_ever_and_leaves_nobody_waiting(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_committer, "_STOP_SECONDS", 0.1)
    journal = FlakyJournal()
    world = make_world(journal)
    journal.failing_at = {"intended", "load"}
    answer = world.service.submit_provision(request("node-1"))
    eventually(lambda: world.service._committer._doubtful is not None)
    world.service.close()
    with pytest.raises(errors.OutcomeUnknownError):
        answer.result(0)


def test_a_record_that_can_not_be_handed_over_leaves_name_key_and_address_free(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise errors.RecordsUnavailableError("no")

    body = request("node-1")
    with monkeypatch.context() as patch:
        patch.setattr(world.service, "_store_provisioning_record", refuse)
        with pytest.raises(errors.RecordsUnavailableError):
            world.service.provision_peer(body, WAIT)
    assert str(world.service.provision_peer(body, WAIT).assigned_ip) == "10.0.0.2"


def test_an_interface_that_silently_drops_a_peer_turns_readiness_red(make_world: MakeWorld) -> None:
    class Forgetful(FakeHub):
        def state(self) -> InterfaceState:
            return replace(super().state(), peers={})

    world = make_world(hub=Forgetful())
    world.provision("node-1")
    eventually(lambda: world.service._committer._mirror.problem is not None)
    with pytest.raises(errors.HubUpdateError, match=r"did not take the config: 1 peer\(s\) missing"):
        world.service.check()
    # From here on nobody is let in before the interface is what it should be.
    with pytest.raises(errors.HubUpdateError, match=r"did not take the config: 1 peer\(s\) missing"):
        world.provision("node-2")


def test_without_an_interface_only_the_file_is_kept(make_world: MakeWorld) -> None:
    world = make_world(hub=FileOnly())
    key = new_key()
    world.provision("node-1", key)
    world.service.check()
    assert not world.service.live
    assert key in world.text


def test_an_operators_peer_keeps_its_key_and_address(world: World) -> None:
    key = new_key()
    with world.path.open("a") as file:
        file.write(f"\n[Peer]\n# mine\nPublicKey = {key}\nAllowedIPs = 10.0.0.2/32, 10.0.0.4/31\n")
    eventually(lambda: world.service.get_pool_stats()["reserved_addresses"] == 4)
    assert [str(world.provision(f"node-{i}").assigned_ip) for i in range(2)] == ["10.0.0.3", "10.0.0.6"]
    with pytest.raises(DuplicatePeerError) as refused:
        world.provision("node-9", key)
    assert refused.value.existing_config == {}


def test_an_address_that_an_operator_takes_in_the_meantime_is_not_shared(make_world: MakeWorld) -> None:
    gate, entered = threading.Event(), threading.Event()

    def enter(_: Batch) -> None:
        entered.set()
        gate.wait(WAIT)

    world = make_world(GatedJournal(enter))
    first = world.service.submit_provision(request("node-1"))
    assert entered.wait(WAIT)
    second = world.service.submit_provision(request("node-2"))  # has reserved 10.0.0.3, and waits
    with world.path.open("a") as file:
        file.write(f"\n[Peer]\nPublicKey = {new_key()}\nAllowedIPs = 10.0.0.3/32\n")
    gate.set()
    first.result(WAIT)
    with pytest.raises(errors.AddressTakenError, match=r"10\.0\.0\.3"):
        second.result(WAIT)
    assert str(world.provision("node-2").assigned_ip) == "10.0.0.4"


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda text: text.replace("PrivateKey", "#PrivateKey"), "PrivateKey"),
        (lambda text: text.replace("[Interface]", "[Interface]\nSaveConfig = true"), "SaveConfig"),
        (lambda text: text.replace("[Interface]", "[Interface]\nnonsense"), "line"),
    ],
)
def test_a_file_that_an_operator_broke_is_refused_until_it_is_mended(
    world: World, hub: FakeHub, edit: Callable[[str], str], says: str
) -> None:
    world.provision("node-1")
    whole, table = world.text, dict(hub.table)
    world.path.write_text(edit(whole))
    broken = world.text
    with pytest.raises(errors.ConfigFileError, match=says):
        world.provision("node-2")
    with pytest.raises(errors.ConfigFileError, match=says):
        world.service.check()
    assert (world.text, hub.table) == (broken, table)
    world.path.write_text(whole)
    world.provision("node-2")


def test_a_vanished_file_is_not_made_up(world: World) -> None:
    world.provision("node-1")
    text = world.text
    world.path.unlink()
    with pytest.raises(errors.ConfigFileError):
        world.provision("node-2")
    assert not world.path.exists()
    world.path.write_text(text)
    world.provision("node-2")


def test_two_requests_for_one_node_at_once_get_one_address(make_world: MakeWorld) -> None:
    gate = threading.Event()
    world = make_world(GatedJournal(lambda _: gate.wait(WAIT)))
    body = request("node-1")
    answers = [world.service.submit_provision(body) for _ in range(8)]
    # Until the first is decided, the others can't be told that it is there: it may still fail.
    assert not any(answer.done() for answer in answers)
    with pytest.raises(errors.PeerNotFoundError):
        world.service.get_peer_config("node-1")
    gate.set()
    answers[0].result(WAIT)
    config = world.service.get_peer_config("node-1")
    for answer in answers[1:]:
        with pytest.raises(DuplicatePeerError) as refused:
            answer.result(WAIT)
        assert refused.value.existing_config == config.model_dump(mode="json")


def test_a_request_behind_one_that_fails_gets_its_own_chance(make_world: MakeWorld, hub: FakeHub) -> None:
    gate, batches = threading.Event(), list[Batch]()

    def enter(batch: Batch) -> None:
        batches.append(batch)
        gate.wait(WAIT)
        if len(batches) == 1:
            hub.failures = 3  # the change, everything, and putting it back

    world = make_world(GatedJournal(enter))
    key = new_key()
    first = world.service.submit_provision(request("node-1", key))
    second = world.service.submit_provision(request("node-2", key))
    gate.set()
    with pytest.raises(errors.HubUpdateError, match="not this time"):
        first.result(WAIT)
    assert second.result(WAIT).node_id == "node-2"


def test_a_node_that_comes_while_it_is_being_removed_comes_afterwards(make_world: MakeWorld) -> None:
    gate = threading.Event()
    gate.set()
    world = make_world(GatedJournal(lambda _: gate.wait(WAIT)))
    body = request("node-1")
    world.service.provision_peer(body, WAIT)
    gate.clear()
    gone = world.service.submit_deprovision("node-1")
    again = world.service.submit_provision(body)
    twice = world.service.submit_deprovision("node-1")
    gate.set()
    assert gone.result(WAIT) is None
    assert again.result(WAIT).node_id == "node-1"
    twice.result(WAIT)
    with pytest.raises(errors.PeerNotFoundError):
        world.service.deprovision_peer("node-1", WAIT)


def test_what_waits_together_is_committed_together(make_world: MakeWorld) -> None:
    gate, sizes = threading.Event(), list[int]()

    def enter(batch: Batch) -> None:
        sizes.append(len(batch.changes))
        gate.wait(WAIT)

    world = make_world(GatedJournal(enter))
    first = world.service.submit_provision(request("node-0"))
    eventually(lambda: sizes == [1])
    answers = [world.service.submit_provision(request(f"node-{i}")) for i in range(1, 50)]
    gate.set()
    addresses = {answer.result(WAIT).address for answer in [first, *answers]}
    assert sizes == [1, 49]
    assert len(addresses) == 50


def test_a_caller_that_has_gone_away_harms_nobody(make_world: MakeWorld) -> None:
    gate = threading.Event()
    world = make_world(GatedJournal(lambda _: gate.wait(WAIT)))
    gone = world.service.submit_provision(request("node-1"))
    assert gone.cancel()
    gate.set()
    world.provision("node-2")
    assert list(world.service.list_provisioned_peers()) == ["node-1", "node-2"]


def test_a_stopping_service_finishes_what_it_accepted_and_takes_nothing_more(make_world: MakeWorld) -> None:
    world = make_world()
    answers = [world.service.submit_provision(request(f"node-{i}")) for i in range(20)]
    world.service.close()
    assert len({answer.result(0).address for answer in answers}) == 20
    with pytest.raises(errors.HubUpdateError, match="stopping"):
        world.provision("late")
    with pytest.raises(errors.HubUpdateError, match="stopping"):
        world.service.deprovision_peer("node-1", WAIT)
    assert "late" not in world.service.list_provisioned_peers()
    assert "node-1" in world.service.list_provisioned_peers()
    assert world.service.get_pool_stats()["allocated_addresses"] == 20


def test_records_that_refuse_a_batch_leave_nothing_of_it(make_world: MakeWorld, hub: FakeHub) -> None:
    journal = FlakyJournal()
    world = make_world(journal)
    world.provision("node-1")
    before, table = world.text, dict(hub.table)
    journal.failing_at = {"intend"}
    with pytest.raises(errors.RecordsUnavailableError):
        world.provision("node-2")
    assert (world.text, hub.table) == (before, table)
    journal.failing_at = set()
    assert str(world.provision("node-2").assigned_ip) == "10.0.0.3"


@pytest.mark.parametrize("moment", ["intended", "applied"])
def test_a_batch_whose_records_were_written_counts_although_the_answer_was_lost(
    make_world: MakeWorld, hub: FakeHub, moment: str
) -> None:
    journal = FlakyJournal()
    world = make_world(journal)
    journal.failing_at = {moment}
    key = new_key()
    config = world.provision("node-1", key)
    assert hub.table == {key: frozenset({f"{config.assigned_ip}/32"})}
    assert key in world.text
    with pytest.raises(DuplicatePeerError):
        world.provision("node-1", key)


def test_nobody_is_answered_before_the_records_say_what_became_of_it(
    make_world: MakeWorld, hub: FakeHub
) -> None:
    journal = FlakyJournal()
    world = make_world(journal)
    journal.failing_at = {"intended", "load"}
    doubtful = world.service.submit_provision(request("node-1"))
    eventually(lambda: world.service._committer._doubtful is not None)
    assert not doubtful.done()
    with pytest.raises(errors.RecordsUnavailableError, match="still being looked up; nothing was changed"):
        world.provision("node-2")
    with pytest.raises(errors.RecordsUnavailableError, match="looked up"):
        world.service.check()
    journal.failing_at = set()
    assert str(doubtful.result(WAIT).address) == "10.0.0.2"
    assert str(world.provision("node-2").assigned_ip) == "10.0.0.3"


def test_a_removal_that_could_not_be_taken_back_is_looked_up(make_world: MakeWorld, hub: FakeHub) -> None:
    journal = FlakyJournal()
    world = make_world(journal)
    world.provision("node-1")
    hub.broken = "out of order"
    journal.failing_at = {"revoke"}
    removal = world.service.submit_deprovision("node-1")
    eventually(lambda: world.service._committer._doubtful is not None)
    assert not removal.done()
    hub.broken = None
    journal.failing_at = set()
    removal.result(WAIT)
    assert hub.table == {}
    assert "node-1" not in world.text


def test_an_unforeseen_failure_is_answered_and_the_service_lives_on(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = make_world()

    def explode(_: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(world.service._hand_made, "conflict", explode)
        with caplog.at_level(logging.CRITICAL), pytest.raises(errors.HubUpdateError, match="unforeseen"):
            world.provision("node-1")
    world.provision("node-1")


def test_an_unforeseen_failure_in_the_middle_of_a_burst_leaves_nobody_waiting(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate, entered = threading.Event(), threading.Event()

    def enter(_: Batch) -> None:
        entered.set()
        gate.wait(WAIT)

    world = make_world(GatedJournal(enter))
    first = world.service.submit_provision(request("node-1"))
    assert entered.wait(WAIT)
    second = world.service.submit_provision(request("node-2"))

    def explode(_: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch, caplog.at_level(logging.CRITICAL):
        patch.setattr(world.service._hand_made, "conflict", explode)
        gate.set()
        first.result(WAIT)
        with pytest.raises(errors.HubUpdateError, match="unforeseen"):
            second.result(WAIT)
    world.provision("node-2")


def test_the_log_names_events_and_carries_no_key(world: World, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        world.provision("node-1")
        world.service.deprovision_peer("node-1", WAIT)
    events = [record.getMessage() for record in caplog.records]
    assert "peer_provisioned" in events
    assert "peer_deprovisioned" in events
    everything = " ".join(str(vars(record)) for record in caplog.records)
    assert world.hub_key.reveal() not in everything


def test_a_peer_of_a_pool_that_the_operator_has_since_changed_stays(
    make_world: MakeWorld, hub: FakeHub
) -> None:
    journal = MemoryJournal()
    old = make_world(journal)
    old.provision("node-1")
    old.service.close()
    new = make_world(journal, network="10.0.0.0/30")
    assert str(new.service.get_peer_config("node-1").assigned_ip) == "10.0.0.2"
    assert new.service.get_pool_stats()["available_addresses"] == 0
    assert hub.table
