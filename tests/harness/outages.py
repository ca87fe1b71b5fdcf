"""A PostgreSQL server that hangs, dies and comes back, and a network before it that swallows everything."""

import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg

from tests.harness.patience import eventually


class Server:
    """The server behind a URL of `postgres_cluster`, which has to be the test's own."""

    def __init__(self, url: str) -> None:
        self._conninfo = url.replace("+psycopg", "", 1)
        with psycopg.connect(self._conninfo) as connection:
            row = connection.execute("SHOW data_directory").fetchone()
        assert row is not None
        self._data = Path(row[0])
        command = Path(f"/proc/{self._pid}/cmdline").read_bytes()
        self._command = command.rstrip(b"\0").split(b"\0")
        self._owner = self._data.stat()
        self._restarted: subprocess.Popen[bytes] | None = None

    @property
    def _pid(self) -> int:
        return int((self._data / "postmaster.pid").read_text().splitlines()[0])

    def hang(self) -> None:
        """Stop each of its processes: its host goes on to answer for it, it doesn't."""
        # The first one first, so that it makes no new ones meanwhile.
        os.kill(self._pid, signal.SIGSTOP)
        eventually(lambda: _state(self._pid) == "T")
        children = self._children()
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        eventually(lambda: {_state(pid) for pid in children} <= {"T", "Z"})

    def go_on(self) -> None:
        """Let them go on."""
        for pid in (*self._children(), self._pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def die(self) -> None:
        """End it without a word to its clients (pg_ctl(1), the immediate mode)."""
        pid = self._pid
        os.kill(pid, signal.SIGQUIT)
        if self._restarted is not None:
            self._restarted.wait()
        eventually(lambda: _state(pid) == "Z")

    def come_back(self) -> None:
        """Start it again on the same port."""
        with (self._data.parent / "postgres.log").open("ab") as log:
            self._restarted = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._data.parent,
                user=self._owner.st_uid,
                group=self._owner.st_gid,
                start_new_session=True,
            )
        eventually(self._answers)

    def close(self) -> None:
        """End what was started here."""
        self.go_on()
        if self._restarted is not None:
            self._restarted.send_signal(signal.SIGINT)
            self._restarted.wait(20)

    def _answers(self) -> bool:
        try:
            psycopg.connect(self._conninfo, connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def _children(self) -> list[int]:
        path = Path(f"/proc/{self._pid}/task/{self._pid}/children")
        return [int(pid) for pid in path.read_text().split()]


def _state(pid: int) -> str:
    """Return the letter that stands for what a process does (proc_pid_stat(5)); Z if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


class Network:
    """A way to a port that may lose everything on it, for good: neither end hears of the other any more."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._listening.settimeout(0.02)
        self.port: int = self._listening.getsockname()[1]
        self._lost = threading.Event()
        self._closed = False
        self._ends: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def lose_everything(self) -> None:
        """Forward nothing any more, neither data nor that an end was closed; let new ones wait."""
        self._lost.set()

    def carry_new_connections(self) -> None:
        """Carry what is begun from now on. What was lost stays so, and both ends go on to wait for it."""
        self._lost = threading.Event()

    def close(self) -> None:
        """Close every end."""
        self._closed = True
        self._lost.set()
        self._listening.close()
        for end in self._ends:
            end.close()

    def _accept(self) -> None:
        while not self._closed:
            if self._lost.is_set():
                time.sleep(0.01)
                continue
            try:
                near, _ = self._listening.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            self._ends.append(near)
            lost = self._lost
            far = socket.create_connection(("127.0.0.1", self._target))
            self._ends.append(far)
            for source, to in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(source, to, lost), daemon=True).start()

    @staticmethod
    def _carry(source: socket.socket, to: socket.socket, lost: threading.Event) -> None:
        with suppress(OSError, ValueError):
            while not lost.is_set():
                if not select.select([source], [], [], 0.02)[0]:
                    continue
                data = source.recv(65536)
                if lost.is_set():
                    return
                if not data:
                    to.shutdown(socket.SHUT_WR)
                    return
                to.sendall(data)


@contextmanager
def lossy_network(url: str) -> Iterator[tuple[Network, str]]:
    """Put a network before a server; yield it and the URL by which it leads there."""
    port = int(url.rpartition(":")[2].partition("/")[0])
    network = Network(port)
    try:
        yield network, url.replace(f":{port}/", f":{network.port}/")
    finally:
        network.close()
