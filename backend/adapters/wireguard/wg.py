"""The live interface, by `wg` (wg(8)); and the stand-in for where only the file is kept."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from ipaddress import IPv4Address
from typing import Final

from backend.adapters.host import programs
from backend.adapters.wireguard.host_link import HostLinks
from backend.errors import HubUpdateError
from backend.models.wireguard.health import LostEndpoint
from backend.models.wireguard.interface import InterfaceName, InterfaceState
from backend.models.wireguard.peer import Peer, cidr
from backend.services.hub.drift import Drift

# A batch may need three of them before it is given up: together less than a request waits for its answer.
_TIMEOUT_SECONDS: Final = 5.0


class WgInterface:
    """One WireGuard interface in this process's network namespace."""

    live: Final = True

    def __init__(self, name: str, address: IPv4Address) -> None:
        """Find `wg`; raise HubUpdateError where it isn't installed, ValueError for what can't be a name.

        `address` is the hub's own, which the interface should have.
        """
        self._name = InterfaceName.parse(name)
        self._address = address
        self._wg = programs.find("wg")
        self._links = HostLinks()
        # A `wg addconf` that has been started and waits for its input.
        self._waiting: Future[programs.Running | None] | None = None
        self._executor = ThreadPoolExecutor(1, "hub-wg")

    def change(self, added: Sequence[Peer], removed: Sequence[Peer]) -> Callable[[], object]:
        """Add peers by `wg addconf`, or start one `wg set` where some are removed. No other peer notices it.

        A program takes longer to start than to do this, so the next `wg addconf` is started ahead and waits
        for its input. It has changed nothing by then, and ends with this process.
        """
        waiting = None if removed else self._take_waiting()
        if waiting is None:
            running = self._start_set(added, removed)
        else:
            running = waiting
            lines = (f"[Peer]\nPublicKey={p.wireguard_public_key}\nAllowedIPs={_allowed(p)}\n" for p in added)
            try:
                running.feed("".join(lines).encode("ascii"))
            except HubUpdateError:
                running.kill()
                running = self._start_set(added, removed)
        if self._waiting is None:
            # In another thread: this one syncs a directory meanwhile.
            self._waiting = self._executor.submit(self._start_waiting)
        return running.output

    def close(self) -> None:
        """End what waits for a change."""
        if waiting := self._take_waiting():
            waiting.kill()
        self._executor.shutdown()
        self._links.close()

    def _take_waiting(self) -> programs.Running | None:
        waiting, self._waiting = self._waiting, None
        return None if waiting is None else waiting.result()

    def _start_waiting(self) -> programs.Running | None:
        try:
            command = [self._wg, "addconf", self._name, "/dev/stdin"]
            return programs.start(command, stdin=None, timeout=_TIMEOUT_SECONDS)
        except HubUpdateError:
            return None  # `wg set` does it as well

    def _start_set(self, added: Sequence[Peer], removed: Sequence[Peer]) -> programs.Running:
        arguments: list[str] = []
        for peer in removed:
            arguments += ["peer", peer.wireguard_public_key, "remove"]
        for peer in added:
            arguments += ["peer", peer.wireguard_public_key, "allowed-ips", _allowed(peer)]
        return programs.start([self._wg, "set", self._name, *arguments], timeout=_TIMEOUT_SECONDS)

    def sync(self, stripped: bytes) -> None:
        """Run `wg syncconf`: peers that haven't changed keep their sessions.

        They may lose packets all the same: it sets the port, and wireguard-go opens its socket anew then.
        """
        self._run("syncconf", self._name, "/dev/stdin", stdin=stripped)

    def clear(self, drift: Drift) -> None:
        """Run one `wg set` for what `wg syncconf` leaves as it was where the config no longer has it."""
        arguments = ["fwmark", "0"] if drift.fwmark else []
        for key in sorted(drift.preshared_keys | drift.keepalives):
            arguments += ["peer", key]
            if key in drift.preshared_keys:
                arguments += ["preshared-key", "/dev/null"]
            if key in drift.keepalives:
                arguments += ["persistent-keepalive", "0"]
        if arguments:
            self._run("set", self._name, *arguments)

    def restore(self, peers: Sequence[LostEndpoint]) -> None:
        """Run two `wg set`: a keepalive that is turned on sends a packet at once, then it is as it was."""
        given, kept = [], []
        for peer in peers:
            given += ["peer", peer.public_key, "endpoint", peer.endpoint, "persistent-keepalive", "1"]
            kept += ["peer", peer.public_key, "persistent-keepalive", str(peer.persistent_keepalive)]
        try:
            self._run("set", self._name, *given)
        finally:
            self._run("set", self._name, *kept)

    def state(self) -> InterfaceState:
        """Run `wg show NAME dump`."""
        try:
            return InterfaceState.parse(self._run("show", self._name, "dump"))
        except (ValueError, IndexError):
            # Without the cause: it would quote a line, and there are keys in it.
            raise HubUpdateError(f"`wg show {self._name} dump` printed what can't be read") from None

    def link_problem(self) -> str | None:
        """Ask the kernel (netdevice(7)) whether the link is up and has the hub's address."""
        return self._links.problem(self._name, self._address)

    def ifindex(self) -> int | None:
        """Return the interface's index (netdevice(7)): a new interface has a new one."""
        return self._links.index(self._name)

    def _run(self, *arguments: str, stdin: bytes = b"") -> str:
        return programs.run([self._wg, *arguments], stdin, timeout=_TIMEOUT_SECONDS)


def _allowed(peer: Peer) -> str:
    return ",".join(map(cidr, peer.allowed_ips))


class FileOnly:
    """No interface at all, for WIREGUARD_RELOAD=off: only the file is kept."""

    live: Final = False

    def change(
        self,
        added: Sequence[Peer],  # noqa: ARG002 - the port's
        removed: Sequence[Peer],  # noqa: ARG002 - the port's
    ) -> Callable[[], object]:
        """Do nothing."""
        return lambda: None

    def close(self) -> None:
        """Do nothing."""

    def sync(self, stripped: bytes) -> None:
        """Do nothing."""

    def clear(self, drift: Drift) -> None:
        """Do nothing."""

    def restore(self, peers: Sequence[LostEndpoint]) -> None:
        """Do nothing."""

    def state(self) -> InterfaceState:
        """Return an empty one: there is no interface to look at."""
        return InterfaceState(None, 0)

    def link_problem(self) -> None:
        """Return None: there is no interface to look at."""

    ifindex = link_problem
