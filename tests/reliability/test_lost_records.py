"""Records that were lost, new or restored: no start removes the hub's peers by itself."""

import json
import sqlite3
from pathlib import Path

import pytest

from tests.harness.lost_records import back_up, is_ready, names, provision, reconcile, restore
from tests.harness.patience import eventually
from tests.harness.requests import AUDIT, PEERS, PROVISION, bearer, new_key, provision_body
from tests.harness.service import ServiceProcess, StartService
from tests.harness.three_places import assert_in_step, in_file, listed, settings_for
from tests.harness.wireguard import HubInterface


def test_records_switched_from_memory_to_disk_keep_every_peer(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    settings = settings_for(hub_interface, tmp_path)
    service = start_service({**settings, "ENABLE_DBOS": "false"})
    provision(service, *names(0, 8))
    before = assert_in_step(service, hub_interface)
    service.settings["ENABLE_DBOS"] = "true"
    service.restart()
    assert assert_in_step(service, hub_interface) == before
    assert "WARNING backend.services.hub.history peers_adopted peers=8" in service.log
    (notice,) = service.client.get("/readyz").json()["notices"]
    assert notice.startswith("8 peers were taken from the config")
    entries = service.client.get(AUDIT).json()["entries"]
    assert [e["reason"] for e in entries if e["action"] == "peers_adopted"] == ["8 peers, from the config"]
    assert "1 notice(s) acknowledged" in reconcile(service, "--acknowledge").stdout
    eventually(lambda: service.client.get("/readyz").json()["notices"] == [])
    new = service.client.post(PROVISION, json=provision_body("node-8")).json()["config"]["assigned_ip"]
    assert new not in before.values()
    service.restart()
    assert len(assert_in_step(service, hub_interface)) == 9


def test_switching_to_memory_and_back_pauses_only_after_changes(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path))
    provision(service, *names(0, 3))
    before = assert_in_step(service, hub_interface)
    for mode in ("false", "true"):
        service.settings["ENABLE_DBOS"] = mode
        service.restart()
        assert assert_in_step(service, hub_interface) == before
    service.settings["ENABLE_DBOS"] = "false"
    service.restart()
    provision(service, "node-3")
    assert service.client.delete(f"{PEERS}/node-0").status_code == 200
    service.settings["ENABLE_DBOS"] = "true"
    service.ready = "/healthz"
    service.restart()
    assert "1 of 3 peers on the hub are in no record" in service.client.get("/readyz").json()["detail"]
    shown = reconcile(service, "--show").stdout
    assert shown.count("unknown: node-3") == 1
    assert shown.count("missing: node-0") == 1
    assert reconcile(service, "--adopt").returncode == 0
    eventually(lambda: is_ready(service))
    assert set(assert_in_step(service, hub_interface)) == set(names(0, 4))


@pytest.mark.parametrize("away", ["moved", "deleted"])
def test_lost_state_directory_removes_no_peer_from_the_hub(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path, away: str
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path))
    provision(service, *names(0, 7))
    before = assert_in_step(service, hub_interface)
    service.terminate()
    if away == "moved":
        (tmp_path / "state").rename(tmp_path / "state.old")
    else:
        for path in (tmp_path / "state").iterdir():
            path.unlink()
    service.start()
    assert assert_in_step(service, hub_interface) == before
    service.kill()
    service.start()
    assert assert_in_step(service, hub_interface) == before


def test_token_alone_learns_nothing_of_an_adopted_peer_and_an_operator_sets_its_identity(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    settings = settings_for(hub_interface, tmp_path)
    service = start_service({**settings, "ENABLE_DBOS": "false"})
    (body,) = provision(service, "node-0")
    config = service.client.get(f"{PEERS}/node-0").json()
    service.settings["ENABLE_DBOS"] = "true"
    service.restart()
    service.become_admin()
    token = bearer(service.credential("token", "create"))
    refused = service.client.post(PROVISION, json=body, headers=token)
    assert refused.status_code == 409
    assert refused.json()["detail"]["existing_config"] == {}
    adopted_config = {
        **config,
        "provisioned_at": service.client.get(f"{PEERS}/node-0").json()["provisioned_at"],
    }
    repeated = service.client.post(PROVISION, json=body)
    assert repeated.status_code == 409
    assert repeated.json()["detail"]["existing_config"] == adopted_config
    # From now on the identity key counts, after a restart as well.
    service.restart()
    other = service.client.post(PROVISION, json={**body, "public_key": "another"})
    assert other.json()["detail"]["existing_config"] == {"node_id": "node-0", "assigned_ip": "10.0.0.2"}
    assert service.client.post(PROVISION, json=body).json()["detail"]["existing_config"] == adopted_config


def test_records_older_than_the_hub_pause_the_service_and_remove_no_peer(
    restored: tuple[ServiceProcess, dict[str, str]], hub_interface: HubInterface
) -> None:
    service, before = restored
    red = service.client.get("/readyz")
    assert red.status_code == 503
    assert "10 of 12 peers on the hub are in no record" in red.json()["detail"]
    assert "reconcile --show" in red.json()["detail"]
    for answer in (
        service.client.post(PROVISION, json=provision_body("node-new")),
        service.client.delete(f"{PEERS}/node-0"),
    ):
        assert answer.status_code == 503
        assert "paused" in answer.json()["detail"]
        assert "Retry-After" in answer.headers
    assert set(listed(service)) == {"node-0", "node-1"}
    assert {node: address for node, (_, address) in in_file(hub_interface.config_path).items()} == before
    assert len(hub_interface.peers()) == 12
    shown = reconcile(service, "--show").stdout
    assert shown.count("unknown: node-") == 10
    assert "unknown: node-11" in shown
    # A second start decides nothing either.
    service.kill()
    service.start()
    assert service.client.get("/readyz").status_code == 503
    assert len(hub_interface.peers()) == 12


def test_operator_adopts_peers_that_restored_records_lack(
    restored: tuple[ServiceProcess, dict[str, str]], hub_interface: HubInterface
) -> None:
    service, before = restored
    done = reconcile(service, "--adopt")
    assert "carried out; the records have 12 peers" in done.stdout
    eventually(lambda: is_ready(service))
    assert assert_in_step(service, hub_interface) == before
    provision(service, "node-12")
    service.ready = "/readyz"
    service.restart()
    assert len(assert_in_step(service, hub_interface)) == 13
    actors = [
        (entry["action"], entry["actor"].partition(":")[0])
        for entry in service.client.get(AUDIT).json()["entries"]
    ]
    assert ("peers_adopted", "cli") in actors
    assert ("hub_paused", "service") in actors


def test_operator_removes_peers_that_restored_records_lack(
    restored: tuple[ServiceProcess, dict[str, str]], hub_interface: HubInterface
) -> None:
    service, before = restored
    # Whatever happens to the process, what was decided is carried out.
    service.terminate()
    done = reconcile(service, "--force")
    assert "at its next start" in done.stdout
    service.start()
    eventually(lambda: is_ready(service))
    left = assert_in_step(service, hub_interface)
    assert left == {node: before[node] for node in ("node-0", "node-1")}
    service.ready = "/readyz"
    service.restart()
    assert assert_in_step(service, hub_interface) == left


def test_decision_is_refused_where_nothing_waits_for_one(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path))
    provision(service, "node-0")
    for option in ("--adopt", "--force"):
        refused = reconcile(service, option)
        assert refused.returncode == 1
        assert "nothing was decided: the records know every peer" in refused.stderr
    assert "generation 1, 1 peers of ours" in reconcile(service, "--show").stdout
    assert "choose one of" in reconcile(service).stderr


def test_peers_that_only_the_interface_has_are_adopted_under_names_of_their_own(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path))
    provision(service, *names(0, 2))
    copy, text = back_up(tmp_path / "state"), hub_interface.config_path.read_bytes()
    bodies = provision(service, *names(2, 9))
    before = assert_in_step(service, hub_interface)
    service.terminate()
    # Records and config from a backup, and an interface that was never down.
    restore(tmp_path / "state", copy)
    hub_interface.config_path.write_bytes(text)
    service.ready = "/healthz"
    service.start()
    assert "7 of 9 peers" in service.client.get("/readyz").json()["detail"]
    assert len(hub_interface.peers()) == 9
    assert reconcile(service, "--adopt").returncode == 0
    eventually(lambda: is_ready(service))
    after = assert_in_step(service, hub_interface)
    assert sorted(after.values()) == sorted(before.values())
    assert {name.partition("-")[0] for name in after} == {"node", "adopted"}
    key = bodies[0]["wireguard_public_key"]
    assert key in hub_interface.peers()


def test_recorded_removals_are_carried_out_after_a_kill_however_many(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    service = start_service(
        settings_for(hub_interface, tmp_path), module=("tests.harness.dying_service", "after-commit")
    )
    provision(service, *names(0, 10))
    connection = sqlite3.connect(tmp_path / "state" / "provisioning.sqlite")
    dying = service.directory / "die"
    dying.touch()
    # One at a time: it dies after the first one's records are written.
    with pytest.raises(Exception, match="disconnected"):
        service.client.delete(f"{PEERS}/node-0")
    service.wait_exit()
    dying.unlink()
    # As if the batch had held eight.
    connection.execute(
        "UPDATE peers SET state = 'removing', generation = (SELECT generation FROM hubs) "
        "WHERE node_id < 'node-8'"
    )
    connection.commit()
    connection.close()
    assert len(hub_interface.peers()) == 10
    service.start()
    assert set(assert_in_step(service, hub_interface)) == {"node-8", "node-9"}


def test_managed_blocks_pasted_into_a_running_config_wait_for_an_operator(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path))
    provision(service, *names(0, 3))
    path = hub_interface.config_path
    ours = path.read_text()
    pasted = "".join(
        f"\n# wireguard-provisioning: managed peer pasted-{number}\n[Peer]\nPublicKey = {new_key()}\n"
        f"AllowedIPs = 10.0.0.{100 + number}/32\n"
        for number in range(6)
    )
    path.write_text(ours + pasted)
    eventually(lambda: "6 of 9 peers" in service.client.get("/readyz").text)
    assert path.read_text() == ours + pasted
    path.write_text(ours)
    eventually(lambda: is_ready(service))
    # Few are taken off, as any edit of our blocks is undone.
    path.write_text(ours + "".join(pasted.split("\n\n")[0:1]))
    eventually(lambda: path.read_text() == ours)
    assert_in_step(service, hub_interface)


def test_audit_log_that_lost_a_revocation_is_reported_at_the_start_and_by_verify(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path))
    service.become_admin()
    provision(service, "node-0")
    key = service.credential("key", "create", "--role", "read")
    copy = back_up(tmp_path / "state")
    mark = hub_interface.config_path.with_name(f".{hub_interface.config_path.name}.mark")
    assert service.command("key", "revoke", key.split("_")[1]).returncode == 0
    last = service.client.get(AUDIT).json()["entries"][0]["sequence"]
    eventually(lambda: json.loads(mark.read_text())["audit_sequence"] >= last)
    service.terminate()
    restore(tmp_path / "state", copy)
    service.start()
    assert "audit_log_stepped_back" in service.log
    verified = service.command("audit", "verify")
    assert verified.returncode == 1
    assert "credentials that were revoked since work again" in verified.stderr
