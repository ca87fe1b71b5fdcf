"""Secrets that are sent by right or by mistake appear in no answer, log, file or error."""

import base64
import contextlib
import json
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx
import psycopg
import pytest

from tests.harness.command_line import invoke
from tests.harness.patience import eventually
from tests.harness.requests import API, PEERS, PROVISION, bearer, new_key, provision_body
from tests.harness.service import ServiceProcess, StartService
from tests.harness.three_places import settings_for
from tests.harness.wireguard import HubInterface, genkey

REDIS_PASSWORD: Final = "canary-of-redis-5f1d"  # noqa: S105 - guards nothing
POSTGRES_PASSWORD: Final = "canary-of-postgres-93ab"  # noqa: S105 - as above


def forms(secret: str) -> set[bytes]:
    """Return how a secret may look: as it is, and in base64 and hex, of its text and of its bytes."""
    raws = [secret.encode()]
    for decode in (partial(base64.b64decode, validate=True), bytes.fromhex):
        with contextlib.suppress(ValueError):
            raws.append(decode(secret))
    found = {secret.encode()}
    for raw in raws:
        found |= {raw, raw.hex().encode(), raw.hex().upper().encode()}
        # What stands in the middle of a longer base64 text begins at any of three places.
        for shift in range(3):
            encode = (base64.b64encode, base64.urlsafe_b64encode)
            found |= {code(bytes(shift) + raw)[shift + 1 : -4] for code in encode}
    return found


@dataclass
class Canaries:
    """The secrets by name, and everything that was said."""

    secrets: dict[str, str] = field(default_factory=dict)
    said: list[tuple[str, bytes]] = field(default_factory=list)

    def plant(self, name: str, secret: str) -> str:
        """Remember a secret; return it. Of a credential it is its second half that is one."""
        self.secrets[name] = secret.rpartition("_")[2] if secret.startswith("ocw_") else secret
        return secret

    def hear(self, where: str, what: bytes | str) -> None:
        """Keep what was said, to be searched at the end."""
        self.said.append((where, what.encode() if isinstance(what, str) else what))

    def hear_files(self, *roots: Path) -> None:
        """Keep the names and the contents of all files."""
        for root in roots:
            for path in sorted(root.rglob("*")):
                self.hear(f"the name of {path}", str(path))
                if path.is_file():
                    self.hear(str(path), path.read_bytes())

    def leaks(self) -> list[str]:
        """Return which secret was found, where, and in which form."""
        return [
            f"{name} in {where}: {form!r} in ...{what[max(0, what.index(form) - 40) :][:160]!r}"
            for name, secret in self.secrets.items()
            for form in forms(secret)
            for where, what in self.said
            if form in what
        ]


class Ear:
    """An HTTP client, of whose every answer nothing is lost."""

    def __init__(self, service: ServiceProcess, canaries: Canaries) -> None:
        self._service = service
        self._canaries = canaries
        self.statuses: set[int] = set()

    def ask(self, method: str, path: str, *, secretly: bool = False, **options: Any) -> httpx.Response:
        """Ask, and keep the answer, unless it is one that shows a new secret."""
        answer = self._service.client.request(method, path, timeout=60.0, **options)
        self.statuses.add(answer.status_code)
        if not secretly:
            head = "\n".join(f"{name}: {value}" for name, value in answer.headers.items())
            # Not the query that was sent, which httpx would show.
            self._canaries.hear(f"the answer to {method} {path[:40]}", f"{head}\n\n{answer.text}")
        return answer


def made_by_command(canaries: Canaries, directory: Path, settings: dict[str, object], *arguments: str) -> str:
    """Make a credential with the command line."""
    done = invoke(*arguments, directory=directory, settings=settings)
    assert done.returncode == 0, done.stderr
    canaries.hear(f"stderr of {arguments}", done.stderr)
    return canaries.plant(" ".join(arguments), done.stdout.strip())


def run_command(canaries: Canaries, directory: Path, settings: dict[str, object], *arguments: str) -> int:
    """Run a command whose output must hold no secret."""
    done = invoke(*arguments, directory=directory, settings=settings)
    canaries.hear(f"output of {arguments[:2]}", done.stdout + done.stderr)
    return done.returncode


def use_everything(ear: Ear, canaries: Canaries, admin: str, token: str) -> None:
    """Do with the two credentials whatever can be done, right and wrong."""
    body = provision_body("node-1")
    operator = ear.ask("POST", f"{API}/keys", json={"role": "operate"}, headers=bearer(admin), secretly=True)
    operate = canaries.plant("a key made over HTTP", operator.json()["secret"])
    reader = ear.ask("POST", f"{API}/keys", json={"role": "read"}, headers=bearer(admin), secretly=True)
    read = canaries.plant("another", reader.json()["secret"])
    single = ear.ask("POST", f"{API}/tokens", json={}, headers=bearer(admin), secretly=True).json()["secret"]
    canaries.plant("a token made over HTTP", single)
    for secret in (single, token):
        for request in (
            body,
            body,
            provision_body("node-1"),
            provision_body("node-2"),
            {**body, "version": "x"},
        ):
            keyed = {**bearer(secret), "Idempotency-Key": "retry"}
            ear.ask("POST", PROVISION, json=request, headers=bearer(secret))
            ear.ask("POST", PROVISION, json=request, headers=keyed)
        for method, path in (("GET", PEERS), ("DELETE", f"{PEERS}/node-1"), ("GET", f"{API}/audit")):
            ear.ask(method, path, headers=bearer(secret))
    for secret in (read, operate, admin):
        for path in ("peers", "peers/node-1", "peers/nobody", "pool/stats", "audit", "tokens", "keys"):
            ear.ask("GET", f"{API}/{path}", headers=bearer(secret))
    ear.ask("DELETE", f"{PEERS}/node-1", headers=bearer(operate))
    ear.ask("DELETE", f"{API}/tokens/{single.split('_')[1]}", headers=bearer(admin))
    ear.ask("DELETE", f"{API}/keys/{read.split('_')[1]}", headers=bearer(admin))
    for secret in (single, read):
        ear.ask("GET", PEERS, headers=bearer(secret))


def misuse_everything(ear: Ear, secrets: Iterable[str], admin: str) -> None:
    """Send secrets where none belongs, each as it is and as a part of something."""
    for secret in secrets:
        wrong: list[dict[str, str]] = [
            {"Authorization": secret},
            {"Authorization": f"Basic {secret}"},
            {"Authorization": f"Basic {base64.b64encode(f'admin:{secret}'.encode()).decode()}"},
            {"Authorization": f"Token {secret}"},
            bearer(f"{secret}x"),
            bearer(f"{secret}, Bearer {secret}"),
            bearer(secret[:-1]),
            {"X-Request-ID": f"{secret} {secret}"},
            {"Cookie": f"token={secret}", "Origin": f"http://{secret[:30].lower()}.example"},
            {"Forwarded": f"for={secret}", "Host": "hub.example.com", "User-Agent": secret},
        ]
        for headers in wrong:
            ear.ask("GET", PEERS, headers=headers)
            ear.ask("POST", PROVISION, json=provision_body("node-9"), headers=headers)
        asked = {"token": secret, "authorization": f"Bearer {secret}"}
        for path in (PEERS, f"{API}/audit", "/healthz", "/readyz", "/nowhere"):
            ear.ask("GET", path, params=asked, headers=bearer(admin))
        ear.ask("GET", f"{API}/audit", params={"actor": secret, "action": secret}, headers=bearer(admin))
        identified = {**bearer(admin), "X-Request-ID": secret}
        ear.ask("GET", PEERS, headers=identified)
        ear.ask("DELETE", f"{PEERS}/nobody", headers=identified)
        if secret.startswith("ocw_"):
            # Whole, where the ID alone belongs: an easy mistake.
            for path in (f"{API}/tokens", f"{API}/keys", PEERS):
                ear.ask("DELETE", f"{path}/{secret}", headers=bearer(admin))
            ear.ask("GET", f"{PEERS}/{secret}", headers=bearer(admin))
        for content in (
            f'{{"node_id": "{secret}',
            f'{{"node_id": "node-9", "wireguard_public_key": "{secret}"}}',
            json.dumps(f"Bearer {secret}"),
            json.dumps([secret]),
            json.dumps({**provision_body("node-9"), "wireguard_public_key": f"{secret}{secret}"}),
            json.dumps({**provision_body("node-9"), "version": secret}),
            json.dumps({**provision_body("node-9"), "node_id": f"{secret}!"}),
            # Every character of a credential may stand in a name.
            json.dumps({**provision_body("node-9"), "node_id": secret}),
            json.dumps({**provision_body("node-9"), "node_id": f"node-{secret}"}),
            json.dumps({**provision_body("node-9"), "capabilities": {"gpu_count": secret}}),
            json.dumps({**provision_body("node-9"), "unknown": secret}),
            json.dumps({"wireguard_public_key": f"{secret}="}),
            json.dumps({"role": secret}),
            json.dumps({"max_uses": secret, "source_cidr": secret, "node_id_pattern": f"{secret}!"}),
            json.dumps({"node_id_pattern": f"*{secret}"}),
            secret,
        ):
            for path in (PROVISION, f"{API}/challenge", f"{API}/tokens", f"{API}/keys"):
                sent = {**bearer(admin), "Content-Type": "application/json"}
                ear.ask("POST", path, content=content, headers=sent)


def mistyped(hub: HubInterface, canaries: Canaries) -> list[str]:
    """Return the hub's file as an operator may leave it, each with a secret in a line that isn't right."""
    right = hub.config_path.read_text()
    lines = ("PresharedKey = {}x", "PresharedKye = {}", "PresharedKey {}", "{}", "PrivateKey = {}\n{}")
    wrong = []
    for line in lines:
        preshared = canaries.plant(f"the preshared key of {line}", genkey()[0])
        wrong.append(f"{right}\n[Peer]\nPublicKey = {new_key()}\n{line.replace('{}', preshared)}\n")
    return wrong


def break_the_file(ear: Ear, hub: HubInterface, canaries: Canaries, admin: str) -> None:
    """Have an operator mistype a secret in the file, and put it right again."""

    def provision() -> int:
        return ear.ask("POST", PROVISION, json=provision_body("node-5"), headers=bearer(admin)).status_code

    right = hub.config_path.read_text()
    for text in mistyped(hub, canaries):
        hub.config_path.write_text(text)
        assert provision() == 503
        assert ear.ask("GET", "/readyz").status_code == 503
    hub.config_path.write_text(right)
    eventually(lambda: provision() == 200)


def refuse_to_start(canaries: Canaries, directory: Path, settings: dict[str, object]) -> None:
    """Start a service that can't, and keep what it says of that."""
    done = invoke("serve", "--port", "0", directory=directory, settings=settings)
    assert done.returncode == 1
    canaries.hear("the log of a refused start", done.stderr)
    assert "Traceback" not in done.stderr


def dump(url: str) -> str:
    """Return every row of every table of a PostgreSQL database as text."""
    with psycopg.connect(url.replace("+psycopg", "", 1)) as connection:
        tables = connection.execute(
            "SELECT quote_ident(schemaname) || '.' || quote_ident(tablename) FROM pg_tables "
            "WHERE schemaname NOT IN ('pg_catalog', 'information_schema')"
        ).fetchall()
        return "\n".join(
            str(row)
            for (table,) in tables
            for row in connection.execute(f"SELECT t.*::text FROM {table} t").fetchall()  # noqa: S608 - our own
        )


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_no_secret_comes_out_of_anything(
    hub_interface: HubInterface,
    start_service: StartService,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    database: str,
) -> None:
    canaries = Canaries()
    settings = settings_for(
        hub_interface,
        tmp_path,
        LOG_LEVEL="debug",
        ACCESS_LOG="true",
        WIREGUARD_RATE_LIMIT_FAILED_AUTHENTICATION="100000/minute",
        # Nobody is there, so that each request has something to complain about.
        WIREGUARD_RATE_LIMIT_STORAGE=f"redis://user:{REDIS_PASSWORD}@127.0.0.1:1/0",
    )
    if database == "postgresql":
        # The cluster takes anybody's word; the password is in the URL all the same.
        url: str = request.getfixturevalue("postgres_database")
        settings["DATABASE_URL"] = url.replace("postgres@", f"postgres:{POSTGRES_PASSWORD}@", 1)
    canaries.plant("the hub's private key", hub_interface.private_key)
    canaries.plant("Redis's password", REDIS_PASSWORD)
    canaries.plant("PostgreSQL's password", POSTGRES_PASSWORD)

    service = start_service(settings)
    ear = Ear(service, canaries)
    ear.ask("POST", f"{API}/tokens", json={})  # 409: an admin's key first
    admin = made_by_command(canaries, tmp_path, settings, "key", "create", "--role", "admin")
    token = made_by_command(canaries, tmp_path, settings, "token", "create", "--max-uses", "3")
    use_everything(ear, canaries, admin, token)
    # A stranger's may have been anybody's a moment ago.
    strange = canaries.plant("a stranger's credential", f"ocw_{'ab' * 8}_{os.urandom(32).hex()}")
    misuse_everything(ear, [admin, token, strange, hub_interface.private_key], admin)
    for path in ("/openapi.json", "/docs", "/redoc", "/readyz", "/healthz", "/metrics", "/nowhere"):
        ear.ask("GET", path)

    hub_interface.down()
    ear.ask("POST", PROVISION, json=provision_body("node-6"), headers=bearer(admin))
    ear.ask("GET", "/readyz")
    hub_interface.start()
    eventually(lambda: ear.ask("GET", "/readyz").status_code == 200)
    break_the_file(ear, hub_interface, canaries, admin)
    ear.ask("POST", PROVISION, json=provision_body("node-7"), headers=bearer(admin))
    ear.ask("GET", f"{API}/audit", params={"limit": 1000}, headers=bearer(admin))

    for command in ("token", "key"):
        assert run_command(canaries, tmp_path, settings, command, "list") == 0
        assert run_command(canaries, tmp_path, settings, command, "revoke", admin) != 0
    assert run_command(canaries, tmp_path, settings, "audit", "list", "--limit", "100000") == 0
    assert run_command(canaries, tmp_path, settings, "audit", "verify") == 0
    assert run_command(canaries, tmp_path, settings, "hub", "show") == 0
    # Only the files of the test's own: the hub's config is where its key belongs.
    state = tmp_path / "state"
    if database == "postgresql":
        canaries.hear("the database", dump(str(settings["DATABASE_URL"])))
    else:
        assert {path.name for path in state.iterdir()} >= {"provisioning.sqlite", "provisioning.sqlite-wal"}
    canaries.hear_files(state, service.directory)
    service.kill()
    canaries.hear_files(state, service.directory)
    service.start()
    os.kill(service.pid, signal.SIGTERM)
    service.wait_exit()
    canaries.hear_files(state, service.directory)
    # What the hub's directory has beside the config: temporaries, locks, sockets.
    for file in tmp_path.iterdir():
        canaries.hear(f"the name of {file}", file.name)
        if file.is_file() and file != hub_interface.config_path:
            canaries.hear(str(file), file.read_bytes())

    assert ear.statuses >= {200, 401, 403, 404, 409, 422, 503}
    assert 500 not in ear.statuses
    leaks = canaries.leaks()
    assert not leaks, "\n".join(leaks[:20])


def test_no_start_that_is_refused_tells_a_secret(hub_interface: HubInterface, tmp_path: Path) -> None:
    canaries = Canaries()
    canaries.plant("the hub's private key", hub_interface.private_key)
    redis = canaries.plant("Redis's password", REDIS_PASSWORD)
    postgres = canaries.plant("PostgreSQL's password", POSTGRES_PASSWORD)
    settings = settings_for(hub_interface, tmp_path, LOG_LEVEL="debug")
    right = hub_interface.config_path.read_text()
    for text in mistyped(hub_interface, canaries):
        hub_interface.config_path.write_text(text)
        refuse_to_start(canaries, tmp_path, settings)
        for command in ("show", "up"):
            assert run_command(canaries, tmp_path, settings, "hub", command) != 0
    hub_interface.config_path.write_text(right)
    for url in (
        f"postgresql+psycopg://user:{postgres}@127.0.0.1:1/nothing",
        f"postgresql+psycopg://user:{postgres}@127.0.0.1:port/nothing",
        f"mysql://user:{postgres}@127.0.0.1:1/nothing",
    ):
        refuse_to_start(canaries, tmp_path, {**settings, "DATABASE_URL": url})
        assert run_command(canaries, tmp_path, {**settings, "DATABASE_URL": url}, "key", "list") != 0
    for wrong in (
        {"WIREGUARD_RATE_LIMIT_STORAGE": f"redis://user:{redis}@127.0.0.1:port/0"},
        {"WIREGUARD_RATE_LIMIT_STORAGE": f"http://user:{redis}@127.0.0.1:1/0"},
        # The private key, where the public one belongs.
        {"WIREGUARD_HUB_PUBLIC_KEY": hub_interface.private_key[:-2]},
        {"WIREGUARD_HUB_PUBLIC_KEY": hub_interface.private_key},
    ):
        refuse_to_start(canaries, tmp_path, {**settings, **wrong})
    leaks = canaries.leaks()
    assert not leaks, "\n".join(leaks)


def test_the_search_finds_a_secret_in_any_form() -> None:
    private = genkey()[0]
    raw = base64.b64decode(private)
    for form in (
        private.encode(),
        raw,
        raw.hex().encode(),
        base64.b64encode(b"a" + raw + b"b"),
        base64.b64encode(f"user:{private}@".encode()),
        private.encode().hex().upper().encode(),
    ):
        canaries = Canaries({"key": private}, [("somewhere", b"before " + form + b" after")])
        assert canaries.leaks()
    assert Canaries({"key": private}, [("somewhere", genkey()[0].encode())]).leaks() == []
