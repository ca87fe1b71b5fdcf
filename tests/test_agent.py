"""What the agent asks before it touches anything, how batches end, and how it stops."""

import logging
import threading
from collections.abc import Callable

import pytest

from backend import errors
from backend.models.wireguard.peer import PeerState
from backend.models.wireguard.records import RecordedState
from backend.services.hub import agent
from tests.harness.core import NEVER, OFTEN, Ends, World, Worlds, request
from tests.harness.fakes import FakeHub, FlakyRecords, GatedRecords
from tests.harness.patience import WAIT, eventually
from tests.harness.requests import new_key


@pytest.fixture
def records() -> FlakyRecords:
    return FlakyRecords()


def change(world: World, act: str) -> None:
    """Add a peer, or remove node-1."""
    if act == "add":
        world.provision("node-2")
    else:
        world.deprovision("node-1")


# Before a batch


@pytest.mark.parametrize("act", ["add", "remove"])
def test_records_that_do_not_answer_are_noticed_before_anything_is_written(
    make_world: Worlds, records: FlakyRecords, fake_hub: FakeHub, act: str
) -> None:
    """A full disk with the records, say: what is begun there has no certain end."""
    world = make_world(records, look_every=NEVER)
    world.provision("node-1")
    before = len(records.batches), world.version, dict(fake_hub.table)
    records.failing_at = {"check"}
    with pytest.raises(errors.RecordsUnavailableError, match="no answer at check"):
        change(world, act)
    assert (len(records.batches), world.version, fake_hub.table) == before
    records.failing_at = set()
    change(world, act)


def test_records_that_do_not_answer_are_noticed_in_the_middle_of_a_burst(make_world: Worlds) -> None:
    world = make_world(records := GatedRecords(), look_every=NEVER)
    first = world.submit(request("node-1"))
    records.wait_for_commit()
    second = world.submit(request("node-2"))
    records.failing_at = {"check"}
    records.open()
    assert first.result(WAIT).node_id == "node-1"
    with pytest.raises(errors.RecordsUnavailableError, match="no answer at check"):
        second.result(WAIT)
    assert set(world.service.list_provisioned_peers()) == {"node-1"}
    assert "node-2" not in world.text


@pytest.mark.parametrize("act", ["add", "remove"])
def test_a_hub_that_is_known_to_be_out_of_step_is_mended_before_anything_is_recorded(
    make_world: Worlds, records: FlakyRecords, fake_hub: FakeHub, act: str
) -> None:
    """A retry of what has just failed for a cause that still stands touches nothing."""
    world = make_world(records, look_every=NEVER)
    world.provision("node-1")
    fake_hub.broken = "out of order"
    with pytest.raises(errors.HubUpdateError, match="out of order"):
        world.provision("node-9")
    before = len(records.batches), world.version, dict(fake_hub.table)
    for _ in range(3):
        with pytest.raises(errors.HubUpdateError, match="out of order"):
            change(world, act)
    assert (len(records.batches), world.version, fake_hub.table) == before
    fake_hub.broken = None
    change(world, act)
    assert "node-9" not in world.text
    assert len(fake_hub.table) == (2 if act == "add" else 0)


@pytest.mark.parametrize("act", ["add", "remove"])
def test_an_interface_that_is_gone_is_noticed_before_the_file_is_replaced(
    make_world: Worlds, fake_hub: FakeHub, act: str
) -> None:
    world = make_world(look_every=NEVER)
    world.provision("node-1")
    before = world.version
    fake_hub.vanish()
    with pytest.raises(errors.HubUpdateError, match="interface wg0 does not exist"):
        change(world, act)
    assert world.version == before
    fake_hub.come_back()
    change(world, act)
    assert world.version != before


# How a batch ends


def test_changes_that_wait_together_are_committed_together(make_world: Worlds) -> None:
    world = make_world(records := GatedRecords(), look_every=NEVER)
    first = world.submit(request("node-0"))
    records.wait_for_commit()
    answers = [world.submit(request(f"node-{i}")) for i in range(1, 50)]
    records.open()
    addresses = {answer.result(WAIT).address for answer in [first, *answers]}
    assert records.batches == [1, 49]
    assert len(addresses) == 50


def test_a_hub_that_fails_leaves_nothing_of_the_batch(world: World, fake_hub: FakeHub) -> None:
    world.provision("node-1")
    before, table = world.text, dict(fake_hub.table)
    fake_hub.broken = "out of order"
    with pytest.raises(errors.HubUpdateError, match="out of order"):
        world.provision("node-2")
    with pytest.raises(errors.HubUpdateError):
        world.deprovision("node-1")
    assert (world.text, fake_hub.table) == (before, table)
    assert list(world.service.list_provisioned_peers()) == ["node-1"]
    assert [peer.node_id for peer in world.records.load().peers] == ["node-1"]
    assert world.service.get_pool_stats()["allocated_addresses"] == 1
    with pytest.raises(errors.HubUpdateError):
        world.check()
    fake_hub.broken = None
    assert str(world.provision("node-2").assigned_ip) == "10.0.0.3"
    world.check()


def test_a_change_can_not_be_cancelled_by_its_caller(make_world: Worlds) -> None:
    world = make_world(records := GatedRecords())
    first = world.service.provision(request("node-1"))
    records.wait_for_commit()
    second = world.service.provision(request("node-2"))
    third = world.service.provision(request("node-3"))
    assert not first.applied.cancel()
    assert not second.applied.cancel()
    records.open()
    for each in (first, second, third):
        each.applied.result(WAIT)
    assert list(world.service.list_provisioned_peers()) == ["node-1", "node-2", "node-3"]


def test_a_provision_that_was_answered_finds_the_service_ready(make_world: Worlds, fake_hub: FakeHub) -> None:
    end = threading.Event()

    def run(work: Callable[[], None]) -> None:
        work()
        end.wait(WAIT)

    world = make_world(run=run, look_every=NEVER)
    fake_hub.failures = 3
    first = world.submit(request("node-1"))
    with pytest.raises(errors.HubUpdateError):
        first.result(WAIT)
    end.set()
    world.provision("node-1")
    end.clear()
    world.provision("node-2")
    world.check()  # although the workflow hasn't come to its end
    end.set()


def test_an_unforeseen_failure_is_answered_and_the_service_lives_on(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(world.operator_peers, "conflict", explode)
        with caplog.at_level(logging.CRITICAL), pytest.raises(errors.HubUpdateError, match="unforeseen"):
            world.provision("node-1")
    world.provision("node-1")


def test_an_unforeseen_failure_in_the_middle_of_a_burst_leaves_no_request_waiting(
    make_world: Worlds, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = make_world(records := GatedRecords())
    first = world.submit(request("node-1"))
    records.wait_for_commit()
    second = world.submit(request("node-2"))
    with monkeypatch.context() as patch, caplog.at_level(logging.CRITICAL):
        patch.setattr(world.operator_peers, "conflict", explode)
        records.open()
        first.result(WAIT)
        with pytest.raises(errors.HubUpdateError, match="unforeseen"):
            second.result(WAIT)
    world.provision("node-2")


def explode(_: object) -> None:
    raise ZeroDivisionError


def test_a_batch_that_takes_long_turns_readiness_red(
    make_world: Worlds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "_LONG_BATCH_SECONDS", 0.0)
    world = make_world(records := GatedRecords())
    answer = world.submit(request("node-1"))
    records.wait_for_commit()
    with pytest.raises(errors.HubUpdateError, match="unusually long"):
        world.check()
    records.open()
    answer.result(WAIT)


# The workflow around the batches


class FailingRun:
    """Runs the agent's work, and fails before or after it where it is told to."""

    def __init__(self) -> None:
        self.before: Exception | None = None
        self.after: Exception | None = None

    def __call__(self, work: Callable[[], None]) -> None:
        if self.before is not None:
            raise self.before
        work()
        if self.after is not None:
            raise self.after


FAILURES = [errors.RecordsUnavailableError("no workflow"), ZeroDivisionError("no workflow")]


@pytest.mark.parametrize("failure", FAILURES)
def test_a_workflow_that_can_not_begin_leaves_nothing_and_no_request_waiting(
    make_world: Worlds, fake_hub: FakeHub, caplog: pytest.LogCaptureFixture, failure: Exception
) -> None:
    world = make_world(run=(run := FailingRun()), look_every=NEVER)
    world.provision("node-1")
    world.look()  # which waits for the end of the burst
    before = world.version, dict(fake_hub.table), list(world.records.batches)
    run.before = failure
    ends = Ends()
    for made in (
        world.service.provision(request("node-2")),
        world.service.deprovision("node-1"),
    ):
        ends.count(made)
        assert isinstance(made.applied.exception(WAIT), errors.RecordsUnavailableError)
    # A driver's message may quote a row.
    tracebacks = {record.exc_info for record in caplog.records if record.message == "burst_failed"}
    assert tracebacks == ({None} if isinstance(failure, ZeroDivisionError) else set())
    assert (world.version, fake_hub.table, world.records.batches) == before
    assert list(world.service.list_provisioned_peers()) == ["node-1"]
    run.before = None
    assert str(world.provision("node-2").assigned_ip) == "10.0.0.3"
    world.look()
    assert ends.all_once()


def test_records_that_can_not_be_written_say_why_before_a_workflow_begins(make_world: Worlds) -> None:
    """A full disk, say: the workflow's own write would fail there, and say less."""
    world = make_world(run=(run := FailingRun()), look_every=NEVER)
    run.before = errors.RecordsUnavailableError("no workflow")
    world.records.failing_at = {"check"}
    with pytest.raises(errors.RecordsUnavailableError, match="no answer at check"):
        world.provision("node-1")


@pytest.mark.parametrize("failure", FAILURES)
def test_a_workflow_that_fails_after_its_batches_changes_none_of_their_answers(
    make_world: Worlds, fake_hub: FakeHub, caplog: pytest.LogCaptureFixture, failure: Exception
) -> None:
    world = make_world(run=(run := FailingRun()), look_every=NEVER)
    run.after = failure
    ends, key = Ends(), new_key()
    made = world.service.provision(request("node-1", key))
    ends.count(made)
    made.applied.result(WAIT)
    world.look()
    assert fake_hub.table == {key: frozenset({"10.0.0.2/32"})}
    fake_hub.failures = 3
    refused = world.service.provision(request("node-2"))
    ends.count(refused)
    assert "not this time" in str(refused.applied.exception(WAIT))
    world.look()
    assert list(world.service.list_provisioned_peers()) == ["node-1"]
    assert ends.all_once()


# A stop


def test_a_stopping_service_finishes_what_it_accepted_and_takes_nothing_more(make_world: Worlds) -> None:
    world = make_world()
    answers = [world.submit(request(f"node-{i}")) for i in range(20)]
    world.stop()
    assert len({answer.result(0).address for answer in answers}) == 20
    with pytest.raises(errors.HubUpdateError, match="stopping"):
        world.provision("late")
    with pytest.raises(errors.HubUpdateError, match="stopping"):
        world.deprovision("node-1")
    assert "late" not in world.service.list_provisioned_peers()
    assert "node-1" in world.service.list_provisioned_peers()
    assert world.service.get_pool_stats()["allocated_addresses"] == 20


def test_a_stop_does_not_wait_for_ever_and_leaves_no_request_waiting(
    make_world: Worlds, records: FlakyRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "_STOP_SECONDS", 0.1)
    world = make_world(records)
    records.failing_at = {"committed", "load"}
    ends = Ends()
    made = world.service.provision(request("node-1"))
    ends.count(made)
    eventually(world.service.in_doubt)
    world.stop()
    with pytest.raises(errors.OutcomeUnknownError):
        made.applied.result(0)
    assert ends.all_once()


def test_a_change_that_is_looked_up_while_the_service_stops_ends_once(
    make_world: Worlds, records: FlakyRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "_STOP_SECONDS", 0.1)
    world = make_world(records, look_every=NEVER)
    records.failing_at = {"committed"}
    begun, go_on = threading.Event(), threading.Event()
    load = records.load

    def slow(*, wait_for_commit: bool = False) -> RecordedState:
        begun.set()
        go_on.wait(WAIT)
        return load(wait_for_commit=wait_for_commit)

    monkeypatch.setattr(records, "load", slow)
    ends = Ends()
    made = world.service.provision(request("node-1"))
    ends.count(made)
    assert begun.wait(WAIT)
    world.agent.stop()
    with pytest.raises(errors.OutcomeUnknownError):
        made.applied.result(0)
    go_on.set()
    eventually(lambda: "hub-agent" not in {thread.name for thread in threading.enumerate()})
    assert ends.all_once()


def test_error_of_a_task_is_raised_in_its_caller(world: World) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        world.agent.call(fail)
    done: list[str] = []
    world.agent.call(lambda: done.append(threading.current_thread().name))
    assert done == ["hub-agent"]


def test_a_clean_stop_leaves_no_peer_pending_or_removing(make_world: Worlds, records: FlakyRecords) -> None:
    world = make_world(records, look_every=NEVER)
    world.provision("node-1")
    world.provision("node-2")
    world.deprovision("node-1")
    # The commit of the removal has brought the states up to the hub.
    assert records.states() == {"node-1": PeerState.REMOVING, "node-2": PeerState.PENDING}
    world.stop()
    assert records.states() == {"node-2": PeerState.ACTIVE}


# After another process has taken over


def test_a_process_that_has_lost_its_records_writes_nothing_more(
    make_world: Worlds, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken() -> None:
        raise errors.OvertakenError

    world = make_world(look_every=NEVER)
    world.provision("node-1")
    before = len(world.records.batches), world.version, dict(fake_hub.table)
    with monkeypatch.context() as patch:
        patch.setattr(world.records, "check", overtaken)
        with pytest.raises(errors.OvertakenError):
            world.provision("node-2")
    # For good: the new owner has gone on meanwhile.
    with pytest.raises(errors.OvertakenError):
        world.provision("node-2")
    with pytest.raises(errors.OvertakenError):
        world.check()
    assert (len(world.records.batches), world.version, fake_hub.table) == before


def test_an_overtaken_process_leaves_file_and_interface_to_the_new_owner(
    make_world: Worlds, records: FlakyRecords, fake_hub: FakeHub
) -> None:
    world = make_world(records, look_every=NEVER)
    key = new_key()
    world.provision("node-1", key)
    # While it is the owner it undoes what others do to its blocks; the same look would show that below.
    ours = world.text
    world.path.write_text(ours.replace("node-1", "node-9"))
    world.look()
    assert world.text == ours
    records.overtake()
    with pytest.raises(errors.OvertakenError):
        world.provision("node-2")
    theirs = ours.replace(key, new_key()).replace("10.0.0.2", "10.0.0.7")
    world.path.write_text(theirs)
    fake_hub.table = table = {new_key(): frozenset({"10.0.0.7/32"})}
    before, syncs, changes = world.version, fake_hub.syncs, fake_hub.changes
    world.look()
    # Nor when there is something to do.
    with pytest.raises(errors.OvertakenError):
        world.deprovision("node-1")
    world.look()
    fake_hub.come_back()
    fake_hub.table = table
    world.look()
    world.stop()
    assert (world.version, world.text) == (before, theirs)
    assert (fake_hub.table, fake_hub.syncs, fake_hub.changes) == (table, syncs, changes)


def test_every_change_that_waits_when_the_process_is_overtaken_ends_once(make_world: Worlds) -> None:
    world = make_world(records := GatedRecords(), look_every=NEVER)
    ends = Ends()
    changes = [world.service.provision(request("node-0"))]
    records.wait_for_commit()
    changes += [world.service.provision(request(f"node-{number}")) for number in range(1, 4)]
    for made in changes:
        ends.count(made)
    records.overtake()
    records.open()
    for made in changes:
        assert isinstance(made.applied.exception(WAIT), errors.OvertakenError)
    assert ends.all_once()
    assert world.service.get_pool_stats()["allocated_addresses"] == 0


# Load


def test_a_drift_is_mended_while_changes_never_pause(
    make_world: Worlds, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backend.services.hub.interface_sync._VERIFY_INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(agent, "_LONGEST_BURST_SECONDS", 0.02)
    world = make_world(look_every=OFTEN)
    key = new_key()
    world.provision("node-1", key)
    del fake_hub.table[key]
    for number in range(5000):
        world.provision("node-2") if number % 2 == 0 else world.deprovision("node-2")
        if key in fake_hub.table:
            break
    assert fake_hub.table[key] == {"10.0.0.2/32"}
