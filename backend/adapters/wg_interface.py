"""The live interface, by `wg` (wg(8)); and the stand-in for where only the file is kept."""

import socket
from collections.abc import Callable, Collection, Mapping
from ipaddress import IPv4Address
from typing import Final

from backend.adapters import host_tools
from backend.models.wireguard.interface import InterfaceName
from backend.models.wireguard.keys import WireGuardKey

# A batch may need three of them before it is given up: together less than a request waits for its answer.
_TIMEOUT_SECONDS: Final = 5.0


class WgInterface:
    """One WireGuard interface in this process's network namespace."""

    live: Final = True

    def __init__(self, name: str) -> None:
        """Find `wg`; raise HubUpdateError where it isn't installed, ValueError for what can't be a name."""
        self._name = InterfaceName.parse(name)
        self._wg = host_tools.find("wg")

    def change(
        self, added: Mapping[WireGuardKey, IPv4Address], removed: Collection[WireGuardKey]
    ) -> Callable[[], None]:
        """Start one `wg set`: it costs what the change costs, and disturbs nobody else."""
        arguments: list[str] = []
        for key in removed:
            arguments += ["peer", key, "remove"]
        for key, address in added.items():
            arguments += ["peer", key, "allowed-ips", f"{address}/32"]
        running = host_tools.start([self._wg, "set", self._name, *arguments], timeout=_TIMEOUT_SECONDS)
        return lambda: _end(running)

    def sync(self, stripped: bytes) -> None:
        """Run `wg syncconf`: peers that haven't changed keep their sessions.

        They may lose packets all the same: it sets the port, and wireguard-go opens its socket anew then.
        """
        self._run("syncconf", self._name, "/dev/stdin", stdin=stripped)

    def peers(self) -> dict[str, frozenset[str]]:
        """Run `wg show NAME allowed-ips`: a line a peer, the key, a tab, CIDRs or `(none)`."""
        peers = {}
        for line in self._run("show", self._name, "allowed-ips").splitlines():
            key, _, allowed = line.partition("\t")
            peers[key] = frozenset(() if allowed == "(none)" else allowed.split(" "))
        return peers

    def incarnation(self) -> int | None:
        """Return the interface's index (netdevice(7)): a new interface has a new one."""
        try:
            return socket.if_nametoindex(self._name)
        except OSError:
            return None

    def _run(self, *arguments: str, stdin: bytes = b"") -> str:
        return host_tools.run([self._wg, *arguments], stdin, timeout=_TIMEOUT_SECONDS)


def _end(running: host_tools.Running) -> None:
    running.output()


class FileOnly:
    """No interface at all, for WIREGUARD_RELOAD=off."""

    live: Final = False

    def change(
        self,
        added: Mapping[WireGuardKey, IPv4Address],  # noqa: ARG002 - the port's
        removed: Collection[WireGuardKey],  # noqa: ARG002 - the port's
    ) -> Callable[[], None]:
        """Leave it to whoever reads the file."""
        return lambda: None

    def sync(self, stripped: bytes) -> None:
        """Leave it to whoever reads the file."""

    def peers(self) -> dict[str, frozenset[str]]:
        """Return nothing: there is no interface to look at."""
        return {}

    def incarnation(self) -> int | None:
        """Return nothing: there is no interface to look at."""
        return None
