"""A temporary Redis that can be stopped and come back."""

import contextlib
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Final, Self

from tests.harness.requirements import find_tool, require
from tests.harness.service import free_port

PASSWORD: Final = "canary-redis-password"  # noqa: S105 - guards nothing
_START_SECONDS: Final = 20.0
_STOP_SECONDS: Final = 20.0


class RedisServer:
    """Redis on 127.0.0.1 with a password, nothing on the disk. Skips the test where it isn't installed."""

    def __init__(self, directory: Path) -> None:
        require("redis-check-rdb")
        self._directory = directory
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where it is, with the password."""
        return f"redis://:{PASSWORD}@127.0.0.1:{self._port}/0"

    def start(self) -> None:
        """Start it, empty, and wait until it answers."""
        # One program under several names: it goes by the name that it is called by.
        command: list[str | Path] = ["redis-server"]
        command += ["--bind", "127.0.0.1", "--port", str(self._port), "--requirepass", PASSWORD]
        command += ["--save", "", "--appendonly", "no", "--dir", self._directory]
        log = self._directory / "redis.log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                executable=find_tool("redis-check-rdb"),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"redis-server: {log.read_text()}")
            time.sleep(0.02)

    def stop(self) -> None:
        """End it at once; what it has counted is gone."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(_STOP_SECONDS)

    def pause(self) -> None:
        """Let it accept connections, and answer nothing."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 1) as probe:
            probe.sendall(b"PING\r\n")
            return probe.recv(100).startswith(b"-NOAUTH")
        return False
