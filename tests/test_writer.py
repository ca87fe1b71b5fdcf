"""The queue of changes, their commits, and what is said while the outcome of one is not known."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future

import pytest

from backend import errors
from backend.models.wireguard.peer import Change, Peer
from backend.services.hub import writer
from backend.services.hub.removal_guard import RemovalGuard
from backend.services.hub.writer import Writer
from backend.services.wireguard_provisioning_service import DuplicatePeerError
from tests.harness.core import NEVER, World, Worlds, request
from tests.harness.fakes import FakeHub, FlakyRecords, GatedRecords
from tests.harness.patience import WAIT, eventually
from tests.harness.peers import peer
from tests.harness.requests import new_key

Start = Callable[[], World]


@pytest.fixture
def records() -> FlakyRecords:
    return FlakyRecords()


@pytest.fixture
def flaky_world(make_world: Worlds, records: FlakyRecords) -> World:
    """Start a service on `records`."""
    return make_world(records)


def addition(number: int) -> Change:
    return Change(None, peer(f"node-{number}", new_key(), f"10.0.0.{number}"))


# The queue


def test_a_batch_is_bounded(make_world: Worlds, monkeypatch: pytest.MonkeyPatch) -> None:
    """`wg set` takes its peers as arguments, and those have an end."""
    monkeypatch.setattr(writer, "MAX_BATCH", 8)
    world = make_world(records := GatedRecords(), look_every=NEVER)
    answers = [world.submit(request("node-0"))]
    records.wait_for_commit()
    answers += [world.submit(request(f"node-{number}")) for number in range(1, 21)]
    records.open()
    assert len({answer.result(WAIT).address for answer in answers}) == 21
    assert records.batches == [1, 8, 8, 4]


def test_changes_are_taken_in_the_order_in_which_they_came(records: FlakyRecords) -> None:
    queue = Writer(records, RemovalGuard(records.removed_keys))
    queue.open()
    changes = [addition(number) for number in range(2, 7)]
    for change in changes[:3]:
        queue.submit(change)
    queue.wake()
    for change in changes[3:]:
        queue.submit(change)
    assert queue.take(0) == changes[:3]
    assert queue.drain() == changes[3:]
    assert queue.take(0) == []


def test_a_closed_queue_takes_nothing_more_and_is_drained_when_it_is_empty(records: FlakyRecords) -> None:
    queue = Writer(records, RemovalGuard(records.removed_keys))
    with pytest.raises(errors.HubUpdateError, match="stopping"):
        queue.submit(addition(2))
    queue.open()
    queue.submit(accepted := addition(2))
    queue.close()
    with pytest.raises(errors.HubUpdateError, match="stopping"):
        queue.submit(addition(3))
    assert not queue.is_drained
    assert queue.take(None) == [accepted]
    assert queue.is_drained


def test_each_commit_is_the_next_generation(records: FlakyRecords) -> None:
    commits = Writer(records, RemovalGuard(records.removed_keys))
    commits.load()
    for number in (2, 3):
        commits.commit([addition(number)])
    assert (commits.generation, records.load().generation) == (2, 2)
    # The hub has not reached it yet.
    assert records.load().observed_generation == 0
    commits.observed = 2
    commits.note_observed()
    assert records.load().observed_generation == 2


# Outcomes


def test_records_that_refuse_a_batch_leave_nothing_of_it(
    flaky_world: World, records: FlakyRecords, fake_hub: FakeHub
) -> None:
    world = flaky_world
    world.provision("node-1")
    before, table = world.text, dict(fake_hub.table)
    records.failing_at = {"commit"}
    with pytest.raises(errors.RecordsUnavailableError):
        world.provision("node-2")
    assert (world.text, fake_hub.table) == (before, table)
    records.failing_at = set()
    assert str(world.provision("node-2").assigned_ip) == "10.0.0.3"


def test_a_commit_whose_answer_was_lost_counts(
    flaky_world: World, records: FlakyRecords, fake_hub: FakeHub
) -> None:
    world = flaky_world
    records.failing_at = {"committed"}
    key = new_key()
    config = world.provision("node-1", key)
    assert fake_hub.table == {key: frozenset({f"{config.assigned_ip}/32"})}
    assert key in world.text
    with pytest.raises(DuplicatePeerError):
        world.provision("node-1", key)


def test_a_removal_whose_answer_was_lost_leaves_name_and_key_free(
    make_world: Worlds, records: FlakyRecords, fake_hub: FakeHub
) -> None:
    world = make_world(records, look_every=NEVER)
    world.provision("node-1")
    # Its commit ends no removal, as far as the records know.
    world.provision("node-2")
    records.failing_at = {"committed"}
    body = request("node-3")
    world.service.provision_peer(body, WAIT)
    world.deprovision("node-3")
    assert body.wireguard_public_key not in fake_hub.table
    records.failing_at = set()
    assert str(world.service.provision_peer(body, WAIT).assigned_ip) == "10.0.0.4"


def test_no_request_is_answered_before_the_records_say_what_became_of_it(
    flaky_world: World, records: FlakyRecords
) -> None:
    world = flaky_world
    records.failing_at = {"committed", "load"}
    doubtful = world.submit(request("node-1"))
    eventually(world.service.in_doubt)
    assert not doubtful.done()
    with pytest.raises(errors.RecordsUnavailableError, match="still being looked up; nothing was changed"):
        world.provision("node-2")
    with pytest.raises(errors.RecordsUnavailableError, match="looked up"):
        world.check()
    records.failing_at = set()
    assert str(doubtful.result(WAIT).address) == "10.0.0.2"
    assert not world.service.in_doubt()
    assert str(world.provision("node-2").assigned_ip) == "10.0.0.3"


def test_a_removal_that_could_not_be_taken_back_is_looked_up(
    flaky_world: World, records: FlakyRecords, fake_hub: FakeHub
) -> None:
    world = flaky_world
    world.provision("node-1")
    fake_hub.broken = "out of order"
    records.failing_at = {"compensate"}
    removal = world.submit_removal("node-1")
    eventually(world.service.in_doubt)
    assert not removal.done()
    fake_hub.broken = None
    records.failing_at = set()
    removal.result(WAIT)
    assert fake_hub.table == {}
    assert "node-1" not in world.text


def test_changes_in_doubt_when_another_process_takes_over_are_told_so(
    make_world: Worlds, records: FlakyRecords
) -> None:
    world = make_world(records)
    records.failing_at = {"committed", "load"}
    answer = world.submit(request("node-1"))
    eventually(world.service.in_doubt)
    assert not answer.done()
    records.overtake()
    records.failing_at = set()
    with pytest.raises(errors.OvertakenError):
        answer.result(WAIT)


def test_records_that_take_long_leave_changes_in_doubt_and_take_no_more(
    make_world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_DOUBT_SECONDS", 0.0)
    world = make_world(records := GatedRecords(), look_every=NEVER)
    assert not world.service.in_doubt()
    waiting = world.submit(request("node-1"))
    records.wait_for_commit()
    assert world.service.in_doubt()
    with pytest.raises(errors.RecordsUnavailableError, match="do not answer; nothing was changed"):
        world.provision("node-2")
    records.open()
    waiting.result(WAIT)
    world.look()
    assert not world.service.in_doubt()


@pytest.mark.parametrize("moment", ["commit", "committed"])
def test_each_change_of_a_batch_ends_once_when_the_records_were_away(
    make_world: Worlds, fake_hub: FakeHub, moment: str
) -> None:
    world = make_world(records := GatedRecords(), look_every=NEVER)
    first = world.submit(request("node-0"))
    records.wait_for_commit()
    ends: list[Future[None]] = []
    changes = [world.service.provision(request(f"node-{number}")) for number in range(1, 4)]
    for change in changes:
        change.applied.add_done_callback(ends.append)
    records.failing_at = {moment, "load"}
    records.open()
    first_failed = moment == "commit"
    eventually(world.service.in_doubt)
    records.failing_at = set()
    world.look()
    assert isinstance(first.exception(WAIT), errors.RecordsUnavailableError) is first_failed
    for change in changes:
        change.applied.exception(WAIT)
    world.look()
    assert len(ends) == len(changes)
    recorded = {peer.node_id for peer in records.load().peers}
    assert {change.peer.node_id for change in changes if change.applied.exception() is None} == (
        recorded - {"node-0"}
    )
    assert set(world.service.list_provisioned_peers()) == recorded
    assert set(fake_hub.table) == {peer.wireguard_public_key for peer in records.load().peers}


# What the records refuse


def test_a_change_that_the_records_refuse_is_left_out_of_file_and_interface(
    make_world: Worlds, fake_hub: FakeHub
) -> None:
    """The new file is begun before the records have said which of a batch's changes they take."""
    world = make_world(records := GatedRecords(), look_every=NEVER)
    refused, taken, first_key = new_key(), new_key(), new_key()
    first = world.submit(request("node-9", first_key))
    records.wait_for_commit()
    # A batch that both go into together: they come while the first is being written.
    answers = [world.submit(request(f"node-{number}", key)) for number, key in enumerate((refused, taken))]

    def refuse(changes: Sequence[Change]) -> None:
        for change in changes:
            if change.peer.wireguard_public_key == refused:
                change.refusal = errors.AddressTakenError(str(change.peer.address))

    records.before_commit = refuse
    records.open()
    first.result(WAIT)
    with pytest.raises(errors.AddressTakenError):
        answers[0].result(WAIT)
    assert isinstance(answers[1].result(WAIT), Peer)
    assert set(fake_hub.table) == {first_key, taken}
    assert refused not in world.text
    assert list(world.path.parent.glob(".*.tmp")) == []
    assert str(world.provision("node-0").assigned_ip) == "10.0.0.3"
