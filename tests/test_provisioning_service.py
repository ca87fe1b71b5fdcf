"""What a request is answered, against a real file, records in memory, and a double of the interface."""

import json
import logging

import pytest

from backend import errors
from backend.adapters.wireguard.wg import FileOnly
from backend.services.wireguard_provisioning_service import (
    DuplicatePeerError,
    InvalidCredentialsError,
    IPPoolExhaustedError,
)
from tests.harness.core import World, Worlds, request
from tests.harness.fakes import FakeHub, GatedRecords
from tests.harness.patience import WAIT, eventually
from tests.harness.requests import new_key


def test_a_provisioned_peer_is_in_list_file_and_interface(world: World, fake_hub: FakeHub) -> None:
    key = new_key()
    config = world.provision("node-1", key)
    assert config.model_dump(mode="json") == {
        "node_id": "node-1",
        "assigned_ip": "10.0.0.2",
        "subnet_mask": "255.255.255.0",
        "hub_public_key": world.hub_key,
        "hub_endpoint": "hub.example.com:51820",
        "allowed_ips": "10.0.0.0/24",
        "persistent_keepalive": 25,
        "dns_servers": ["10.0.0.1"],
        "provisioned_at": config.provisioned_at.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    assert world.service.list_provisioned_peers() == {"node-1": config}
    assert world.service.get_peer_config("node-1") == config
    assert fake_hub.table == {key: frozenset({"10.0.0.2/32"})}
    assert f"PublicKey = {key}\nAllowedIPs = 10.0.0.2/32\n" in world.text


def test_the_hub_gets_no_keepalive_of_its_own(world: World) -> None:
    world.provision("node-1")
    assert "PersistentKeepalive" not in world.text


def test_a_deprovisioned_peer_is_in_none_of_the_three_and_its_address_is_free(
    world: World, fake_hub: FakeHub
) -> None:
    before = world.text
    world.provision("node-1")
    world.deprovision("node-1")
    assert (world.text, fake_hub.table, world.service.list_provisioned_peers()) == (before, {}, {})
    with pytest.raises(errors.PeerNotFoundError, match="Peer node-1 not found"):
        world.service.get_peer_config("node-1")
    assert str(world.provision("node-2").assigned_ip) == "10.0.0.2"


def test_deprovisioning_an_unknown_peer_is_refused(world: World) -> None:
    with pytest.raises(errors.PeerNotFoundError):
        world.deprovision("unknown")


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


def test_the_hubs_own_key_is_refused(world: World, fake_hub: FakeHub) -> None:
    before = world.text
    with pytest.raises(InvalidCredentialsError, match="the hub's own key"):
        world.provision("node-1", world.hub_key)
    assert (world.text, fake_hub.table) == (before, {})


def test_an_exhausted_pool_refuses_without_touching_the_file(make_world: Worlds) -> None:
    world = make_world(network="10.0.0.0/30")
    world.provision("node-1")
    before = world.version
    with pytest.raises(IPPoolExhaustedError, match=r"1 addresses allocated from range 10\.0\.0\.0/30"):
        world.provision("node-2")
    with pytest.raises(IPPoolExhaustedError):
        world.check()
    assert world.version == before


def test_a_change_that_can_not_be_queued_leaves_name_key_and_address_free(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise errors.RecordsUnavailableError("no")

    body = request("node-1")
    with monkeypatch.context() as patch:
        patch.setattr(world.writer, "submit", refuse)
        with pytest.raises(errors.RecordsUnavailableError):
            world.service.provision_peer(body, WAIT)
    assert str(world.service.provision_peer(body, WAIT).assigned_ip) == "10.0.0.2"
    with monkeypatch.context() as patch:
        patch.setattr(world.writer, "submit", refuse)
        with pytest.raises(errors.RecordsUnavailableError):
            world.deprovision("node-1")
    assert list(world.service.list_provisioned_peers()) == ["node-1"]
    world.deprovision("node-1")


def test_without_an_interface_only_the_file_is_kept(make_world: Worlds) -> None:
    world = make_world(hub=FileOnly())
    key = new_key()
    world.provision("node-1", key)
    world.check()
    assert not world.service.readiness.live
    assert key in world.text


def test_an_operators_peer_keeps_its_key_and_address(world: World) -> None:
    key = new_key()
    world.append(key, "10.0.0.2/32, 10.0.0.4/31")
    eventually(lambda: world.service.get_pool_stats()["reserved_addresses"] == 4)
    assert [str(world.provision(f"node-{i}").assigned_ip) for i in range(2)] == ["10.0.0.3", "10.0.0.6"]
    with pytest.raises(DuplicatePeerError) as refused:
        world.provision("node-9", key)
    assert refused.value.existing_config == {}


def test_an_address_that_an_operator_takes_in_the_meantime_is_not_shared(make_world: Worlds) -> None:
    world = make_world(records := GatedRecords())
    first = world.submit(request("node-1"))
    records.wait_for_commit()
    second = world.submit(request("node-2"))  # has reserved 10.0.0.3, and waits
    world.append(new_key(), "10.0.0.3/32")
    records.open()
    first.result(WAIT)
    with pytest.raises(errors.AddressTakenError, match=r"10\.0\.0\.3"):
        second.result(WAIT)
    assert str(world.provision("node-2").assigned_ip) == "10.0.0.4"


# Requests at the same time


def test_two_requests_for_one_node_at_once_get_one_address(make_world: Worlds) -> None:
    world = make_world(records := GatedRecords())
    body = request("node-1")
    answers = [world.submit(body) for _ in range(8)]
    records.wait_for_commit()
    # Until the first is decided, the others can't be told that it is there: it may still fail.
    assert not any(answer.done() for answer in answers)
    with pytest.raises(errors.PeerNotFoundError):
        world.service.get_peer_config("node-1")
    records.open()
    answers[0].result(WAIT)
    config = world.service.get_peer_config("node-1")
    for answer in answers[1:]:
        with pytest.raises(DuplicatePeerError) as refused:
            answer.result(WAIT)
        assert refused.value.existing_config == config.model_dump(mode="json")


def test_batch_after_a_failed_one_succeeds(make_world: Worlds, fake_hub: FakeHub) -> None:
    world = make_world(records := GatedRecords())
    key = new_key()
    first = world.submit(request("node-1", key))
    records.wait_for_commit()
    second = world.submit(request("node-2", key))
    fake_hub.failures = 3  # the change, everything, and putting it back
    records.open()
    with pytest.raises(errors.HubUpdateError, match="not this time"):
        first.result(WAIT)
    assert second.result(WAIT).node_id == "node-2"


def test_provision_during_the_removal_of_the_node_happens_after_it(make_world: Worlds) -> None:
    world = make_world(records := GatedRecords(is_open=True))
    body = request("node-1")
    world.service.provision_peer(body, WAIT)
    records.shut()
    gone = world.submit_removal("node-1")
    records.wait_for_commit()
    again = world.submit(body)
    twice = world.submit_removal("node-1")
    # Until its removal is known to have happened.
    assert list(world.service.list_provisioned_peers()) == ["node-1"]
    records.open()
    gone.result(WAIT)
    assert again.result(WAIT).node_id == "node-1"
    twice.result(WAIT)
    with pytest.raises(errors.PeerNotFoundError):
        world.deprovision("node-1")


def test_a_wait_ends_with_its_timeout_and_the_change_goes_on(make_world: Worlds) -> None:
    world = make_world(records := GatedRecords())
    body = request("node-1")
    for _ in range(2):
        # The second waits for the change of the first.
        with pytest.raises(TimeoutError):
            world.service.provision_peer(body, 0.01)
    records.open()
    eventually(lambda: "node-1" in world.service.list_provisioned_peers())


# The list


def test_the_json_of_a_configuration_is_that_of_the_model(make_world: Worlds) -> None:
    world = make_world(network="10.0.0.0/22")
    # More than are rendered in one piece.
    names = ["node-1", "-", "n" * 128, *(f"more-{number}" for number in range(600))]
    futures = [world.submit(request(name)) for name in names]
    for future in futures:
        future.result(WAIT)
    configs = world.service.list_provisioned_peers()
    for name in names[:3]:
        assert world.service.get_peer_json(name) == configs[name].model_dump_json()
    listed = json.loads(b"".join(world.service.list_json()))
    assert listed == {name: config.model_dump(mode="json") for name, config in configs.items()}
    assert list(listed) == names


# What is logged


def test_the_log_names_events_and_carries_no_key(world: World, caplog: pytest.LogCaptureFixture) -> None:
    private_key = world.text.partition("PrivateKey = ")[2].partition("\n")[0]
    with caplog.at_level(logging.DEBUG):
        world.provision("node-1")
        world.deprovision("node-1")
    events = [record.getMessage() for record in caplog.records]
    assert "peer_provisioned" in events
    assert "peer_deprovisioned" in events
    everything = " ".join(str(vars(record)) for record in caplog.records)
    assert private_key not in everything
