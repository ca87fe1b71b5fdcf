"""The service as a real process."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

import httpx

from tests.harness.command_line import ROOT, invoke
from tests.harness.hosts import LocalHost
from tests.harness.requests import NO_TLS

_START_SECONDS: Final = 40.0
_STOP_SECONDS: Final = 20.0
_POLL_SECONDS: Final = 0.02
_PORT_ATTEMPTS: Final = 3
_TAIL_LINES: Final = 40

# Without root all workers of pytest-xdist are on one network: each takes its ports from its own share.
_WORKER: Final = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_WORKERS: Final = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))


class LocalAdmin(httpx.Auth):
    """Shows what the service has left in `admin.header`, where a request shows nothing else."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._read: tuple[int, str] | None = None

    @property
    def authorization(self) -> str:
        """The header's value: of the service that runs, if it is up."""
        try:
            identity = self._file.stat().st_ino
        except FileNotFoundError:
            # A test has moved the directory away under the service.
            if self._read is None:
                raise
            return self._read[1]
        if self._read is None or self._read[0] != identity:
            self._read = identity, self._file.read_text().strip().removeprefix("Authorization: ")
        return self._read[1]

    def forget(self) -> None:
        """Show nothing until the next service has left its own: an earlier one's counts as a failed try."""
        self._read = None

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        """Add the header, where the file is there."""
        if "authorization" not in request.headers:
            with suppress(OSError):
                request.headers["Authorization"] = self.authorization
        yield request


class ServiceFailedError(Exception):
    """The service ended, or didn't get ready or stop in time; the message has the end of its log."""


def free_port() -> int:
    """Find a TCP port on 127.0.0.1 that the kernel gives to no outgoing connection meanwhile."""
    while True:
        # Below the range that outgoing connections take theirs from, ip_local_port_range.
        port = random.randrange(20000 + _WORKER, 32000, _WORKERS)  # noqa: S311 - not a secret
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


# Test files whose first service coverage has measured, or does.
_measured: Final[set[str]] = set()


def _is_first_of_its_file() -> bool:
    """Say whether coverage should measure this service: it makes a start take half as much time again."""
    file = os.environ.get("PYTEST_CURRENT_TEST", "").partition("::")[0]
    if file in _measured:
        return False
    _measured.add(file)
    return True


class ServiceProcess:
    """`python -m backend serve`, its environment made from `settings` and little else.

    `directory` is its working directory and takes its log. `ready` is the path whose 200 `start` waits for;
    with None it doesn't wait. `module` takes the place of `backend`, and comes from the sources in `tree`;
    `path_prefix` comes first in PATH,
    `unix_socket` takes the place of address and port, `options` are further ones of `serve`.
    """

    def __init__(  # noqa: PLR0913 - each is a thing that one test or another varies
        self,
        directory: Path,
        settings: Mapping[str, object],
        *,
        host: LocalHost | None = None,
        address: str = "127.0.0.1",
        ready: str | None = "/readyz",
        module: tuple[str, ...] = ("backend",),
        tree: Path = ROOT,
        path_prefix: Path | None = None,
        unix_socket: Path | None = None,
        options: Sequence[str] = (),
    ) -> None:
        self._host = host or LocalHost()
        self.directory = directory
        self.settings = {name: str(value) for name, value in settings.items()}
        self._address = address
        self.port = free_port()
        self.ready = ready
        self._module = module
        self._tree = tree
        self._path_prefix = path_prefix
        self._unix_socket = unix_socket
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._log_path = directory / "service.log"
        self._measured = _is_first_of_its_file()
        state = directory / self.settings.get("STATE_DIRECTORY", "var")
        self.local_admin = LocalAdmin(state / "admin.header")
        # As this host's admin, unless a request shows a credential or says `auth=None`.
        # trust_env: a proxy of the machine has no business between a test and its service.
        self.client = self._new_client()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Where it listens, without a slash at the end."""
        return f"http://{self._address}:{self.port}"

    @property
    def log(self) -> str:
        """Everything that it has written, restarts included."""
        return self._log_path.read_text(errors="replace") if self._log_path.exists() else ""

    @property
    def pid(self) -> int:
        """The running process."""
        if self._process is None:
            raise ServiceFailedError("the service isn't running")
        return self._process.pid

    @property
    def open_descriptors(self) -> int:
        """How many file descriptors the running process has open."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def start(self) -> None:
        """Start it and wait until it is ready; raise ServiceFailedError."""
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            written = len(self.log)
            self.local_admin.forget()
            self._spawn()
            try:
                self._wait_ready()
            except ServiceFailedError:
                taken = "address already in use" in self.log[written:].lower()
                if not taken or attempt == _PORT_ATTEMPTS:
                    raise
                self.port = free_port()
                self.client.close()
                self.client = self._new_client()
            except BaseException:
                self._end(signal.SIGKILL)
                raise
            else:
                return

    def kill(self) -> None:
        """End it with SIGKILL, as a crash or the kernel would."""
        self._end(signal.SIGKILL)

    def terminate(self) -> int:
        """End it with SIGTERM and return its status; raise ServiceFailedError if it doesn't end in time."""
        return self._end(signal.SIGTERM)

    def restart(self) -> None:
        """Stop it if it runs, and start it again on the same port with the same settings."""
        if self._process is not None:
            self.terminate()
        self.start()

    def wait_exit(self, timeout: float = _STOP_SECONDS) -> int:
        """Wait for an end that the test expects, and return its status; raise ServiceFailedError."""
        process, self._process = self._process, None
        if process is None:
            raise ServiceFailedError("the service isn't running")
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise ServiceFailedError(self._with_log(f"still running after {timeout:g} s")) from None

    def credential(self, *command: str) -> str:
        """Make a credential by the command line, beside the service, and return its secret."""
        made = self.command(*command)
        if made.returncode != 0:
            raise ServiceFailedError(made.stderr)
        return made.stdout.strip()

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command beside the service, with its settings."""
        return invoke(*arguments, directory=self.directory, settings=self.settings)

    def become_admin(self) -> None:
        """Make an admin's key, and show it with each request of `client` from now on."""
        self.client.headers["Authorization"] = f"Bearer {self.credential('key', 'create', '--role', 'admin')}"

    def close(self) -> None:
        """Stop it; raise ServiceFailedError if it had ended without being asked to."""
        self.client.close()
        if self._process is None:
            return
        status = self._process.poll()
        self._end(signal.SIGTERM)
        if status is not None:
            raise ServiceFailedError(self._with_log(f"the service ended by itself with status {status}"))

    def _new_client(self) -> httpx.Client:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        if self._unix_socket is not None:
            transport = httpx.HTTPTransport(uds=str(self._unix_socket), limits=limits, verify=NO_TLS)
            return httpx.Client(
                base_url="http://localhost",
                timeout=30.0,
                transport=transport,
                auth=self.local_admin,
                verify=NO_TLS,
            )
        return httpx.Client(
            base_url=self.url,
            timeout=30.0,
            trust_env=False,
            limits=limits,
            auth=self.local_admin,
            verify=NO_TLS,
        )

    def _environment(self) -> dict[str, str]:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name in {"PATH", "TMPDIR"} or (self._measured and name.startswith("COVERAGE_"))
        }
        if self._path_prefix is not None:
            inherited["PATH"] = f"{self._path_prefix}{os.pathsep}{inherited['PATH']}"
        return inherited | {"LANG": "C.UTF-8", "PYTHONPATH": str(self._tree)} | self.settings

    def _listening(self) -> list[str]:
        if self._unix_socket is not None:
            return ["--unix-socket", str(self._unix_socket)]
        return ["--host", self._address, "--port", str(self.port)]

    def _spawn(self) -> None:
        if self._process is not None:
            raise ServiceFailedError("the service is already running")
        with self._log_path.open("ab") as log:
            self._process = self._host.popen(
                [sys.executable, "-m", *self._module, "serve", *self._listening(), *self._options],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                # So that no .env of the checkout is read, and ./var is the test's own.
                cwd=self.directory,
            )

    def _wait_ready(self) -> None:
        process = self._process
        if self.ready is None or process is None:
            return
        deadline = time.monotonic() + _START_SECONDS
        answer = "no answer yet"
        while time.monotonic() < deadline:
            if process.poll() is not None:
                self._process = None
                raise ServiceFailedError(
                    self._with_log(f"the service ended with status {process.returncode}")
                )
            try:
                self._probe()
                response = self.client.get(self.ready, timeout=5.0)
            except httpx.TransportError as exc:
                answer = repr(exc)
            else:
                if response.status_code == httpx.codes.OK:
                    return
                answer = f"{response.status_code} {response.text}"
            time.sleep(_POLL_SECONDS)
        self._end(signal.SIGKILL)
        problem = f"not ready after {_START_SECONDS:g} s, {self.ready}: {answer}"
        raise ServiceFailedError(self._with_log(problem))

    def _probe(self) -> None:
        """Raise ConnectError unless the service listens: that costs less than a request which says so."""
        unix = self._unix_socket is not None
        with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as probe:
            if probe.connect_ex(str(self._unix_socket) if unix else (self._address, self.port)) != 0:
                raise httpx.ConnectError("nothing listens")

    def _end(self, number: signal.Signals) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        process.send_signal(number)
        try:
            return process.wait(_STOP_SECONDS)
        except BaseException as exc:
            process.kill()
            process.wait()
            if isinstance(exc, subprocess.TimeoutExpired):
                problem = f"still running {_STOP_SECONDS:g} s after {number.name}"
                raise ServiceFailedError(self._with_log(problem)) from None
            raise

    def _with_log(self, problem: str) -> str:
        tail = "\n".join(self.log.splitlines()[-_TAIL_LINES:])
        return f"{problem}\n--- {self._log_path}\n{tail}"


# What the fixture `start_service` gives a test: it takes settings and ServiceProcess's other arguments.
StartService = Callable[..., ServiceProcess]
