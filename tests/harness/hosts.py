"""Hosts of a small network: each one a network and a mount namespace, joined by veth pairs."""

import contextlib
import itertools
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import IO, Final, Self

from tests.harness.namespaces import Guard

_VETH_NUMBERS: Final = itertools.count()


class CommandFailedError(subprocess.CalledProcessError):
    """A command ended with another status than 0; the message has its output."""

    def __str__(self) -> str:
        return f"{super().__str__()}\n{self.stdout}{self.stderr}"


class LocalHost:
    """The namespaces that pytest itself is in."""

    name = "local"

    @property
    def pid(self) -> int:
        """A process in the host's namespaces."""
        return os.getpid()

    def popen(
        self,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        **streams: int | IO[bytes],
    ) -> subprocess.Popen[bytes]:
        """Start a command, its streams as Popen takes them; the process id is the command's own."""
        return subprocess.Popen(
            [str(part) for part in argv],
            env=env,
            cwd=cwd,
            # Ctrl-C is for pytest; what it started ends in the order of its fixtures.
            start_new_session=True,
            stdin=streams.get("stdin", subprocess.DEVNULL),
            stdout=streams.get("stdout"),
            stderr=streams.get("stderr"),
        )

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        check: bool = True,
        timeout: float = 20.0,
        text: str = "",
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command with `text` on its standard input; raise CommandFailedError or TimeoutExpired."""
        process = self.popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
        )
        try:
            stdout, stderr = process.communicate(text.encode(), timeout)
        except BaseException:
            # The whole session: a child of the command would hold the pipes open.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise
        result = subprocess.CompletedProcess(
            [str(part) for part in argv],
            process.returncode,
            stdout.decode(errors="replace"),
            stderr.decode(errors="replace"),
        )
        if check and result.returncode != 0:
            raise CommandFailedError(result.returncode, result.args, result.stdout, result.stderr)
        return result


class Host(LocalHost):
    """A host of its own; closing it kills whatever runs on it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._guard = Guard.of_new_namespaces()
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._guard.pid

    def popen(
        self,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        **streams: int | IO[bytes],
    ) -> subprocess.Popen[bytes]:
        """Start a command on the host; it ends with the host at the latest."""
        enter = ["nsenter", f"--target={self.pid}", "--net", "--mount", "--root", "--"]
        # Entering a mount namespace resets root and working directory, which matters in a chroot.
        place = ["env", "-C", str(cwd or Path.cwd())]
        process = super().popen([*enter, *place, *argv], env=env, cwd=cwd, **streams)
        self._started.append(process)
        return process

    def sysctl(self, name: str, value: str) -> None:
        """Set a network setting of the host, by its path below /proc/sys/net."""
        self.run(["sh", "-c", 'echo "$1" >"/proc/sys/net/$0"', name, value])

    def close(self) -> None:
        """Kill everything on the host; its interfaces vanish with it."""
        self._guard.close()
        for process in self._started:
            process.wait()


def connect(first: LocalHost, second: LocalHost, subnet: str) -> tuple[IPv4Address, IPv4Address]:
    """Lay a cable between two hosts and give each an address of the subnet, in order."""
    network = IPv4Network(subnet)
    number = next(_VETH_NUMBERS)
    ends = [(first, f"veth{number}a"), (second, f"veth{number}b")]
    peer = ["peer", "name", ends[1][1], "netns", str(second.pid)]
    first.run(["ip", "link", "add", ends[0][1], "type", "veth", *peer])
    addresses = tuple(itertools.islice(network.hosts(), 2))
    for (host, interface), address in zip(ends, addresses, strict=True):
        host.run(["ip", "address", "add", f"{address}/{network.prefixlen}", "dev", interface])
        host.run(["ip", "link", "set", interface, "up"])
    return addresses[0], addresses[1]
