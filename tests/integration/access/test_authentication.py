"""Which callers may call which endpoint: over real sockets, from this host and from another one."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from tests.harness.access_clients import client_at, id_of, local_secret, make_key, shown
from tests.harness.hosts import Host, LocalHost
from tests.harness.patience import eventually
from tests.harness.requests import API, AUDIT, PEERS, PROVISION, provision_body
from tests.harness.service import ServiceProcess, StartService, free_port
from tests.harness.three_places import settings_for
from tests.harness.wireguard import HubInterface

# Every endpoint for every kind of caller. `here` is this host at 127.0.0.1, `outside` another address; both
# show nothing. `local` shows what is in admin.header. A challenge is a 404 to whom it is open, because this
# hub asks for no proof; who has used a token up may ask for one to the key that it came with, and no other.
TABLE: Final = """
                   | nothing       | file  | key                                | token
                   | outside  here | local | read operate admin expired revoked | fresh used expired revoked
POST   provision   |     401   401 |   200 |  403     200   200     401     401 |   200  401     401     401
GET    peers       |     401   401 |   200 |  200     200   200     401     401 |   403  401     401     401
GET    peers/ID    |     401   401 |   200 |  200     200   200     401     401 |   403  401     401     401
DELETE peers/ID    |     401   401 |   200 |  403     200   200     401     401 |   403  401     401     401
GET    pool/stats  |     401   401 |   200 |  200     200   200     401     401 |   403  401     401     401
POST   challenge   |     401   401 |   404 |  403     404   404     401     401 |   404  401     401     401
POST   tokens      |     401   401 |   201 |  403     403   201     401     401 |   403  401     401     401
GET    tokens      |     401   401 |   200 |  403     403   200     401     401 |   403  401     401     401
DELETE tokens/ID   |     401   401 |   200 |  403     403   200     401     401 |   403  401     401     401
GET    keys        |     401   401 |   200 |  403     403   200     401     401 |   403  401     401     401
DELETE keys/ID     |     401   401 |   200 |  403     403   200     401     401 |   403  401     401     401
GET    audit       |     401   401 |   200 |  200     200   200     401     401 |   403  401     401     401
POST   keys        |     401   401 |   201 |  403     403   201     401     401 |   403  401     401     401
GET    /healthz    |     200   200 |   200 |  200     200   200     200     200 |   200  200     200     200
GET    /readyz     |     200   200 |   200 |  200     200   200     200     200 |   200  200     200     200
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """One endpoint, one kind of caller, and the status that it gets."""

    method: str
    path: str
    group: str
    caller: str
    status: int

    def __str__(self) -> str:
        return f"{self.method} {self.path}, {self.group}: {self.caller}"


def cells() -> list[Cell]:
    groups, callers, *rows = (line.split("|") for line in TABLE.strip("\n").splitlines())
    found = []
    for row in rows:
        method, path = row[0].split()
        for group, names, statuses in zip(groups[1:], callers[1:], row[1:], strict=True):
            found += [
                Cell(method, path, group.strip(), name, int(status))
                for name, status in zip(names.split(), statuses.split(), strict=True)
            ]
    return found


class Callers:
    """Every kind of caller; `admin`, a credential, makes what the others need."""

    def __init__(self, outside: httpx.Client, here: httpx.Client, admin: str) -> None:
        self.outside = outside
        self.here = here
        self.admin = admin
        self.secrets: dict[tuple[str, str], str] = {}
        self._numbers = count()

    def make(self, kind: str, **asked: Any) -> str:
        answer = self.here.post(f"{API}/{kind}s", json=asked, headers=shown(self.admin))
        assert answer.status_code == 201, answer.text
        return str(answer.json()["secret"])

    def listed(self, path: str, **parameters: str) -> Any:
        answer = self.here.get(path, params=parameters, headers=shown(self.admin))
        assert answer.status_code == 200, answer.text
        return answer.json()

    def take_up(self) -> None:
        """Make a credential of each kind."""
        self.secrets = {("key", role): self.make("key", role=role) for role in ("read", "operate", "admin")}
        self.secrets["file", "local"] = self.admin
        self.secrets["token", "fresh"] = self.make("token", max_uses=9)
        self.secrets["token", "used"] = used = self.make("token")
        self._provision(used)
        for kind, asked in (("key", {"role": "admin"}), ("token", {})):
            self.secrets[kind, "revoked"] = revoked = self.make(kind, **asked)
            path = f"{API}/{kind}s/{id_of(revoked)}"
            assert self.here.delete(path, headers=shown(self.admin)).json()["state"] == "revoked"
            self.secrets[kind, "expired"] = self.make(kind, expires_in=1, **asked)
        eventually(lambda: {self._state("key"), self._state("token")} == {"expired"})

    def ask(self, cell: Cell) -> httpx.Response:
        client = self.outside if cell.caller == "outside" else self.here
        path = cell.path if cell.path.startswith("/") else f"{API}/{cell.path}"
        if path.endswith("ID"):
            path = path.removesuffix("ID") + self._target(path.split("/")[-2].removesuffix("s"))
        secret = self.secrets.get((cell.group, cell.caller))
        return client.request(cell.method, path, json=self._body(cell), headers=shown(secret))

    def _state(self, kind: str) -> str:
        expired = id_of(self.secrets[kind, "expired"])
        states = {info["id"]: info["state"] for info in self.listed(f"{API}/{kind}s")}
        return str(states[expired])

    def _provision(self, secret: str | None) -> str:
        node_id = f"node-{next(self._numbers)}"
        answer = self.here.post(PROVISION, json=provision_body(node_id), headers=shown(secret))
        assert answer.status_code == 200, answer.text
        return node_id

    def _target(self, kind: str) -> str:
        """Return the ID of what is there to be taken away."""
        if kind == "peer":
            return self._provision(self.admin)
        return id_of(self.make(kind, **({"role": "read"} if kind == "key" else {})))

    def _body(self, cell: Cell) -> dict[str, Any] | None:
        if cell.method != "POST":
            return None
        valid = provision_body(f"node-{next(self._numbers)}")
        return {
            "provision": valid,
            "challenge": {"wireguard_public_key": valid["wireguard_public_key"]},
            "tokens": {},
            "keys": {"role": "admin"},
        }[cell.path]


@pytest.fixture
def callers(service: ServiceProcess, here: str) -> Iterator[Callers]:
    with client_at(service, here) as outside, client_at(service) as local:
        yield Callers(outside, local, local_secret(service))


def test_every_endpoint_answers_every_kind_of_caller_as_the_table_says(callers: Callers) -> None:
    table = cells()
    callers.take_up()
    found = {cell: callers.ask(cell) for cell in table}

    assert {str(cell): answer.status_code for cell, answer in found.items()} == {
        str(cell): cell.status for cell in table
    }
    assert len(table) == 15 * 12
    for answer in found.values():
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["X-Request-ID"])
        assert answer.headers.get_list("Cache-Control") == ["no-store"]
    refused = [answer for answer in found.values() if answer.status_code == 401]
    assert {answer.headers["WWW-Authenticate"] for answer in refused} == {"Bearer"}
    assert len({answer.content for answer in refused}) == 1
    assert "admin.header" in refused[0].json()["detail"]


def seen(answer: httpx.Response) -> tuple[int, bytes, list[tuple[str, str]]]:
    """Return all of an answer that its receiver can see, but for what is new in each."""
    told = [pair for pair in answer.headers.multi_items() if pair[0] not in {"date", "x-request-id"}]
    return answer.status_code, answer.content, told


def test_why_a_credential_is_refused_stands_in_the_audit_log_alone(
    service: ServiceProcess, callers: Callers
) -> None:
    callers.take_up()
    tokens = {name: secret for (kind, name), secret in callers.secrets.items() if kind == "token"}
    fresh = tokens.pop("fresh")
    from_elsewhere = callers.make("token", source_cidr="203.0.113.0/24")
    of_another_name = callers.make("token", node_id_pattern="swarm-*")
    shown = {
        "missing": None,
        "malformed": f"Bearer {fresh}0",
        "unknown": "Bearer ocw_" + "0" * 16 + "_" + "0" * 64,
        "secret": f"Bearer {fresh[:-64]}{'0' * 64}",
        "expired": f"Bearer {tokens['expired']}",
        "revoked": f"Bearer {tokens['revoked']}",
        "used_up": f"Bearer {tokens['used']}",
        "source": f"Bearer {from_elsewhere}",
        "node_id": f"Bearer {of_another_name}",
    }
    answers = {}
    for reason, authorization in shown.items():
        headers = {"X-Request-ID": reason} | ({"Authorization": authorization} if authorization else {})
        answers[reason] = callers.here.post(PROVISION, json=provision_body("node-x"), headers=headers)
    assert seen(answers["missing"])[0] == 401
    assert {reason: seen(answer) for reason, answer in answers.items()} == dict.fromkeys(
        answers, seen(answers["missing"])
    )
    logged = {
        entry["request_id"]: entry["reason"]
        for entry in callers.listed(AUDIT, action="authenticate")["entries"]
    }
    assert logged == {reason: reason for reason in shown}


UNREADABLE: Final = (
    ["Basic {0}"],
    ["{0}"],
    ["Bearer"],
    ["Bearer {0} x"],
    ["Bearer {0}", "Bearer {0}"],
    ["Bearer {0}", "Bearer x"],
    ["Bearer {0},Bearer {0}"],
    ["Bearer {0}\u00e9"],
)


def test_credential_in_another_form_is_refused(service: ServiceProcess) -> None:
    secret = make_key(service)
    with client_at(service) as client:
        for shown in UNREADABLE:
            headers = [(b"Authorization", text.format(secret).encode("latin-1")) for text in shown]
            assert client.get(PEERS, headers=headers).status_code == 401, shown
        for scheme in ("Bearer", "bearer", "BEARER "):
            assert client.get(PEERS, headers={"Authorization": f"{scheme} {secret}"}).status_code == 200
        # A query is in every log on the way.
        assert client.get(PEERS, params={"access_token": secret}).status_code == 401


def test_service_follows_the_command_line_within_a_second(
    service: ServiceProcess,
) -> None:
    secret = make_key(service)
    with client_at(service, secret=secret) as operator:
        assert operator.get(PEERS).status_code == 200
        done = service.command("key", "revoke", id_of(secret))
        assert done.returncode == 0, done.stderr
        eventually(lambda: operator.get(PEERS).status_code == 401)
        service.restart()
        assert operator.get(PEERS).status_code == 401


# Sends whole requests, each on a connection of its own; prints their statuses, 0 where nothing came.
SEND: Final = """
import json, socket, sys
address, port = sys.argv[1], int(sys.argv[2])
statuses = []
for request in json.load(sys.stdin):
    with socket.create_connection((address, port), 20) as connection:
        connection.sendall(request.encode("latin-1"))
        line = connection.makefile("rb").readline().split()
    statuses.append(int(line[1]) if line else 0)
print(json.dumps(statuses))
"""

BODY: Final = json.dumps(provision_body("liar"))
LENGTH: Final = f"Content-Type: application/json\r\nContent-Length: {len(BODY)}\r\n"
CHUNKED: Final = "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
LOCAL: Final = "Host: localhost\r\n"


def post(head: str, target: str = PROVISION) -> str:
    return f"POST {target} HTTP/1.1\r\n{head}{LENGTH}\r\n{BODY}"


def trailing(head: str, trailer: str) -> str:
    return (
        f"POST {PROVISION} HTTP/1.1\r\n{head}{CHUNKED}Trailer: Host\r\n\r\n"
        f"{len(BODY):x}\r\n{BODY}\r\n0\r\n{trailer}\r\n"
    )


HONEST: Final = [
    post("Host: 127.0.0.1\r\n"),
    post("Host: localhost:8000\r\n"),
    post("Host: LOCALHOST\r\n"),
    post("Host: [::1]:8000\r\n"),
    post("Host: localhost:8000\r\nOrigin: http://localhost:8000\r\n"),
]
LIES: Final = [
    post(LOCAL + "X-Forwarded-For: 127.0.0.1\r\n"),
    post(LOCAL + "x-forwarded-for: ::1\r\n"),
    post(LOCAL + "X-Forwarded-For:\r\n"),
    post(LOCAL + "X-Forwarded-Host: localhost\r\n"),
    post(LOCAL + "X-Forwarded-Proto: http\r\n"),
    post(LOCAL + "Forwarded: for=127.0.0.1\r\n"),
    post(LOCAL + 'Forwarded: for="[::1]";host=localhost\r\n'),
    post(LOCAL + "X-Real-IP: 127.0.0.1\r\n"),
    post(LOCAL + "Via: 1.1 localhost\r\n"),
    post(LOCAL + LOCAL),
    post(LOCAL + "Host: evil.example\r\n"),
    post("Host: evil.example\r\n" + LOCAL),
    post("Host: localhost.evil.example\r\n"),
    post("Host: 127.0.0.1.evil.example\r\n"),
    post("Host: evil.example@localhost.evil.example\r\n"),
    post("Host: localhost, evil.example\r\n"),
    post("Host: 0.0.0.0\r\n"),
    post("Host: 2130706433\r\n"),
    post("Host: 127.1\r\n"),
    post("Host: localhost.\r\n"),
    post("Host: l\u00f6calhost\r\n"),
    post("Host:\r\n"),
    post(""),
    post("Host: evil.example\r\n", f"http://localhost{PROVISION}"),
    post("Host: evil.example\r\n", f"http://127.0.0.1{PROVISION}"),
    post(LOCAL + "Origin: http://evil.example\r\n"),
    post(LOCAL + "Origin: null\r\n"),
    post(LOCAL + "Origin: http://localhost:1\r\n"),
    post(LOCAL + "Origin: http://localhost.evil.example\r\n"),
    trailing("Host: evil.example\r\n", LOCAL),
    trailing("", LOCAL),
    post(LOCAL, f"http://localhost{PROVISION}"),
    trailing(LOCAL, "X-Forwarded-For: 127.0.0.1\r\n"),
]


def statuses(host: LocalHost, address: str, port: int, requests: list[str]) -> list[int]:
    """Send requests from a host, and return how each was answered."""
    command = [sys.executable, "-I", "-c", SEND, address, str(port)]
    answered: list[int] = json.loads(host.run(command, text=json.dumps(requests), timeout=60).stdout)
    return answered


TURNED_AWAY: Final = {400, 401, 404}


def opened(requests: list[str], answered: list[int]) -> list[tuple[str, int]]:
    """Return the requests that were not turned away."""
    both = zip(requests, answered, strict=True)
    # 400: what the parser itself won't read. 404: a target that a server takes for a path.
    return [(request.partition(LENGTH)[0], status) for request, status in both if status not in TURNED_AWAY]


def test_no_header_replaces_a_credential_from_any_host(
    service: ServiceProcess, outside: Host, here: str
) -> None:
    requests = [*LIES, *HONEST]
    assert opened(requests, statuses(outside, here, service.port, requests)) == []
    # This host at its other address, and at the one that says so.
    assert opened(requests, statuses(LocalHost(), here, service.port, requests)) == []
    assert opened(requests, statuses(LocalHost(), "127.0.0.1", service.port, requests)) == []
    assert service.client.get(PEERS).json() == {}


APP: Final = """
from fastapi import FastAPI
from backend.api.v1.endpoints.wireguard_provisioning import router
app = FastAPI()
app.include_router(router, prefix="/api/v1")
"""


@pytest.mark.parametrize("options", [[], ["--forwarded-allow-ips", "*"], ["--http", "h11"]], ids=" ".join)
def test_the_router_in_another_app_under_plain_uvicorn_believes_no_header(
    hub_interface: HubInterface, outside: Host, here: str, tmp_path: Path, options: list[str]
) -> None:
    (tmp_path / "app.py").write_text(APP)
    port = free_port()
    settings = {name: str(value) for name, value in settings_for(hub_interface, tmp_path).items()}
    root = str(Path(__file__).parents[3])
    with (tmp_path / "uvicorn.log").open("wb") as log:
        process = LocalHost().popen(
            [sys.executable, "-m", "uvicorn", "app:app", "--host", "0.0.0.0", "--port", str(port), *options],  # noqa: S104 - for the other host
            env={"PATH": os.environ["PATH"], "PYTHONPATH": root, **settings},
            cwd=tmp_path,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        eventually(lambda: "Uvicorn running" in (tmp_path / "uvicorn.log").read_text())
        requests = [*LIES, *HONEST]
        assert opened(requests, statuses(outside, here, port, requests)) == []
        # To uvicorn this host is a proxy that tells the truth.
        assert opened(requests, statuses(LocalHost(), "127.0.0.1", port, requests)) == []
        header = (tmp_path / "state" / "admin.header").read_text().replace("\n", "\r\n")
        assert statuses(LocalHost(), "127.0.0.1", port, [post(LOCAL + header)]) == [200]
    finally:
        process.terminate()
        process.wait(20)


def test_a_unix_socket_asks_for_a_credential_as_tcp_does(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path), unix_socket=tmp_path / "hub.sock")
    assert service.client.get(PEERS, auth=None).status_code == 401
    assert service.client.get(PEERS, headers=shown(make_key(service))).status_code == 200
    assert service.client.get(PEERS).status_code == 200


class OfBothFamilies(ServiceProcess):
    """Listens on one IPv6 socket, to which IPv4 callers come with their addresses mapped into IPv6."""

    def _listening(self) -> list[str]:
        return ["--host", "::", "--port", str(self.port)]


def test_no_local_address_replaces_a_credential(hub_interface: HubInterface, tmp_path: Path) -> None:
    with OfBothFamilies(tmp_path, settings_for(hub_interface, tmp_path)) as service:
        for address in ("127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "127.9.9.9"):
            with client_at(service, address) as client:
                assert client.get(PEERS).status_code == 401, address
        with client_at(service, "[::1]", local_secret(service)) as client:
            client.post(PROVISION, json=provision_body("node-1")).raise_for_status()
            logged = client.get(AUDIT, params={"action": "provision"}).json()["entries"]
            assert [(entry["actor"], entry["source"]) for entry in logged] == [("local", "::1")]
