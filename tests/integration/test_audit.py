"""The audit log of a real service: actor, action and time of each act, and tampering is detected."""

import getpass
import re
import sqlite3
import subprocess
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest

from tests.harness.command_line import invoke
from tests.harness.failing_wg import FailingWg
from tests.harness.patience import eventually
from tests.harness.requests import AUDIT, KEYS, PEERS, PROVISION, TOKENS, new_key, provision_body
from tests.harness.service import ServiceProcess, StartService
from tests.harness.three_places import settings_for, without_ours
from tests.harness.wireguard import HubInterface

MALFORMED: Final = "ocw_"

Entry = dict[str, Any]


@pytest.fixture
def service(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path, wg: FailingWg
) -> ServiceProcess:
    return start_service(settings_for(hub_interface, tmp_path), path_prefix=wg.directory)


def command(service: ServiceProcess, *arguments: str, **over: object) -> subprocess.CompletedProcess[str]:
    """Run a command beside the service, with its settings."""
    return invoke(*arguments, directory=service.directory, settings={**service.settings, **over})


class Script:
    """Asks for one thing after the other, each under a request ID of its own."""

    def __init__(self, service: ServiceProcess) -> None:
        self._service = service
        self.secret: str | None = None
        self.expected: dict[str, tuple[str, str, str, str | None, str | None]] = {}

    def ask(self, request_id: str, method: str, path: str, status: int, **asked: Any) -> Any:
        """Ask with `self.secret`, else as this host's admin; or with `secret`. Return the answer.

        `logged` is what the audit log has to say of it.
        """
        if "logged" in asked:
            self.expect(request_id, *asked.pop("logged"))
        headers = {"X-Request-ID": request_id} | asked.pop("headers", {})
        if asked.get("secret", self.secret) is None and "secret" in asked:
            asked["auth"] = None
        secret = asked.pop("secret", self.secret)
        if secret is not None:
            headers["Authorization"] = f"Bearer {secret}"
        answer = self._service.client.request(method, path, headers=headers, **asked)
        assert answer.status_code == status, answer.text
        return answer.json()

    def expect(self, request_id: str, action: str, outcome: str, actor: str, *about: str | None) -> None:
        subject, reason = (*about, None, None)[:2]
        self.expected[request_id] = action, outcome, actor, subject, reason

    def entries(self, **parameters: str | int) -> list[Entry]:
        entries: list[Entry] = self.ask("-", "GET", AUDIT, 200, params={"limit": 1000, **parameters})[
            "entries"
        ]
        return entries


def told(entry: Entry) -> tuple[str, str, str, str | None, str | None]:
    return entry["action"], entry["outcome"], entry["actor"], entry["subject"], entry["reason"]


def id_of(secret: str) -> str:
    return secret.split("_")[1]


def test_each_request_is_logged_with_actor_action_time_and_request_id(
    service: ServiceProcess,
) -> None:
    began = datetime.now(UTC)
    script = Script(service)
    ask, expect = script.ask, script.expect
    ask(
        "open",
        "POST",
        PROVISION,
        200,
        json=provision_body("node-1"),
        logged=("provision", "accepted", "local", "node-1"),
    )
    script.secret = ask("first", "POST", KEYS, 201, json={"role": "admin"})["secret"]
    admin = f"key:{id_of(script.secret)}"
    expect("first", "key_made", "accepted", "local", id_of(script.secret))

    wrong = f"{script.secret[:-64]}{'0' * 64}"
    ask(
        "missing",
        "GET",
        f"{PEERS}/node-1",
        401,
        secret=None,
        logged=("authenticate", "refused", "nobody", "node-1", "missing"),
    )
    ask(
        "malformed",
        "GET",
        PEERS,
        401,
        secret=MALFORMED,
        logged=("authenticate", "refused", "nobody", None, "malformed"),
    )
    ask(
        "unknown",
        "GET",
        PEERS,
        401,
        secret=f"ocw_{'0' * 16}_{'0' * 64}",
        logged=("authenticate", "refused", "nobody", None, "unknown"),
    )
    ask(
        "wrong",
        "GET",
        PEERS,
        401,
        secret=wrong,
        logged=("authenticate", "refused", "nobody", id_of(wrong), "secret"),
    )

    made = ask("token", "POST", TOKENS, 201, json={})
    token = f"token:{made['id']}"
    expect("token", "token_made", "accepted", admin, made["id"])
    body = provision_body("node-2")
    ask(
        "enrol",
        "POST",
        PROVISION,
        200,
        secret=made["secret"],
        json=body,
        logged=("provision", "accepted", token, "node-2"),
    )
    ask(
        "again",
        "POST",
        PROVISION,
        409,
        secret=made["secret"],
        json=body,
        logged=("provision", "refused", token, "node-2", "duplicate"),
    )
    ask(
        "used-up",
        "POST",
        PROVISION,
        401,
        secret=made["secret"],
        json=provision_body("node-3"),
        logged=("authenticate", "refused", token, made["id"], "used_up"),
    )
    ask(
        "invalid",
        "POST",
        PROVISION,
        422,
        json={"node_id": "not/a/name"},
        logged=("provision", "refused", admin, None, "invalid"),
    )
    ask(
        "revoke",
        "DELETE",
        f"{TOKENS}/{made['id']}",
        200,
        logged=("token_revoked", "accepted", admin, made["id"]),
    )
    ask(
        "revoked",
        "POST",
        PROVISION,
        401,
        secret=made["secret"],
        json=body,
        logged=("authenticate", "refused", "nobody", made["id"], "revoked"),
    )
    ask(
        "no-token",
        "DELETE",
        f"{TOKENS}/{'0' * 16}",
        404,
        logged=("token_revoked", "refused", admin, None, "not_found"),
    )

    reader = ask("reader", "POST", KEYS, 201, json={"role": "read"})
    expect("reader", "key_made", "accepted", admin, reader["id"])
    ask(
        "may-not",
        "DELETE",
        f"{PEERS}/node-2",
        403,
        secret=reader["secret"],
        logged=("deprovision", "refused", f"key:{reader['id']}", "node-2", "forbidden"),
    )
    ask(
        "peeping",
        "GET",
        TOKENS,
        403,
        secret=reader["secret"],
        logged=("authenticate", "refused", f"key:{reader['id']}", None, "forbidden"),
    )
    ask(
        "key-gone",
        "DELETE",
        f"{KEYS}/{reader['id']}",
        200,
        logged=("key_revoked", "accepted", admin, reader["id"]),
    )
    ask("delete", "DELETE", f"{PEERS}/node-2", 200, logged=("deprovision", "accepted", admin, "node-2"))
    ask(
        "deleted",
        "DELETE",
        f"{PEERS}/node-2",
        404,
        logged=("deprovision", "refused", admin, "node-2", "not_found"),
    )

    done = command(service, "key", "create", "--role", "read")
    assert done.returncode == 0, done.stderr
    entries = script.entries()
    by_request = {entry["request_id"]: told(entry) for entry in entries if entry["request_id"]}
    assert by_request == script.expected
    (beside,) = [told(entry) for entry in entries if entry["request_id"] is None]
    assert beside == ("key_made", "accepted", f"cli:{getpass.getuser()}", id_of(done.stdout.strip()), None)
    assert len(entries) == len(script.expected) + 1
    for entry in entries:
        assert began <= datetime.fromisoformat(entry["at"]) <= datetime.now(UTC)
        assert entry["count"] == 1
        assert entry["source"] == ("127.0.0.1" if entry["request_id"] else None)
    # Neither a secret nor its hash is anywhere in it.
    log = str(entries)
    assert [
        secret for secret in (script.secret, made["secret"], reader["secret"]) if secret[-64:] in log
    ] == []


def test_manual_edits_are_logged(service: ServiceProcess, hub_interface: HubInterface) -> None:
    script, path = Script(service), hub_interface.config_path

    def noticed() -> list[tuple[str, str, str, str | None, str | None]]:
        return [told(entry) for entry in script.entries(actor="service")]

    for number in range(3):
        script.ask("-", "POST", PROVISION, 200, json=provision_body(f"node-{number}"))
    script.ask("-", "DELETE", f"{PEERS}/node-0", 200)
    # What the service writes itself is no edit.
    assert noticed() == []
    key = new_key()
    with path.open("a") as file:
        file.write(f"\n[Peer]\nPublicKey = {key}\nAllowedIPs = 10.0.0.9/32\n")
    # Not before it has been seen to: two edits within one look are one.
    eventually(lambda: len(noticed()) == 1 and key in hub_interface.peers())
    path.write_text(without_ours(path.read_text()))
    eventually(lambda: "node-2" in path.read_text())
    script.ask("-", "POST", PROVISION, 200, json=provision_body("node-3"))
    assert noticed() == [
        ("config_edited", "noted", "service", None, "our own blocks"),
        ("config_edited", "noted", "service", None, None),
    ]


def test_failed_changes_are_logged_as_reverted(service: ServiceProcess, wg: FailingWg) -> None:
    script = Script(service)
    script.ask("first", "POST", PROVISION, 200, json=provision_body("node-1"))
    wg.be("fails")
    script.ask("late", "POST", PROVISION, 503, json=provision_body("node-2"))
    script.ask("stuck", "DELETE", f"{PEERS}/node-1", 503)
    wg.be("works")
    eventually(lambda: service.client.get("/readyz").status_code == 200)
    entries = script.entries()
    about = [told(entry)[:3] for entry in reversed(entries) if entry["subject"] == "node-2"]
    assert about[:2] == [("provision", "accepted", "local"), ("revert", "noted", "service")]
    assert about[2:] == [("provision", "refused", "local")]
    assert {entry["reason"] for entry in entries if entry["outcome"] == "refused"} == {"hub"}
    failures = [entry for entry in entries if entry["action"] == "hub_failed"]
    assert failures
    for entry in failures:
        assert (entry["outcome"], entry["actor"]) == ("noted", "service")
        assert "wg" in entry["reason"]
    (stuck,) = [
        entry for entry in entries if entry["request_id"] == "stuck" and entry["outcome"] == "refused"
    ]
    assert told(stuck)[:4] == ("deprovision", "refused", "local", "node-1")
    # The accepted and not reverted rows tell which peers there are.
    standing: set[str] = set()
    for entry in reversed(entries):
        if (entry["action"], entry["outcome"]) == ("provision", "accepted"):
            standing.add(entry["subject"])
        elif entry["action"] == "revert":
            standing ^= {entry["subject"]}
        elif (entry["action"], entry["outcome"]) == ("deprovision", "accepted"):
            standing.discard(entry["subject"])
    assert standing == set(service.client.get(PEERS).json())


def test_many_refusals_are_counted_and_none_is_dropped(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    many = {"WIREGUARD_RATE_LIMIT_FAILED_AUTHENTICATION": "100000/minute"}
    service = start_service(settings_for(hub_interface, tmp_path, **many))
    script = Script(service)
    script.secret = script.ask("first", "POST", KEYS, 201, json={"role": "admin"})["secret"]
    for number in range(300):
        script.ask("-", "GET", f"{PEERS}/node-{number % 2}", 401, secret=None)
        script.ask("-", "GET", f"{PEERS}/node-{number}", 401, secret=MALFORMED)
    missing = [entry for entry in script.entries(action="authenticate") if entry["reason"] == "missing"]
    assert sum(entry["count"] for entry in missing) == 300
    assert len(missing) < 100
    malformed = [entry for entry in script.entries() if entry["reason"] == "malformed"]
    assert sum(entry["count"] for entry in malformed) == 300
    # One address can't fill the disk with names that it makes up.
    assert len(malformed) < 100


def test_refusals_survive_the_end_of_the_process(service: ServiceProcess) -> None:
    script = Script(service)
    script.ask("last", "DELETE", f"{PEERS}/nobody", 404)
    service.terminate()
    service.start()
    assert [entry["request_id"] for entry in script.entries()] == ["last"]


def paged(script: Script, limit: int, **parameters: str) -> list[Entry]:
    """Read the whole log page by page."""
    found: list[Entry] = []
    before: dict[str, int] = {}
    while True:
        page = script.ask("-", "GET", AUDIT, 200, params={"limit": limit, **before, **parameters})
        assert len(page["entries"]) <= limit
        found += page["entries"]
        if page["next"] is None:
            return found
        assert page["next"] == page["entries"][-1]["sequence"]
        before = {"before": page["next"]}


def test_pages_are_complete_and_do_not_overlap_while_the_log_grows(service: ServiceProcess) -> None:
    script = Script(service)
    for number in range(6):
        script.ask("-", "POST", PROVISION, 200, json=provision_body(f"node-{number}"))
    for number in range(3):
        script.ask("-", "DELETE", f"{PEERS}/node-{number}", 200)
        script.ask("-", "DELETE", f"{PEERS}/node-{number}", 404)
        # Has it written, so that the next is a row of its own.
        script.entries()
    script.secret = script.ask("-", "POST", KEYS, 201, json={"role": "admin"})["secret"]
    script.secret = script.ask("-", "POST", KEYS, 201, json={"role": "read"})["secret"]
    whole = script.entries()
    assert [entry["sequence"] for entry in whole] == list(range(14, 0, -1))
    for limit in (1, 3, 7, 13, 14, 15, 1000):
        assert paged(script, limit) == whole
    for chosen in (
        {"action": "deprovision"},
        {"actor": "local"},
        {"subject": "node-1"},
        {"subject": "node-1", "action": "deprovision"},
        {"actor": "nobody"},
    ):
        wanted = [entry for entry in whole if all(entry[name] == value for name, value in chosen.items())]
        assert paged(script, 2, **chosen) == wanted
    first = script.ask("-", "GET", AUDIT, 200, params={"limit": 5})
    script.ask("new", "DELETE", f"{PEERS}/node-5", 403)
    second = script.ask("-", "GET", AUDIT, 200, params={"limit": 5, "before": first["next"]})
    assert first["entries"] + second["entries"] == whole[:10]
    for wrong in ({"limit": 0}, {"limit": 1001}, {"before": 0}, {"action": "nap"}, {"page": 2}):
        script.ask("-", "GET", AUDIT, 422, params=wrong)


CASES: Final = {
    "a row changed": (["UPDATE audit SET subject = 'node-9' WHERE sequence = 3"], 3),
    "the first dropped": (["DELETE FROM audit WHERE sequence = 1"], 1),
    "one in the middle dropped": (["DELETE FROM audit WHERE sequence = 3"], 3),
    "the last dropped": (["DELETE FROM audit WHERE sequence = 6"], 6),
    "two swapped": (
        [
            "UPDATE audit SET sequence = -2 WHERE sequence = 2",
            "UPDATE audit SET sequence = 2 WHERE sequence = 5",
            "UPDATE audit SET sequence = 5 WHERE sequence = -2",
        ],
        2,
    ),
    "one dropped, the others moved up": (
        [
            "DELETE FROM audit WHERE sequence = 3",
            "UPDATE audit SET sequence = sequence - 1 WHERE sequence > 3",
        ],
        3,
    ),
    "one added": (
        [
            """INSERT INTO audit (sequence, at, action, outcome, actor, count, previous_hash, hash)
            SELECT 7, at, action, outcome, actor, count, hash, hash FROM audit WHERE sequence = 6"""
        ],
        7,
    ),
}


def test_verify_names_the_row_that_was_tampered_with(service: ServiceProcess, tmp_path: Path) -> None:
    script = Script(service)
    for number in range(5):
        script.ask("-", "POST", PROVISION, 200, json=provision_body(f"node-{number}"))
    script.ask("-", "DELETE", f"{PEERS}/node-9", 404)
    (newest, *_) = entries = script.entries()
    assert len(entries) == 6
    # While the service runs, and goes on writing.
    whole = command(service, "audit", "verify")
    assert (whole.returncode, whole.stderr) == (0, "")
    assert whole.stdout == f"whole: 6 entries\nhead: {newest['hash']}\n"
    assert len(command(service, "audit", "list", "--subject", "node-9").stdout.splitlines()) == 1
    service.terminate()

    for name, (statements, row) in CASES.items():
        path = tmp_path / f"{name}.sqlite"
        with (
            closing(sqlite3.connect(tmp_path / "state" / "provisioning.sqlite")) as source,
            closing(sqlite3.connect(path)) as copy,
        ):
            source.backup(copy)
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                copy.execute("DELETE FROM audit")
            for trigger in ("audit_refuses_update", "audit_refuses_delete"):
                copy.execute(f"DROP TRIGGER {trigger}")
            for statement in statements:
                copy.execute(statement)
            copy.commit()
        path.chmod(0o600)
        done = command(service, "audit", "verify", DATABASE_URL=f"sqlite:///{path}")
        assert (done.returncode, done.stdout) == (1, ""), name
        assert re.match(rf"broken: Row {row} (was|is|stands)\b", done.stderr), (name, done.stderr)


def test_the_log_of_a_busy_hub_is_whole_and_in_order(service: ServiceProcess) -> None:
    script = Script(service)
    for number in range(40):
        script.ask("-", "POST", PROVISION, 200, json=provision_body(f"node-{number}"))
        script.ask("-", "DELETE", f"{PEERS}/nobody", 404)
    assert command(service, "audit", "verify").stdout.startswith("whole: ")
    entries = script.entries()
    accepted = [entry for entry in reversed(entries) if entry["outcome"] == "accepted"]
    assert [entry["subject"] for entry in accepted] == [f"node-{number}" for number in range(40)]
    moments = [datetime.fromisoformat(entry["at"]) for entry in accepted]
    assert moments == sorted(moments)
    assert moments[-1] - moments[0] < timedelta(minutes=1)
