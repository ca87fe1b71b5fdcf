"""Records that are new, older than the hub, or decided about: the whole service, without real parts."""

import base64
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from backend import errors
from backend.models.access.callers import Caller, CallerKind
from backend.models.access.credentials import TokenRequest
from backend.models.access.identity import NodeIdentity
from backend.services.hub import hub_committer
from backend.services.hub.mark import HubMark
from backend.services.hub.removal_guard import fingerprint
from backend.services.ports import Decision, Journal
from tests.harness.fakes import FakeHub
from tests.harness.memory_journal import MemoryJournal
from tests.harness.patience import eventually
from tests.harness.peers import block
from tests.harness.requests import new_key
from tests.test_provisioning_service import WAIT, World, request

MakeWorld = Callable[..., World]


class DurableJournal(MemoryJournal):
    """Records that say of themselves that they outlive the process, as those in a database do."""

    @property
    def durable(self) -> bool:
        return True


@pytest.fixture
def hub() -> FakeHub:
    return FakeHub()


@pytest.fixture
def make_world(tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeWorld]:
    """Start services on one file and one interface, one after the other."""
    monkeypatch.setattr(hub_committer, "HEAL_INTERVAL_SECONDS", 0.02)
    worlds = list[World]()

    def make(records: Journal) -> World:
        for earlier in worlds:
            earlier.service.close()
        world = World(tmp_path, records, hub, "10.0.0.0/24")
        worlds.append(world)
        world.service.start()
        return world

    yield make
    for world in worlds:
        world.service.close()


def addresses(world: World) -> dict[str, str]:
    return {name: str(peer.assigned_ip) for name, peer in world.service.list_provisioned_peers().items()}


@pytest.fixture
def eight(make_world: MakeWorld) -> tuple[World, DurableJournal]:
    """Give the test a hub with eight peers, one of the operator's, and its records."""
    journal = DurableJournal()
    world = make_world(journal)
    with world.path.open("a") as file:
        file.write(f"\n[Peer]\nPublicKey = {new_key()}\nAllowedIPs = 10.0.0.2/32\n")
    eventually(lambda: world.service.get_pool_stats()["reserved_addresses"] == 2)
    for number in range(8):
        world.provision(f"node-{number}")
    return world, journal


def older(journal: MemoryJournal, number: int) -> DurableJournal:
    """Return records as they were when they had so many peers."""
    records = DurableJournal(journal.load().peers[:number])
    records._generation = number
    return records


def test_records_that_were_never_written_adopt_the_files_peers(
    make_world: MakeWorld, hub: FakeHub, eight: tuple[World, DurableJournal]
) -> None:
    first, _ = eight
    before, text, table = addresses(first), first.text, dict(hub.table)
    fresh = DurableJournal()
    world = make_world(fresh)
    assert addresses(world) == before
    assert (world.text, hub.table) == (text, table)
    assert str(world.provision("node-9").assigned_ip) == "10.0.0.11"
    # What was adopted stays: the next start finds it in the records.
    assert HubMark(world.path).read().generation == fresh.load().generation
    again = make_world(fresh)
    assert set(addresses(again)) == {*before, "node-9"}
    again.service.check()


@pytest.fixture
def paused(make_world: MakeWorld, eight: tuple[World, DurableJournal]) -> tuple[World, DurableJournal]:
    """Give the test a service whose records are those of when the hub had two peers."""
    _, journal = eight
    records = older(journal, 2)
    return make_world(records), records


def test_records_older_than_the_hub_pause_the_service(
    hub: FakeHub, paused: tuple[World, DurableJournal]
) -> None:
    world, records = paused
    text, table = world.text, dict(hub.table)
    for _ in range(2):
        with pytest.raises(errors.HubUpdateError, match="paused"):
            world.service.check()
        with pytest.raises(errors.HubUpdateError, match="older"):
            world.provision("node-9")
        with pytest.raises(errors.HubUpdateError, match="older"):
            world.service.deprovision_peer("node-0", WAIT)
    # Reads work, with the hub's key, and the operator's peer keeps its address.
    assert addresses(world) == {"node-0": "10.0.0.3", "node-1": "10.0.0.4"}
    assert world.service.get_pool_stats()["reserved_addresses"] == 2
    assert (world.text, hub.table, records.load().generation) == (text, table, 2)


def test_adopting_takes_the_hubs_peers_into_the_records_and_ends_the_pause(
    make_world: MakeWorld, hub: FakeHub, paused: tuple[World, DurableJournal]
) -> None:
    world, records = paused
    text, table = world.text, dict(hub.table)
    reached = HubMark(world.path).read().generation
    records.decision = Decision.ADOPT
    eventually(lambda: len(addresses(world)) == 8)
    eventually(lambda: records.decision is None)
    assert addresses(world) == {f"node-{number}": f"10.0.0.{number + 3}" for number in range(8)}
    assert (world.text, hub.table) == (text, table)
    # Higher than any that the hub has reached, or the next start would pause again.
    assert records.load().generation > reached
    eventually(lambda: world.service._committer._mirror.problem is None)
    assert str(world.provision("node-9").assigned_ip) == "10.0.0.11"
    again = make_world(records)
    again.service.check()
    assert len(addresses(again)) == 9


def test_forcing_takes_the_unknown_peers_off_the_hub_and_ends_the_pause(
    make_world: MakeWorld, hub: FakeHub, paused: tuple[World, DurableJournal]
) -> None:
    world, records = paused
    records.decision = Decision.FORCE
    eventually(lambda: world.text.count("managed peer") == 2)
    eventually(lambda: len(hub.table) == 3)  # with the operator's
    eventually(lambda: world.service._committer._mirror.problem is None)
    assert str(world.provision("node-9").assigned_ip) == "10.0.0.5"
    make_world(records).service.check()


def test_a_decision_about_other_peers_than_those_that_were_shown_is_dismissed(
    hub: FakeHub, paused: tuple[World, DurableJournal], caplog: pytest.LogCaptureFixture
) -> None:
    world, records = paused
    text, table = world.text, dict(hub.table)
    records.basis = fingerprint([])
    records.decision = Decision.FORCE
    eventually(lambda: records.decision is None)
    with pytest.raises(errors.HubUpdateError, match="paused"):
        world.service.check()
    assert (world.text, hub.table) == (text, table)
    assert "decision_dismissed" in caplog.text


def test_a_decision_that_nothing_waits_for_is_forgotten(
    hub: FakeHub, eight: tuple[World, DurableJournal]
) -> None:
    """Otherwise it would be carried out at the next pause, which it was not made for."""
    world, journal = eight
    before, text, table = addresses(world), world.text, dict(hub.table)
    for decision in Decision:
        journal.decision = decision
        eventually(lambda: journal.decision is None)
        world.service.check()
    assert (addresses(world), world.text, hub.table) == (before, text, table)


@pytest.mark.parametrize("unknown", [5, 6])
def test_blocks_of_ours_that_nothing_knows_are_removed_where_they_are_few(
    hub: FakeHub, eight: tuple[World, DurableJournal], unknown: int
) -> None:
    world, _ = eight
    strangers = [
        block(f"stranger-{number}", new_key(), address)
        for number, address in enumerate(list(world.pool.network.hosts())[100 : 100 + unknown])
    ]
    whole = world.text
    with world.path.open("ab") as file:
        file.writelines(peer.text for peer in strangers)
    if unknown == 5:
        eventually(lambda: world.text == whole)
        world.service.check()
        return
    eventually(lambda: world.service._committer._mirror.paused)
    edited = world.text
    with pytest.raises(errors.HubUpdateError):
        world.provision("node-9")
    assert world.text == edited
    assert edited.count("stranger") == 6
    world.path.write_text(whole)
    eventually(lambda: not world.service._committer._mirror.paused)
    world.provision("node-9")


def test_an_adopted_peer_is_told_to_a_token_only_with_proofs_which_fill_its_record_in(
    make_world: MakeWorld, eight: tuple[World, DurableJournal]
) -> None:
    first, _ = eight
    key = new_key()
    first.provision("node-8", key)
    fresh = DurableJournal()
    world = make_world(fresh)
    # The raw key in base64, and its protobuf form: two spellings of one identity.
    raw = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    spellings = [base64.b64encode(prefix + raw).decode() for prefix in (b"", b"\x08\x01\x12\x20")]
    token, _ = TokenRequest().make("test", datetime.now(UTC))
    caller = Caller(CallerKind.TOKEN, token)
    proven = Caller(CallerKind.TOKEN, token, identity=NodeIdentity(raw))

    def known(public_key: str, asking: Caller) -> Mapping[str, object]:
        body = request("node-8", key, public_key=public_key)
        with pytest.raises(errors.DuplicatePeerError) as refused:
            world.service.submit_provision(body, asking).result(WAIT)
        return refused.value.existing_config

    assert known(spellings[0], caller) == {}
    assert known(spellings[0], proven)["hub_public_key"] == first.hub_key.public_key()
    recorded = {peer.node_id: peer.public_key for peer in fresh.load().peers}
    assert recorded["node-8"] == spellings[0]
    assert recorded["node-7"] == ""
    assert known(spellings[1], proven)["hub_public_key"] == first.hub_key.public_key()
    stranger = NodeIdentity(Ed25519PrivateKey.generate().public_key().public_bytes_raw())
    assert known("another", Caller(CallerKind.TOKEN, token, identity=stranger)) == {}
