"""Idempotency-Keys: of requests with the same key one provisions, and all get its answer."""

import json
from concurrent.futures import Future
from datetime import timedelta

import pytest

from backend import errors
from backend.models.access.callers import SERVICE
from backend.models.access.idempotency import ANSWERS_KEPT, IdempotencyKey
from backend.models.wireguard.peer import Change, ChangeUnderWayError, Peer
from backend.models.wireguard.provisioning import ProvisioningRequest
from backend.services import wireguard_provisioning_service
from tests.harness.core import NEVER, World, Worlds, request
from tests.harness.fakes import FakeHub, FlakyRecords, GatedRecords
from tests.harness.patience import WAIT
from tests.harness.peers import NOON, peer
from tests.harness.requests import new_key


def key_for(body: ProvisioningRequest, text: str = "key-1") -> IdempotencyKey:
    return IdempotencyKey.parse(text, body.model_dump_json().encode())


def ask(world: World, node_id: str, wireguard_key: str, text: str = "key-1") -> str:
    """Provision with an Idempotency-Key; return the address in the answer."""
    body = request(node_id, wireguard_key)
    key = key_for(body, text)
    stored = world.service.stored_answer(SERVICE, key)
    if stored is None:
        world.submit(body, SERVICE, key).result(WAIT)
        stored = world.service.stored_answer(SERVICE, key)
    assert stored is not None
    address: str = json.loads(stored)["config"]["assigned_ip"]
    return address


# The key


@pytest.mark.parametrize("text", ["", " ", "a b", "a\n", "ä", "a" * 256, "\x7f"])
def test_a_key_is_visible_ascii(text: str) -> None:
    with pytest.raises(errors.IdempotencyKeyError, match="1 to 255 visible ASCII characters"):
        IdempotencyKey.parse(text, b"")


def test_a_key_keeps_neither_itself_nor_the_body() -> None:
    key = IdempotencyKey.parse("~" * 255, b"secret body")
    assert "~" not in repr(key)
    assert "secret" not in repr(key)
    assert {len(key.key_hash), len(key.body_hash)} == {64}


def test_answer_belongs_to_its_key_its_caller_and_its_body() -> None:
    key = IdempotencyKey.parse("key-1", b"body")
    change = Change(None, peer("node-1", new_key(), "10.0.0.2"))
    assert not key.is_answered_by(change.answer, "a")
    change.answer = key.answer("a", "node-1", b"answer", NOON)
    assert key.is_answered_by(change.answer, "a")
    assert not key.is_answered_by(change.answer, "b")
    assert not IdempotencyKey.parse("key-2", b"body").is_answered_by(change.answer, "a")
    with pytest.raises(errors.IdempotencyKeyError, match="came with another request before"):
        IdempotencyKey.parse("key-1", b"another body").is_answered_by(change.answer, "a")


# Requests at the same time


@pytest.fixture
def gate() -> GatedRecords:
    return GatedRecords()


@pytest.fixture
def gated(make_world: Worlds, gate: GatedRecords) -> World:
    """Start a service whose first commit waits at the gate."""
    return make_world(gate, look_every=NEVER)


def test_many_requests_at_once_share_one_change(gated: World, gate: GatedRecords) -> None:
    body = request("node-1")
    changes = {gated.service.provision(body, SERVICE, key_for(body)) for _ in range(32)}
    assert len(changes) == 1
    change = changes.pop()
    assert not change.applied.done()
    gate.open()
    change.applied.result(WAIT)
    assert gate.batches == [1]
    stored = gated.service.stored_answer(SERVICE, key_for(body))
    assert stored == gated.service.answer(change).encode()


def test_a_key_is_its_callers_own(gated: World, gate: GatedRecords) -> None:
    body = request("node-1")
    first = gated.submit(body, SERVICE, key_for(body))
    caller = gated.token()
    with pytest.raises(ChangeUnderWayError):
        gated.service.provision(body, caller, key_for(body))
    with pytest.raises(ChangeUnderWayError):
        gated.service.provision(body, SERVICE, key_for(body, "key-2"))
    gate.open()
    first.result(WAIT)
    other = request("node-2")
    gated.submit(other, caller, key_for(other)).result(WAIT)
    assert gated.service.stored_answer(caller, key_for(body, "key-2")) is None


def test_a_failure_is_told_to_all_that_waited_and_not_kept(
    gated: World, gate: GatedRecords, fake_hub: FakeHub
) -> None:
    body = request("node-1")
    waiting = [gated.submit(body, SERVICE, key_for(body)) for _ in range(2)]
    gate.wait_for_commit()
    fake_hub.failures = 3
    gate.open()
    for future in waiting:
        assert isinstance(future.exception(WAIT), errors.HubUpdateError)
    assert gated.service.stored_answer(SERVICE, key_for(body)) is None
    assert str(gated.submit(body, SERVICE, key_for(body)).result(WAIT).address) == "10.0.0.2"


def test_another_body_is_refused_while_the_first_is_under_way(gated: World, gate: GatedRecords) -> None:
    body = request("node-1")
    first = gated.submit(body, SERVICE, key_for(body))
    another = request("node-1", body.wireguard_public_key, version="2.0.0")
    with pytest.raises(errors.IdempotencyKeyError, match="came with another request before"):
        gated.service.provision(another, SERVICE, key_for(another))
    gate.open()
    assert first.result(WAIT).version == "1.0.0"


def test_of_two_nodes_with_one_key_in_one_batch_the_second_is_refused(
    gated: World, gate: GatedRecords, fake_hub: FakeHub
) -> None:
    waiting = gated.submit(request("node-0"))
    gate.wait_for_commit()
    bodies = [request("node-1"), request("node-2")]
    answers = [gated.submit(body, SERVICE, key_for(body)) for body in bodies]
    gate.open()
    waiting.result(WAIT)
    assert answers[0].result(WAIT).node_id == "node-1"
    refused(answers[1])
    assert gate.batches == [1, 2]
    assert bodies[1].wireguard_public_key not in fake_hub.table


def refused(answer: "Future[Peer]") -> None:
    with pytest.raises(errors.IdempotencyKeyError, match="came with another request before"):
        answer.result(WAIT)


# Answers in the records


def test_an_answer_is_given_again_while_its_peer_is_there(world: World) -> None:
    key = new_key()
    assert [ask(world, "node-1", key) for _ in range(3)] == ["10.0.0.2"] * 3
    assert world.service.get_pool_stats()["allocated_addresses"] == 1


def test_another_body_is_refused_once_the_first_is_answered(world: World) -> None:
    ask(world, "node-1", new_key())
    with pytest.raises(errors.IdempotencyKeyError, match="came with another request before"):
        world.service.stored_answer(SERVICE, key_for(request("node-2")))
    assert list(world.service.list_provisioned_peers()) == ["node-1"]


def test_a_commit_refuses_another_body_with_an_answered_key(world: World, fake_hub: FakeHub) -> None:
    """Also where the stored answer was looked up too early, and nothing is under way any more."""
    ask(world, "node-1", new_key())
    before, table = world.version, dict(fake_hub.table)
    body = request("node-2")
    refused(world.submit(body, SERVICE, key_for(body)))
    assert (world.version, fake_hub.table) == (before, table)
    assert list(world.service.list_provisioned_peers()) == ["node-1"]
    # Neither its name, its key nor its address is taken.
    assert str(world.service.provision_peer(body, WAIT).assigned_ip) == "10.0.0.3"


def test_a_removed_peers_answer_with_an_address_that_another_node_has_is_never_given_again(
    world: World,
) -> None:
    key = new_key()
    assert ask(world, "node-1", key) == "10.0.0.2"
    world.deprovision("node-1")
    assert str(world.provision("node-2").assigned_ip) == "10.0.0.2"
    assert ask(world, "node-1", key) == "10.0.0.3"
    assert {node: str(peer.assigned_ip) for node, peer in world.service.list_provisioned_peers().items()} == {
        "node-2": "10.0.0.2",
        "node-1": "10.0.0.3",
    }


def test_a_removed_peers_answer_is_not_given_again_while_its_row_is_still_there(make_world: Worlds) -> None:
    world = make_world(look_every=NEVER)
    body = request("node-1")
    ask(world, "node-1", body.wireguard_public_key)
    world.deprovision("node-1")
    assert world.store.find_answer(SERVICE.name, key_for(body).key_hash) is not None
    assert ask(world, "node-1", body.wireguard_public_key) == "10.0.0.2"


def test_a_removal_that_fails_leaves_the_answer(world: World, fake_hub: FakeHub) -> None:
    key = new_key()
    assert ask(world, "node-1", key) == "10.0.0.2"
    fake_hub.broken = "out of order"
    with pytest.raises(errors.HubUpdateError):
        world.deprovision("node-1")
    fake_hub.broken = None
    assert ask(world, "node-1", key) == "10.0.0.2"


def test_an_answer_of_a_provision_that_failed_is_not_kept(world: World, fake_hub: FakeHub) -> None:
    key = new_key()
    fake_hub.broken = "out of order"
    with pytest.raises(errors.HubUpdateError):
        ask(world, "node-1", key)
    fake_hub.broken = None
    assert str(world.provision("node-2").assigned_ip) == "10.0.0.2"
    assert ask(world, "node-1", key) == "10.0.0.3"


def test_an_answer_is_given_again_after_a_restart(make_world: Worlds) -> None:
    records, key = FlakyRecords(), new_key()
    assert ask(make_world(records), "node-1", key) == "10.0.0.2"
    assert ask(make_world(records), "node-1", key) == "10.0.0.2"


def test_an_answer_is_given_again_for_a_day(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    body = request("node-1")
    key = key_for(body)
    world.submit(body, SERVICE, key).result(WAIT)
    assert timedelta(hours=24) == ANSWERS_KEPT
    monkeypatch.setattr(wireguard_provisioning_service, "ANSWERS_KEPT", timedelta())
    assert world.service.stored_answer(SERVICE, key) is None
