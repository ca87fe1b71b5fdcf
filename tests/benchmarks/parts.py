"""What is measured: processes, interfaces, and the least that a durable change can cost."""

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.benchmarks.load import Job, Result
from tests.harness.command_line import ROOT
from tests.harness.hosts import LocalHost
from tests.harness.requests import PEERS, PROVISION, new_key, provision_body
from tests.harness.service import ServiceProcess, free_port
from tests.harness.three_places import settings_for
from tests.harness.wireguard import HubInterface


def load(job: Job) -> Result:
    """Run a load in a process of its own."""
    with tempfile.TemporaryFile() as answers:
        subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.load"],
            input=json.dumps(asdict(job)).encode(),
            stdout=answers,
            stderr=subprocess.PIPE,
            check=True,
            cwd=ROOT,
        )
        answers.seek(0)
        return Result(**json.load(answers))


def adding(names: list[str]) -> list[dict[str, Any]]:
    """Return the requests that provision these names, each with a key of its own."""
    return [{"method": "POST", "path": PROVISION, "body": provision_body(name, new_key())} for name in names]


@contextlib.contextmanager
def noop_server() -> Iterator[int]:
    """Serve the no-op app with the service's own server; yield its port."""
    port = free_port()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "uvicorn", "tests.benchmarks.noop_app:app", "--port", str(port)),
            *("--loop", "uvloop", "--http", "httptools", "--log-level", "warning", "--no-access-log"),
        ],
        cwd=ROOT,
    )
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                load(Job(port, [{"method": "GET", "path": "/openapi.json"}], clients=1))
                break
            except subprocess.CalledProcessError:
                if time.monotonic() > deadline:
                    raise
        yield port
    finally:
        process.terminate()
        process.wait()


class Floor:
    """What one durable, live peer costs at the least: a commit, the file replaced, one peer told to `wg`.

    It has an interface and a file of its own, with as many peers as the service has.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.hub = HubInterface(LocalHost(), "wgfloor", directory, listen_port=38001)
        self.hub.start()
        self._path = directory / "floor.conf"
        self._text = self.hub.interface_section.encode()
        self._number = 0
        self._database = sqlite3.connect(directory / "floor.sqlite", isolation_level=None)
        for pragma in ("journal_mode=WAL", "synchronous=FULL"):
            self._database.execute(f"PRAGMA {pragma}")
        self._database.execute("CREATE TABLE peers (node TEXT UNIQUE, key TEXT UNIQUE, address TEXT UNIQUE)")

    def close(self) -> None:
        """Take it all away."""
        self._database.close()
        self.hub.close()

    def fill(self, count: int) -> None:
        """Have this many peers."""
        while self._number < count:
            self._text += self._block(new_key())
        self._path.write_bytes(self._text)
        self.syncconf()

    def _block(self, key: str) -> bytes:
        self._number += 1
        n = self._number
        address = f"10.{1 + (n >> 16)}.{(n >> 8) & 255}.{n & 255}"
        self._address = address
        label = f"# wireguard-provisioning: managed peer bench-{n}"
        return f"\n{label}\n[Peer]\nPublicKey = {key}\nAllowedIPs = {address}/32\n".encode()

    def commit(self) -> None:
        """Make one record durable."""
        self._database.execute("BEGIN IMMEDIATE")
        row = (f"node-{self._number}", new_key(), f"address-{self._number}-{time.time_ns()}")
        self._database.execute("INSERT OR REPLACE INTO peers VALUES (?, ?, ?)", row)
        self._database.execute("COMMIT")

    def replace_file(self) -> None:
        """Write, fsync, rename, fsync of the directory."""
        temporary = self._path.with_suffix(".tmp")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.write(fd, self._text)
        os.fsync(fd)
        os.close(fd)
        temporary.replace(self._path)
        directory = os.open(self._path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)

    def wg_set(self) -> None:
        """Tell `wg` one peer."""
        key = new_key()
        self._text += self._block(key)
        subprocess.run(
            ["/usr/bin/wg", "set", self.hub.name, "peer", key, "allowed-ips", f"{self._address}/32"],
            check=True,
            close_fds=False,
        )

    def wg_remove(self) -> None:
        """Have `wg` forget the newest peer."""
        block = self._text[self._text.rindex(b"\n#") :]
        self._text = self._text.removesuffix(block)
        key = block.split(b"PublicKey = ")[1].split(b"\n")[0].decode()
        subprocess.run(
            ["/usr/bin/wg", "set", self.hub.name, "peer", key, "remove"], check=True, close_fds=False
        )

    def one_peer(self) -> None:
        """Do the three things that every durable change needs."""
        self.commit()
        self.replace_file()
        self.wg_set()

    def syncconf(self) -> None:
        """Tell `wg` everything."""
        subprocess.run(["/usr/bin/wg", "syncconf", self.hub.name, self._path], check=True, close_fds=False)


class Bench:
    """The service beside its hub, with a chosen number of peers."""

    def __init__(  # noqa: PLR0913, PLR0917 - what the benches vary
        self,
        directory: Path,
        module: str = "backend",
        interface: str = "wgbench",
        port: int = 38000,
        tree: Path = ROOT,
        over: Mapping[str, object] | None = None,
    ) -> None:
        """`over` has settings that are put over the usual ones."""
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self._authorization: str | None = None
        self.hub = HubInterface(LocalHost(), interface, directory, listen_port=port)
        self.hub.start()
        settings = settings_for(self.hub, directory, WIREGUARD_IP_POOL="10.0.0.0/8", LOG_LEVEL="warning")
        # The service's speed is measured, not its rate limits.
        for kind in ("SOURCE", "TOKEN", "KEY"):
            settings[f"WIREGUARD_RATE_LIMIT_{kind}"] = "1000000000/minute"
        settings |= over or {}
        self.service = ServiceProcess(directory, settings, module=(module,), tree=tree)
        self.service.start()
        self.names: list[str] = []
        self._number = 0

    def close(self) -> None:
        """Take it all away."""
        self.service.close()
        self.hub.close()

    def new_names(self, count: int) -> list[str]:
        """Return new node IDs."""
        self._number += count
        return [f"bench-{self._number - count + n}" for n in range(count)]

    def fill(self, count: int) -> None:
        """Have exactly this many peers."""
        names = self.new_names(max(0, count - len(self.names)))
        self.send(adding(names))
        self.names += names
        surplus, self.names = self.names[count:], self.names[:count]
        self.send([{"method": "DELETE", "path": f"{PEERS}/{name}"} for name in surplus])

    def show(self, *command: str) -> None:
        """Make a credential by the command line, and show it with each request from now on."""
        self._authorization = f"Bearer {self.service.credential(*command)}"

    def shown(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the requests with the credential that each shows: this host's admin's, without `show`."""
        authorization = self._authorization or self.service.local_admin.authorization
        return [{**request, "authorization": authorization} for request in requests]

    def send(self, requests: list[dict[str, Any]], clients: int = 64) -> Result | None:
        """Send each of the requests once; all must succeed."""
        if not requests:
            return None
        shown = self.shown(requests)
        result = load(Job(self.service.port, shown, clients=min(clients, len(requests))))
        if set(result.statuses) != {"200"}:
            raise RuntimeError(f"unexpected answers: {result.statuses}")
        return result
