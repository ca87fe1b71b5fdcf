"""`python -m backend token|key|audit` as somebody types it, alone and beside a service that runs."""

import json
import os
import pwd
import re
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.harness.command_line import ROOT, backend, hub_settings, invoke
from tests.harness.patience import eventually
from tests.harness.requests import PEERS, PROVISION, bearer, provision_body
from tests.harness.service import ServiceProcess

SECRET = re.compile(r"ocw_([0-9a-f]{16})_[0-9a-f]{64}")

Run = Callable[..., subprocess.CompletedProcess[str]]
Make = Callable[..., str]


def python(program: str, *arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=directory,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def records_of(directory: Path) -> Path:
    return directory / "state" / "provisioning.sqlite"


def lines(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


def id_of(secret: str) -> str:
    found = SECRET.fullmatch(secret)
    assert found is not None
    return found[1]


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, object]:
    return hub_settings(tmp_path) | {
        "ENABLE_DBOS": "true",
        # Who waits for a credential to count tries it often.
        "WIREGUARD_RATE_LIMIT_FAILED_AUTHENTICATION": "1000000/minute",
    }


@pytest.fixture
def run(tmp_path: Path, settings: Mapping[str, object]) -> Run:
    def in_the_tests_directory(*arguments: str, **over: object) -> subprocess.CompletedProcess[str]:
        return invoke(*arguments, directory=tmp_path, settings={**settings, **over})

    return in_the_tests_directory


@pytest.fixture
def run_process(tmp_path: Path, settings: Mapping[str, object]) -> Run:
    def in_the_tests_directory(*arguments: str, **over: object) -> subprocess.CompletedProcess[str]:
        return backend(*arguments, directory=tmp_path, settings={**settings, **over})

    return in_the_tests_directory


@pytest.fixture
def make(run: Run) -> Make:
    """Return a function that makes a credential and returns its secret."""
    return partial(made_by, run)


@pytest.fixture
def make_in_a_process(run_process: Run) -> Make:
    """Return the same for several threads."""
    return partial(made_by, run_process)


def made_by(run: Run, *arguments: str) -> str:
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert SECRET.fullmatch(done.stdout.strip())
    return done.stdout.strip()


@pytest.fixture
def service(run: Run, start_service: Callable[..., ServiceProcess], settings: dict[str, object]) -> Any:
    assert run("hub", "init").returncode == 0
    return start_service(settings)


def test_the_first_key_is_made_before_the_service_ever_ran_in_private(
    run: Run, make: Make, tmp_path: Path
) -> None:
    key, token = make("key", "create", "--role", "admin", "--note", "mine"), make("token", "create")
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "state").iterdir()} == {0o600}
    (listed_key,), (listed_token,) = lines(run("key", "list")), lines(run("token", "list"))
    user = pwd.getpwuid(os.geteuid()).pw_name
    assert listed_key["id"] == id_of(key)
    assert {name: listed_key[name] for name in ("role", "note", "state", "created_by", "expires_at")} == {
        "role": "admin",
        "note": "mine",
        "state": "active",
        "created_by": f"cli:{user}",
        "expires_at": None,
    }
    assert (listed_token["id"], listed_token["max_uses"], listed_token["uses"]) == (id_of(token), 1, 0)


def test_a_tokens_options_are_what_it_has(run: Run, make: Make) -> None:
    options = ["--max-uses", "3", "--expires-in", "60", "--node-id-pattern", "swarm-*", "--note", "for ü"]
    make("token", "create", *options, "--source-cidr", "2001:db8::/32")
    (token,) = lines(run("token", "list"))
    assert {name: token[name] for name in ("max_uses", "node_id_pattern", "source_cidr")} == {
        "max_uses": 3,
        "node_id_pattern": "swarm-*",
        "source_cidr": "2001:db8::/32",
    }
    assert token["note"] == "for ü"


def test_a_secret_is_shown_once_and_kept_nowhere(run: Run, make: Make, tmp_path: Path) -> None:
    secrets = [make("key", "create", "--role", "read"), make("token", "create")]
    told = "".join(
        run(*command).stdout for command in (["key", "list"], ["token", "list"], ["audit", "list"])
    )
    kept = b"".join(path.read_bytes() for path in (tmp_path / "state").iterdir())
    connection = sqlite3.connect(records_of(tmp_path))
    hashes = [row[0] for row in connection.execute("SELECT secret_hash FROM credentials")]
    connection.close()
    assert len(hashes) == 2
    for secret in secrets:
        assert id_of(secret) in told
        assert secret.rpartition("_")[2] not in told
        assert secret.rpartition("_")[2].encode() not in kept
    for kept_hash in hashes:
        assert kept_hash not in told


def test_actor_of_a_command_is_the_operating_systems_user(run: Run, make: Make) -> None:
    assert run("key", "create", "--role", "read", LOGNAME="mallory", USER="mallory").returncode == 0
    assert "mallory" not in run("audit", "list").stdout
    assert "mallory" not in run("key", "list").stdout


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["token", "create", "--expires-in", "0"], "--expires-in: "),
        (["token", "create", "--max-uses", "0"], "--max-uses: "),
        (["token", "create", "--max-uses", "1000001"], "--max-uses: "),
        (["token", "create", "--node-id-pattern", "swarm-.+$"], "--node-id-pattern: "),
        (["token", "create", "--source-cidr", "192.0.2.1/24"], "--source-cidr: "),
        (["token", "create", "--source-cidr", "nowhere"], "--source-cidr: "),
        (["token", "create", "--note", "two\nlines"], "--note: "),
        (["token", "create", "--note", "x" * 257], "--note: "),
        (["key", "create", "--role", "read", "--expires-in", "-1"], "--expires-in: "),
        (["key", "create", "--role", "root"], "--role: "),
        (["audit", "list", "--action", "nothing"], "--action: "),
    ],
)
def test_a_wrong_option_is_one_sentence_and_makes_nothing(
    run: Run, tmp_path: Path, command: list[str], expected: str
) -> None:
    done = run(*command)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {expected}")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["token", "key"])
@pytest.mark.parametrize("name", ["0123456789abcdef", "", "nothing of that kind"])
def test_an_unknown_id_is_named(run: Run, kind: str, name: str) -> None:
    done = run(kind, "revoke", name)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {kind} {name} not found\n"


def test_token_and_key_commands_do_not_accept_each_others_ids(run: Run, make: Make) -> None:
    key, token = id_of(make("key", "create", "--role", "read")), id_of(make("token", "create"))
    assert run("token", "revoke", key).returncode == 1
    assert run("key", "revoke", token).returncode == 1
    assert {entry["state"] for entry in lines(run("key", "list")) + lines(run("token", "list"))} == {"active"}


def test_revoked_credentials_stay_listed_and_the_revocation_is_logged(run: Run, make: Make) -> None:
    name = id_of(make("token", "create"))
    done = run("token", "revoke", name)
    assert (done.returncode, done.stdout) == (0, f"token {name} is revoked\n")
    assert [token["state"] for token in lines(run("token", "list"))] == ["revoked"]
    acts = [(entry["action"], entry["subject"]) for entry in lines(run("audit", "list"))]
    assert acts == [("token_made", name), ("token_revoked", name)]
    assert [entry["sequence"] for entry in lines(run("audit", "list", "--limit", "1"))] == [2]
    assert [entry["sequence"] for entry in lines(run("audit", "list", "--action", "token_made"))] == [1]
    assert lines(run("audit", "list", "--actor", "nobody")) == []


def test_verify_names_a_tampered_row_or_prints_the_newest_hash(run: Run, make: Make, tmp_path: Path) -> None:
    empty = run("audit", "verify")
    assert empty.stdout == f"whole: 0 entries\nhead: {'0' * 64}\n"
    for _ in range(3):
        make("token", "create")
    whole = run("audit", "verify")
    assert whole.returncode == 0
    assert whole.stdout.startswith("whole: 3 entries\nhead: ")
    assert whole.stdout.split()[-1] == lines(run("audit", "list"))[-1]["hash"]
    connection = sqlite3.connect(records_of(tmp_path))
    connection.execute("DROP TRIGGER audit_refuses_update")
    connection.execute("UPDATE audit SET actor = 'cli:somebody' WHERE sequence = 2")
    connection.commit()
    connection.close()
    broken = run("audit", "verify")
    assert (broken.returncode, broken.stdout) == (1, "")
    assert broken.stderr == "broken: Row 2 was changed after it was written.\n"


def test_commands_refuse_records_in_memory(run: Run, tmp_path: Path) -> None:
    for command in (["key", "create", "--role", "admin"], ["token", "list"], ["audit", "verify"]):
        done = run(*command, ENABLE_DBOS="false")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(
            "error: with ENABLE_DBOS=false credentials live in the service's memory"
        )
        assert "POST /api/v1/wireguard/keys" in done.stderr
        assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_database_of_a_newer_version_is_refused(run: Run, make: Make, tmp_path: Path) -> None:
    make("token", "create")
    connection = sqlite3.connect(records_of(tmp_path))
    connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.commit()
    connection.close()
    for command in (["token", "list"], ["key", "create", "--role", "admin"], ["audit", "verify"]):
        done = run(*command)
        assert (done.returncode, done.stdout) == (1, "")
        assert "was made by a newer version" in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_file_that_is_no_database_is_said_in_a_sentence(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "records"
    path.write_bytes(b"something else altogether\n" * 100)
    path.chmod(0o600)
    done = run("token", "list", DATABASE_URL=f"sqlite:///{path}")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert "not a database" in done.stderr
    assert done.stderr.count("\n") == 1


def test_concurrent_first_commands_each_make_their_credential(run: Run, make_in_a_process: Make) -> None:
    with ThreadPoolExecutor(4) as pool:
        secrets = list(pool.map(lambda _: make_in_a_process("token", "create"), range(4)))
    assert {token["id"] for token in lines(run("token", "list"))} == {id_of(secret) for secret in secrets}
    assert run("audit", "verify").stdout.startswith("whole: 4 entries\n")


def test_command_does_not_block_a_service(run: Run, settings: dict[str, object], tmp_path: Path) -> None:
    # Held as the service holds it: whoever took the records for themselves for a moment would fail here.
    assert run("token", "create").returncode == 0
    lock = records_of(tmp_path).with_name(records_of(tmp_path).name + ".lock")
    lock.unlink()
    assert run("token", "create").returncode == 0
    assert not lock.exists()


def test_a_key_works_beside_a_running_service_at_once_and_until_it_is_revoked(
    service: ServiceProcess, run: Run, make: Make
) -> None:
    assert service.client.get(PEERS).status_code == 200
    # Has the service look into the records just before there is a key.
    assert service.client.get(PEERS, headers=bearer(f"ocw_{'0' * 16}_{'0' * 64}")).status_code == 401
    key = make("key", "create", "--role", "admin")
    with ThreadPoolExecutor(32) as pool:
        answers = pool.map(lambda _: service.client.get(PEERS, headers=bearer(key)), range(96))
        assert {answer.status_code for answer in answers} == {200}
    token = make("token", "create")
    body = provision_body("node-1")
    assert service.client.post(PROVISION, json=body, headers=bearer(token)).status_code == 200
    assert [entry["uses"] for entry in lines(run("token", "list"))] == [1]
    assert run("key", "revoke", id_of(key)).returncode == 0
    eventually(lambda: service.client.get(PEERS, headers=bearer(key)).status_code == 401)
    assert run("audit", "verify").returncode == 0
    assert service.client.get("/readyz").status_code == 200


@pytest.mark.parametrize("command", [("key", "create", "--role", "read"), ("token", "create")], ids=" ".join)
def test_a_secret_goes_into_a_new_private_file_and_nowhere_else(
    run: Run, tmp_path: Path, command: tuple[str, ...]
) -> None:
    file = tmp_path / "secret"
    done = run(*command, "--output", str(file))
    secret = file.read_text()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{command[0]} {id_of(secret)} is in {file}\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(lines(run(command[0], "list"))) == 1


def test_existing_output_file_is_kept_and_no_credential_is_made(run: Run, tmp_path: Path) -> None:
    file, link = tmp_path / "secret", tmp_path / "link"
    file.write_text("of another kind")
    link.symlink_to(tmp_path / "elsewhere")
    for taken in (file, link, tmp_path / "nowhere" / "secret", tmp_path):
        done = run("key", "create", "--role", "read", "--output", str(taken))
        assert done.returncode == 1
        assert done.stderr.startswith("error: --output: ")
        assert "name a new file" in done.stderr
    assert file.read_text() == "of another kind"
    assert not (tmp_path / "elsewhere").exists()
    assert lines(run("key", "list")) == []


def test_a_credential_that_is_not_kept_leaves_no_file(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "secret"
    done = run("key", "create", "--role", "read", "--output", str(file), ENABLE_DBOS="false")
    assert done.returncode == 1
    assert "admin.header" in done.stderr
    assert not file.exists()


def test_many_commands_beside_a_busy_service_leave_one_whole_log(
    service: ServiceProcess, run: Run, make: Make, make_in_a_process: Make
) -> None:
    key = make("key", "create", "--role", "operate")
    answers: list[int] = []

    def provision(number: int) -> None:
        body = provision_body(f"node-{number}")
        answers.append(service.client.post(PROVISION, json=body, headers=bearer(key)).status_code)

    with ThreadPoolExecutor(8) as pool:
        made = [pool.submit(make_in_a_process, "token", "create") for _ in range(4)]
        list(pool.map(provision, range(100)))
        secrets = {id_of(future.result()) for future in made}
    assert set(answers) == {200}
    assert {token["id"] for token in lines(run("token", "list"))} == secrets
    acts = [entry["action"] for entry in lines(run("audit", "list", "--limit", "1000"))]
    assert (acts.count("provision"), acts.count("token_made"), acts.count("key_made")) == (100, 4, 1)
    assert run("audit", "verify").returncode == 0


def test_help_names_the_access_commands(tmp_path: Path) -> None:
    for group, commands in {
        "token": ("create", "list", "revoke"),
        "key": ("create", "list", "revoke"),
        "audit": ("list", "verify"),
    }.items():
        done = invoke(group, "--help", directory=tmp_path)
        assert done.returncode == 0
        assert [name for name in commands if name not in done.stdout] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["token create", "key create", "audit list"])
def test_help_of_the_access_commands_imports_no_framework(tmp_path: Path, command: str) -> None:
    program = (
        "import sys; from backend.__main__ import app\n"
        "try: app(sys.argv[1:] + ['--help'])\n"
        "except SystemExit as done: assert done.code == 0, done.code\n"
        "heavy = {'fastapi', 'uvicorn', 'sqlalchemy', 'dbos', 'cryptography', 'alembic'}\n"
        "sys.exit(', '.join(heavy & {name.partition('.')[0] for name in sys.modules}) or 0)"
    )
    done = python(program, *command.split(), directory=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
