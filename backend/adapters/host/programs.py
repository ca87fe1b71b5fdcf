"""The system's own programs: found and run."""

import json
import os
import re
import select
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from backend.errors import HubUpdateError
from backend.models.trusted_paths import problem_with

_TIMEOUT_SECONDS: Final = 15.0
_LONGEST_REASON: Final = 500
# Of `wg set` there may be thousands, one key after the other.
_SHOWN_ARGUMENTS: Final = 6
# Where `ip` and `wg` are, even if the caller's PATH has no sbin.
_SYSTEM_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# From scratch: with a LOG_LEVEL wireguard-go's daemon holds on to our end of stderr, and with
# WG_PROCESS_FOREGROUND it doesn't become one. `wg` looks up an endpoint's name 15 times by itself.
_ENVIRONMENT: Final = {"PATH": _SYSTEM_PATH, "LC_ALL": "C", "WG_ENDPOINT_RESOLUTION_RETRIES": "0"}
# Debian's and Ubuntu's.
_PACKAGES: Final = {"ip": "iproute2", "wg": "wireguard-tools", "wireguard-go": "wireguard-go"}
_NOT_PERMITTED: Final = re.compile(r"not permitted|Permission denied")
# What `wg` quotes when it doesn't understand a line may be the private key.
_QUOTED: Final = re.compile(r"`[^']*'|[A-Za-z0-9+/]{42,}=?")
_TUN: Final = Path("/dev/net/tun")
_CAP_NET_ADMIN: Final = 12  # capabilities(7), linux/capability.h


class ToolRefusedError(HubUpdateError):
    """A program ended with an error. The message has what it said, without what it quoted."""

    @property
    def not_permitted(self) -> bool:
        """Whether the reason is a missing privilege."""
        return _NOT_PERMITTED.search(str(self)) is not None


def find(name: str) -> str:
    """Return a program's absolute path; raise HubUpdateError that names the package if there is none.

    A program that other users could change is passed over: it would run with this process's privileges.
    """
    if found := _which(name):
        return found
    passed_over = next(_installed(name), None)
    problem = f"isn't installed; {_remedy(name)}"
    if passed_over is not None:
        problem = f"is there only as {passed_over}, which other users could change; take that from them"
    raise HubUpdateError(f"`{name}` {problem}")


def _remedy(name: str) -> str:
    package = _PACKAGES.get(name, name)
    return (
        f"install the package {package} (on Debian and Ubuntu: `sudo apt-get install --no-install-recommends "
        f"{package}`)"
    )


def run(command: Sequence[str], stdin: bytes = b"", timeout: float = _TIMEOUT_SECONDS) -> str:
    """Run a program found by `find`; return what it printed, or raise ToolRefusedError."""
    return start(command, stdin, timeout).output()


def start(command: Sequence[str], stdin: bytes | None = b"", timeout: float = _TIMEOUT_SECONDS) -> "Running":
    """Start a program found by `find`; raise HubUpdateError where that can't be done."""
    try:
        return Running(command, stdin, timeout)
    except OSError as exc:
        raise HubUpdateError(f"`{_shown(command)}` could not be started ({exc.strerror})") from exc


def _shown(command: Sequence[str]) -> str:
    return " ".join([Path(command[0]).name, *command[1:_SHOWN_ARGUMENTS]])


class Running:
    """A program that has been started. Call `output` or `kill` once, which wait for its end.

    It takes the place of subprocess.run, which takes as long as a small program itself: posix_spawn(3) copies
    no page tables, files in memory need no thread that reads them meanwhile, and pidfd_open(2) tells the end
    when it comes, where a wait with a timeout sleeps.
    """

    def __init__(self, command: Sequence[str], stdin: bytes | None, timeout: float) -> None:
        """Start it. Without `stdin` it waits for `feed`."""
        self._command = command
        self._timeout = timeout
        self._input = -1
        with ExitStack() as stack:
            self._files = [os.memfd_create(name, os.MFD_CLOEXEC) for name in ("stdin", "stdout", "stderr")]
            for file in self._files:
                stack.callback(os.close, file)
            given = self._files[0]
            if stdin is None:
                given, self._input = os.pipe2(os.O_CLOEXEC)
                stack.callback(self._close_input)
            else:
                view = memoryview(stdin)
                while view:
                    view = view[os.write(given, view) :]
                os.lseek(given, 0, os.SEEK_SET)
            files = (given, *self._files[1:])
            # A session of its own: Ctrl-C must not reach it, and wireguard-go, a daemon, outlives this
            # process.
            self._pid = os.posix_spawn(
                command[0],
                list(command),
                _ENVIRONMENT,
                file_actions=[(os.POSIX_SPAWN_DUP2, file, number) for number, file in enumerate(files)],
                setsid=True,
            )
            if stdin is None:
                os.close(given)
            self._stack = stack.pop_all()

    def feed(self, stdin: bytes) -> None:
        """Write its input, at most what a pipe holds (64 KiB); raise HubUpdateError if it has ended."""
        try:
            os.write(self._input, stdin)
        except OSError as exc:
            raise HubUpdateError(f"`{_shown(self._command)}` has ended ({exc.strerror})") from exc
        finally:
            self._close_input()

    def kill(self) -> None:
        """Kill it without its input; in place of `output`."""
        with self._stack:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)

    def _close_input(self) -> None:
        if self._input >= 0:
            os.close(self._input)
            self._input = -1

    def output(self) -> str:
        """Wait for its end; return what it printed, or raise ToolRefusedError, HubUpdateError if it hangs."""
        with self._stack:
            status = self._wait()
            printed, complaint = (os.pread(file, os.fstat(file).st_size, 0) for file in self._files[1:])
        if status is None:
            raise HubUpdateError(f"`{_shown(self._command)}` didn't end within {self._timeout:g} seconds")
        if status == 0:
            return printed.decode("utf-8", "replace")
        said = " ".join((complaint.strip() or printed.strip()).decode("utf-8", "replace").split())
        reason = _QUOTED.sub("...", said)[:_LONGEST_REASON] or f"exit status {status}"
        remedy = "; run this as root" if _NOT_PERMITTED.search(reason) else ""
        raise ToolRefusedError(f"`{_shown(self._command)}` failed: {reason}{remedy}")

    def _wait(self) -> int | None:
        """Return its status; None where it had to be killed, because it didn't end in time."""
        ended = False
        try:
            end = os.pidfd_open(self._pid)
            self._stack.callback(os.close, end)
            poll = select.poll()
            poll.register(end, select.POLLIN)
            ended = bool(poll.poll(self._timeout * 1000))
        finally:
            if not ended:
                os.kill(self._pid, signal.SIGKILL)
            _, status = os.waitpid(self._pid, 0)
        return os.waitstatus_to_exitcode(status) if ended else None


def query(command: Sequence[str]) -> list[dict[str, Any]]:
    """Run `ip -json ...`, which prints nothing at all for an empty list."""
    found: list[dict[str, Any]] = json.loads(run(command).strip() or "[]")
    return found


def obstacles() -> list[str]:
    """Return what keeps this process from making a WireGuard interface, each with its remedy."""
    found = []
    permitted = _may_administer_the_network()
    if not permitted:
        found.append("it takes root (CAP_NET_ADMIN): run it with sudo")
    in_kernel = kernel_has_wireguard()
    needed = ["wg", "ip"] if in_kernel else ["wg", "ip", "wireguard-go"]
    found += [f"`{name}` isn't installed: {_remedy(name)}" for name in needed if _which(name) is None]
    if permitted and not in_kernel and not _tun_opens():
        found.append(
            f"the kernel has no WireGuard and {_TUN} can't be opened: `modprobe wireguard` or `modprobe tun`"
        )
    return found


def _which(name: str) -> str | None:
    return next((str(path) for path in _installed(name) if problem_with(path) is None), None)


def _installed(name: str) -> Iterator[Path]:
    # The caller's PATH comes first: some distributions have no other place. Relative directories in it, ""
    # and "." included, are left out: they would depend on the directory that we were started in. It may name
    # some that this user can't enter, for which Path.is_file raises, so access(2) is asked first.
    for directory in f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}".split(":"):
        path = Path(directory, name)
        if path.is_absolute() and os.access(path, os.X_OK) and path.is_file():
            yield path


def _may_administer_the_network() -> bool:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_NET_ADMIN & 1)
    return False


def kernel_has_wireguard() -> bool:
    """Tell whether an interface would be the kernel's own."""
    if Path("/sys/module/wireguard").exists():
        return True
    try:
        run([find("modprobe"), "--dry-run", "--quiet", "wireguard"])
    except HubUpdateError:
        return False
    return True


def _tun_opens() -> bool:
    try:
        os.close(os.open(_TUN, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True
