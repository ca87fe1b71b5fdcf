"""After the process died: each acknowledged change is there, and nothing else."""

import random
import re
import shutil
import sqlite3
import threading
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import httpx
import pytest

from tests.harness.patience import eventually
from tests.harness.requests import NO_TLS, PEERS, PROVISION, new_key, provision_body
from tests.harness.service import ServiceProcess, StartService
from tests.harness.three_places import assert_in_step, listed, settings_for
from tests.harness.torture import TORTURE
from tests.harness.wireguard import HubInterface

CLIENTS: Final = 16


def test_restart_after_a_kill_keeps_every_peer(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path))
    bodies = [provision_body(f"node-{number}") for number in range(50)]
    configs = [service.client.post(PROVISION, json=body).json()["config"] for body in bodies]
    before = assert_in_step(service, hub_interface)
    service.kill()
    hub_interface.down()
    hub_interface.start()  # as after a reboot whose wg-quick did not come to its end
    service.start()
    assert assert_in_step(service, hub_interface) == before
    retry = service.client.post(PROVISION, json=bodies[7])
    assert retry.status_code == 409
    assert retry.json()["detail"]["existing_config"] == configs[7]
    added = service.client.post(PROVISION, json=provision_body("node-50")).json()["config"]["assigned_ip"]
    assert added not in before.values()
    assert len(assert_in_step(service, hub_interface)) == 51


def test_state_directory_is_private(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path))
    service.client.post(PROVISION, json=provision_body("node-1")).raise_for_status()
    state = tmp_path / "state"
    assert state.stat().st_mode & 0o777 == 0o700
    files = list(state.iterdir())
    assert {path.name for path in files} >= {"provisioning.sqlite", "provisioning.sqlite-wal"}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


@dataclass
class Client:
    """A node's view: what it was told of each name it used, and what it was never told."""

    service: ServiceProcess
    number: int
    seed: int
    present: dict[str, str] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)
    unknown: set[str] = field(default_factory=set)
    answers: int = 0

    def work(self) -> None:
        """Add and delete until the service is dead."""
        chance = random.Random(self.seed)  # noqa: S311 - not a secret
        with httpx.Client(
            base_url=self.service.url,
            auth=self.service.local_admin,
            timeout=20.0,
            trust_env=False,
            verify=NO_TLS,
        ) as client:
            try:
                while True:
                    self._act(client, chance)
            except httpx.TransportError:
                return

    def _act(self, client: httpx.Client, chance: random.Random) -> None:
        if self.present and chance.random() < 0.4:
            name = chance.choice(sorted(self.present))
            self.unknown.add(name)
            answer = client.delete(f"{PEERS}/{name}")
            assert answer.status_code == 200, answer.text
            del self.present[name]
            self.absent.add(name)
        else:
            name = f"node-{self.number}-{self.seed}-{self.answers}"
            self.unknown.add(name)
            answer = client.post(PROVISION, json=provision_body(name, new_key()))
            assert answer.status_code == 200, answer.text
            self.present[name] = answer.json()["config"]["assigned_ip"]
        self.unknown.discard(name)
        self.answers += 1


@pytest.mark.torture
def test_kill_under_load_loses_no_acknowledged_change(
    hub_interface: HubInterface,
    start_service: StartService,
    tmp_path: Path,
    chance: random.Random,
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path, WIREGUARD_IP_POOL="10.0.0.0/16"))
    present: dict[str, str] = {}
    kills, answers, in_doubt, survived = 0, 0, 0, 0
    for _ in TORTURE.rounds(3):
        clients = [Client(service, number, chance.randrange(10**9)) for number in range(CLIENTS)]
        threads = [threading.Thread(target=client.work) for client in clients]
        for thread in threads:
            thread.start()
        time.sleep(chance.uniform(0.05, 1.0))
        service.kill()
        kills += 1
        for thread in threads:
            thread.join()
        service.start()
        found = assert_in_step(service, hub_interface)
        unknown: set[str] = set()
        for client in clients:
            # A name that is in doubt counts as neither: its last answer never came.
            present |= {name: ip for name, ip in client.present.items() if name not in client.unknown}
            assert not client.absent & found.keys(), "deleted, and still there"
            unknown |= client.unknown
            answers += client.answers
        lost = {name: ip for name, ip in present.items() if found.get(name) != ip}
        assert not lost, "acknowledged, and not there"
        surplus = found.keys() - present.keys() - unknown
        assert not surplus, "there, and never asked for"
        in_doubt += len(unknown)
        survived += len(unknown & found.keys())
        present = dict(found)
    assert answers > kills * CLIENTS / 4
    print(  # noqa: T201 - the figures are what one runs this for, with -s
        f"\nkilled {kills} times under {CLIENTS} clients: {answers} acknowledged, {in_doubt} in doubt "
        f"(of those {survived} there afterwards), {len(present)} peers at the end"
    )


def _workflows(directory: Path) -> list[str]:
    with sqlite3.connect(directory / "state" / "provisioning.sqlite") as connection:
        rows = connection.execute("SELECT status FROM workflow_status").fetchall()
    connection.close()
    return [status for (status,) in rows]


def _states(directory: Path) -> dict[str, str]:
    with closing(sqlite3.connect(directory / "state" / "provisioning.sqlite")) as connection:
        return dict(connection.execute("SELECT node_id, state FROM peers"))


@pytest.mark.parametrize(
    ("moment", "there"),
    [("before-commit", False), ("after-commit", True), ("after-apply", True), ("before-compensation", True)],
)
def test_process_killed_inside_a_batch_leaves_a_consistent_state(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path, moment: str, there: bool
) -> None:
    settings = settings_for(hub_interface, tmp_path)
    module = ("tests.harness.dying_service", moment)
    failing = None
    if moment == "before-compensation":
        failing = tmp_path / "bin"
        failing.mkdir()
        script = failing / "wg"
        script.write_text(
            "#!/bin/sh\n"
            'case "$1" in addconf) exit 1;; esac\n'
            f'[ -e {tmp_path}/service0/die ] && case "$1" in set|syncconf) exit 1;; esac\n'
            f'exec {shutil.which("wg")} "$@"\n'
        )
        script.chmod(0o755)
    dying = start_service(settings, module=module, path_prefix=failing)
    kept, gone = provision_body("kept"), provision_body("gone")
    for body in (kept, gone):
        dying.client.post(PROVISION, json=body).raise_for_status()
    (dying.directory / "die").touch()
    new = provision_body("new")
    with pytest.raises(httpx.TransportError):
        dying.client.post(PROVISION, json=new)
    dying.wait_exit()
    (dying.directory / "die").unlink()
    assert _states(tmp_path).get("new") == ("pending" if there else None)

    service = start_service(settings)
    assert set(assert_in_step(service, hub_interface)) == {"kept", "gone"} | ({"new"} if there else set())
    eventually(lambda: set(_states(tmp_path).values()) == {"active"})
    # What DBOS takes up again must find its work done, and come to an end.
    eventually(lambda: set(_workflows(tmp_path)) == {"SUCCESS"})
    before = assert_in_step(service, hub_interface)
    retry = service.client.post(PROVISION, json=new)
    assert retry.status_code == (409 if there else 200)
    if there:
        assert retry.json()["detail"]["existing_config"]["assigned_ip"] == before["new"]
    assert service.client.delete(f"{PEERS}/gone").status_code == 200
    assert set(assert_in_step(service, hub_interface)) == {"kept", "new"}


@pytest.mark.parametrize("moment", ["after-commit", "after-apply"])
def test_a_deletion_that_the_process_did_not_survive_is_brought_to_its_end(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path, moment: str
) -> None:
    settings = settings_for(hub_interface, tmp_path)
    dying = start_service(settings, module=("tests.harness.dying_service", moment))
    kept, gone = provision_body("kept"), provision_body("gone")
    for body in (kept, gone):
        dying.client.post(PROVISION, json=body).raise_for_status()
    before = assert_in_step(dying, hub_interface)
    (dying.directory / "die").touch()
    with pytest.raises(httpx.TransportError):
        dying.client.delete(f"{PEERS}/gone")
    dying.wait_exit()
    assert _states(tmp_path)["gone"] == "removing"
    assert (gone["wireguard_public_key"] in hub_interface.peers()) == (moment == "after-commit")
    service = start_service(settings)
    assert set(assert_in_step(service, hub_interface)) == {"kept"}
    assert listed(service).keys() == {"kept"}
    assert _states(tmp_path) == {"kept": "active"}
    # Name, key and address can be had again.
    assert service.client.post(PROVISION, json=gone).status_code == 200
    assert assert_in_step(service, hub_interface) == before


def test_second_process_on_the_same_config_stops_and_changes_nothing(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    settings = settings_for(hub_interface, tmp_path)
    first = start_service(settings)
    first.client.post(PROVISION, json=provision_body("node-1")).raise_for_status()
    copy = {"WIREGUARD_CONFIG_PATH": _copy(hub_interface.config_path, tmp_path), "WIREGUARD_RELOAD": "off"}
    overs: list[tuple[dict[str, object], str]] = [
        ({"STATE_DIRECTORY": tmp_path / "other"}, f"The hub's config {hub_interface.config_path}"),
        (copy, "The database"),
    ]
    for over, what in overs:
        second = start_service({**settings, **over}, ready=None)
        assert second.wait_exit() != 0
        assert f"{what}" in second.log
        assert f"is already managed by another process (PID {first.pid}); stop that one first" in second.log
        assert "Traceback" not in second.log
    assert first.client.post(PROVISION, json=provision_body("node-2")).status_code == 200
    assert len(assert_in_step(first, hub_interface)) == 2


def _copy(path: Path, directory: Path) -> Path:
    copy = directory / "copy" / path.name
    copy.parent.mkdir()
    copy.write_bytes(path.read_bytes())
    return copy


def test_of_two_managed_blocks_with_one_address_the_later_wins_as_it_does_in_wg(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    settings = settings_for(hub_interface, tmp_path, ENABLE_DBOS="false")
    service = start_service(settings)
    service.client.post(PROVISION, json=provision_body("node-1")).raise_for_status()
    service.terminate()
    block = hub_interface.config_path.read_text().removeprefix(hub_interface.interface_section)
    with hub_interface.config_path.open("a") as file:
        file.write(re.sub("PublicKey = .*", f"PublicKey = {new_key()}", block.replace("node-1", "node-2")))
    service.start()
    assert assert_in_step(service, hub_interface) == {"node-2": "10.0.0.2"}
    assert "unknown_peers_removed" not in service.log


def test_without_durable_records_peers_are_read_from_the_file(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path, ENABLE_DBOS="false"))
    body = provision_body("node-1")
    service.client.post(PROVISION, json=body).raise_for_status()
    service.kill()
    service.start()
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["admin.header"]
    assert assert_in_step(service, hub_interface) == {"node-1": "10.0.0.2"}
    retry = service.client.post(PROVISION, json=body)
    assert retry.status_code == 409
    assert retry.json()["detail"]["existing_config"]["assigned_ip"] == "10.0.0.2"
    answer = service.client.post(PROVISION, json=provision_body("node-2"))
    assert answer.json()["config"]["assigned_ip"] == "10.0.0.3"
    assert service.client.delete(f"{PEERS}/node-1").status_code == 200
    assert assert_in_step(service, hub_interface) == {"node-2": "10.0.0.3"}


def test_sigterm_finishes_accepted_requests(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path))
    service.client.post(PROVISION, json=provision_body("node-1")).raise_for_status()
    assert service.terminate() == 0
    assert "Traceback" not in service.log
    service.start()
    assert set(assert_in_step(service, hub_interface)) == {"node-1"}
