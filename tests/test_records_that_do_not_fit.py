"""Records that are new, older than the hub, or decided about: the whole service, without real parts."""

import base64
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from backend import errors
from backend.models.access.audit import AuditAction, AuditOutcome
from backend.models.access.callers import SERVICE, Caller
from backend.models.access.identity import NodeIdentity
from backend.models.wireguard.records import Decision, NewGeneration
from backend.services.hub.mark import HubMark
from backend.services.hub.removal_guard import fingerprint
from tests.harness.core import World, Worlds, request
from tests.harness.fakes import FakeHub, FlakyRecords
from tests.harness.patience import WAIT, eventually
from tests.harness.peers import block
from tests.harness.requests import new_key

DECIDED: Final = SERVICE.event(datetime.now(UTC), AuditAction.PEERS_ADOPTED, AuditOutcome.ACCEPTED)


def durable() -> FlakyRecords:
    return FlakyRecords(is_durable=True)


def addresses(world: World) -> dict[str, str]:
    return {name: str(peer.assigned_ip) for name, peer in world.service.list_provisioned_peers().items()}


@pytest.fixture
def eight(make_world: Worlds) -> tuple[World, FlakyRecords]:
    """Give the test a hub with eight peers, one of the operator's, and its records."""
    world = make_world(records := durable())
    world.append(new_key(), "10.0.0.2/32")
    eventually(lambda: world.service.get_pool_stats()["reserved_addresses"] == 2)
    for number in range(8):
        world.provision(f"node-{number}")
    return world, records


def older(records: FlakyRecords, number: int) -> FlakyRecords:
    """Return records as they were when they had so many peers."""
    then = durable()
    noted = SERVICE.event(datetime.now(UTC), AuditAction.PEERS_ADOPTED, AuditOutcome.NOTED)
    then.adopt(NewGeneration(number, records.load().peers[:number], (), noted))
    then.note_observed(number)
    return then


def decision(records: FlakyRecords) -> Decision | None:
    return records.status().decision


def decide(world: World, records: FlakyRecords, wanted: Decision) -> None:
    """Decide about the peers that the records don't know, as `reconcile` does."""
    recorded = {peer.wireguard_public_key for peer in records.load().peers}
    unknown = [peer for peer in world.reconciler.find_peers() if peer.public_key not in recorded]
    records.decide(wanted, fingerprint(unknown), DECIDED)


def test_records_that_were_never_written_adopt_the_files_peers(
    make_world: Worlds, fake_hub: FakeHub, eight: tuple[World, FlakyRecords]
) -> None:
    first, _ = eight
    before, text, table = addresses(first), first.text, dict(fake_hub.table)
    fresh = durable()
    world = make_world(fresh)
    assert addresses(world) == before
    assert (world.text, fake_hub.table) == (text, table)
    assert str(world.provision("node-9").assigned_ip) == "10.0.0.11"
    # What was adopted stays: the next start finds it in the records.
    assert HubMark(world.path).read().generation == fresh.load().generation
    again = make_world(fresh)
    assert set(addresses(again)) == {*before, "node-9"}
    again.check()


@pytest.fixture
def paused(make_world: Worlds, eight: tuple[World, FlakyRecords]) -> tuple[World, FlakyRecords]:
    """Give the test a service whose records are those of when the hub had two peers."""
    _, records = eight
    then = older(records, 2)
    return make_world(then), then


def test_records_older_than_the_hub_pause_the_service(
    fake_hub: FakeHub, paused: tuple[World, FlakyRecords]
) -> None:
    world, records = paused
    text, table = world.text, dict(fake_hub.table)
    for _ in range(2):
        with pytest.raises(errors.HubUpdateError, match="paused"):
            world.check()
        with pytest.raises(errors.HubUpdateError, match="older"):
            world.provision("node-9")
        with pytest.raises(errors.HubUpdateError, match="older"):
            world.deprovision("node-0")
    # Reads work, with the hub's key, and the operator's peer keeps its address.
    assert addresses(world) == {"node-0": "10.0.0.3", "node-1": "10.0.0.4"}
    assert world.service.get_pool_stats()["reserved_addresses"] == 2
    assert (world.text, fake_hub.table, records.load().generation) == (text, table, 2)


def test_adopting_takes_the_hubs_peers_into_the_records_and_ends_the_pause(
    make_world: Worlds, fake_hub: FakeHub, paused: tuple[World, FlakyRecords]
) -> None:
    world, records = paused
    text, table = world.text, dict(fake_hub.table)
    reached = HubMark(world.path).read().generation
    decide(world, records, Decision.ADOPT)
    eventually(lambda: len(addresses(world)) == 8)
    eventually(lambda: decision(records) is None)
    assert addresses(world) == {f"node-{number}": f"10.0.0.{number + 3}" for number in range(8)}
    assert (world.text, fake_hub.table) == (text, table)
    # Higher than any that the hub has reached, or the next start would pause again.
    assert records.load().generation > reached
    eventually(lambda: world.reconciler.problem is None)
    assert str(world.provision("node-9").assigned_ip) == "10.0.0.11"
    again = make_world(records)
    again.check()
    assert len(addresses(again)) == 9


def test_forcing_takes_the_unknown_peers_off_the_hub_and_ends_the_pause(
    make_world: Worlds, fake_hub: FakeHub, paused: tuple[World, FlakyRecords]
) -> None:
    world, records = paused
    decide(world, records, Decision.FORCE)
    eventually(lambda: world.text.count("managed peer") == 2)
    eventually(lambda: len(fake_hub.table) == 3)  # with the operator's
    eventually(lambda: world.reconciler.problem is None)
    assert str(world.provision("node-9").assigned_ip) == "10.0.0.5"
    make_world(records).check()


def test_a_decision_about_other_peers_than_those_that_were_shown_is_dismissed(
    fake_hub: FakeHub, paused: tuple[World, FlakyRecords], caplog: pytest.LogCaptureFixture
) -> None:
    world, records = paused
    text, table = world.text, dict(fake_hub.table)
    records.decide(Decision.FORCE, fingerprint([]), DECIDED)
    eventually(lambda: decision(records) is None)
    with pytest.raises(errors.HubUpdateError, match="paused"):
        world.check()
    assert (world.text, fake_hub.table) == (text, table)
    assert "decision_dismissed" in caplog.text


def test_paused_service_refuses_a_change_before_it_holds_a_name_or_an_address(
    paused: tuple[World, FlakyRecords],
) -> None:
    """An adopted peer may have both."""
    world, _ = paused
    free = world.service.get_pool_stats()["available_addresses"]
    with pytest.raises(errors.PausedError):
        world.service.provision(request("node-9"))
    assert world.directory.by_node("node-9") is None
    assert world.service.get_pool_stats()["available_addresses"] == free


def test_decision_whose_commit_failed_does_not_end_the_pause(
    make_world: Worlds,
    fake_hub: FakeHub,
    eight: tuple[World, FlakyRecords],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So few unknown peers would be removed then, though no decision about them was carried out."""
    records = older(eight[1], 7)
    world, table = make_world(records), dict(fake_hub.table)
    tries: list[NewGeneration] = []

    def fail(new: NewGeneration) -> None:
        tries.append(new)
        raise errors.RecordsUnavailableError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(records, "adopt", fail)
        decide(world, records, Decision.ADOPT)
        eventually(lambda: len(tries) > 0)
        records.decide(Decision.ADOPT, fingerprint([]), DECIDED)
        eventually(lambda: decision(records) is None)
        world.look()
    with pytest.raises(errors.HubUpdateError, match="paused"):
        world.check()
    assert fake_hub.table == table


def test_decision_without_a_pause_is_deleted(fake_hub: FakeHub, eight: tuple[World, FlakyRecords]) -> None:
    """Otherwise it would be carried out at the next pause, which it was not made for."""
    world, records = eight
    before, text, table = addresses(world), world.text, dict(fake_hub.table)
    for wanted in Decision:
        decide(world, records, wanted)
        eventually(lambda: decision(records) is None)
        world.check()
    assert (addresses(world), world.text, fake_hub.table) == (before, text, table)


@pytest.mark.parametrize("unknown", [5, 6])
def test_few_unknown_blocks_are_removed(
    fake_hub: FakeHub, eight: tuple[World, FlakyRecords], unknown: int
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
        world.check()
        return
    eventually(lambda: world.reconciler.paused)
    edited = world.text
    with pytest.raises(errors.HubUpdateError):
        world.provision("node-9")
    assert world.text == edited
    assert edited.count("stranger") == 6
    world.path.write_text(whole)
    eventually(lambda: not world.reconciler.paused)
    world.provision("node-9")


def test_token_sees_an_adopted_peer_only_with_proofs_which_complete_its_record(
    make_world: Worlds, eight: tuple[World, FlakyRecords]
) -> None:
    first, _ = eight
    key = new_key()
    first.provision("node-8", key)
    world = make_world(fresh := durable())
    # The raw key in base64, and its protobuf form: two spellings of one identity.
    raw = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    spellings = [base64.b64encode(prefix + raw).decode() for prefix in (b"", b"\x08\x01\x12\x20")]
    caller = world.token()
    proven = replace(caller, identity=NodeIdentity(raw))

    def known(public_key: str, asking: Caller) -> Mapping[str, object]:
        body = request("node-8", key, public_key=public_key)
        with pytest.raises(errors.DuplicatePeerError) as refused:
            world.submit(body, asking).result(WAIT)
        return refused.value.existing_config

    assert known(spellings[0], caller) == {}
    assert known(spellings[0], proven)["hub_public_key"] == first.hub_key
    recorded = {peer.node_id: peer.public_key for peer in fresh.load().peers}
    assert recorded["node-8"] == spellings[0]
    assert recorded["node-7"] == ""
    assert known(spellings[1], proven)["hub_public_key"] == first.hub_key
    stranger = NodeIdentity(Ed25519PrivateKey.generate().public_key().public_bytes_raw())
    assert known("another", replace(caller, identity=stranger)) == {}
