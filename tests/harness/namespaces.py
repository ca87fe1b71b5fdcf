"""Network and mount namespaces for the tests, and the guard that empties one when its owner is gone.

Also a program: `namespaces.py [--new] [--spare PID]` is the guard. It needs nothing but the standard library.
"""

import argparse
import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

_CLONE_NEWNS: Final = 0x00020000
_CLONE_NEWNET: Final = 0x40000000
_MS_NOSUID_NODEV_NOEXEC: Final = 2 | 4 | 8
_MS_REC_PRIVATE: Final = 0x4000 | (1 << 18)
_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 1

# One guard's end: long enough for a hundred processes to die on a busy machine.
_SWEEP_SECONDS: Final = 10.0


def enter_new_namespaces() -> None:
    """Move the calling process into a network of its own, wireguard-go's sockets included; raise OSError."""
    # The mounts come first: whatever fails before the last step leaves the process on the host's network.
    _unshare(_CLONE_NEWNS)
    # wireguard-go's control sockets belong to the file system, not to the network.
    sockets = Path("/var/run/wireguard").resolve()
    sockets.mkdir(parents=True, exist_ok=True)
    try:
        _mount(None, "/", None, _MS_REC_PRIVATE)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        # In a chroot "/" need not be a mount point. It is enough that the mount below can't spread.
        _mount(None, _mount_point_of(sockets), None, _MS_REC_PRIVATE)
    _mount("tmpfs", str(sockets), "tmpfs", _MS_NOSUID_NODEV_NOEXEC)
    _unshare(_CLONE_NEWNET)
    _bring_up("lo")


def _unshare(flags: int) -> None:
    # os.unshare came with Python 3.12.
    if _libc().unshare(flags) != 0:
        _raise_errno("unshare")


def _mount(source: str | None, target: str, kind: str | None, flags: int) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    if _libc().mount(*encoded, ctypes.c_ulong(flags), None) != 0:
        _raise_errno(f"mount {target}")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _raise_errno(what: str) -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), what)


def _mount_point_of(path: Path) -> str:
    return str(
        next(parent for parent in (path, *path.parents) if parent.is_mount() or parent == parent.parent)
    )


def _bring_up(interface: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh14x", interface.encode(), 0)
        (flags,) = struct.unpack("16xh14x", fcntl.ioctl(control, _SIOCGIFFLAGS, request))
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sh14x", interface.encode(), flags | _IFF_UP))


class Guard:
    """A process that kills all others of its network namespace once its owner has let go or died."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @classmethod
    def of_this_process(cls) -> "Guard":
        """Guard the namespace that the calling process is in; the caller itself is spared."""
        return cls._start("--spare", str(os.getpid()))

    @classmethod
    def of_new_namespaces(cls) -> "Guard":
        """Make new namespaces, which last as long as the guard; raise OSError where that can't be done."""
        return cls._start("--new")

    @classmethod
    def _start(cls, *options: str) -> "Guard":
        process = subprocess.Popen(
            [sys.executable, "-I", __file__, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={"PATH": os.environ.get("PATH", os.defpath)},
            # Ctrl-C is for pytest, which then lets go of its guards in its own order.
            start_new_session=True,
        )
        guard = cls(process)
        # Popen made it a pipe; the type doesn't know.
        answer = process.stdout.readline() if process.stdout else ""
        if answer != "ready\n":
            guard.close()
            raise OSError(f"no namespaces: {answer.strip() or 'the guard died'}")
        return guard

    @property
    def pid(self) -> int:
        """The process whose namespaces these are."""
        return self._process.pid

    def close(self) -> list[str]:
        """Have everything in the namespace killed; return what was still there."""
        if self._process.returncode is not None:
            return []
        try:
            output, _ = self._process.communicate(timeout=_SWEEP_SECONDS + 5)
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        return output.splitlines()


def _sweep(spared: set[int]) -> list[str]:
    """Kill all processes of this network namespace until none is left; return their names."""
    network = Path("/proc/self/ns/net").readlink()
    killed: dict[int, str] = {}
    deadline = time.monotonic() + _SWEEP_SECONDS
    while time.monotonic() < deadline:
        found = False
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal() or int(entry.name) in spared:
                continue
            # Processes end while they are being looked at; a zombie has no namespace any more.
            with contextlib.suppress(OSError):
                if (entry / "ns" / "net").readlink() == network:
                    found = True
                    killed.setdefault(int(entry.name), (entry / "comm").read_text().strip())
                    os.kill(int(entry.name), signal.SIGKILL)
        if not found:
            break
        time.sleep(0.01)
    return list(killed.values())


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--new", action="store_true")
    parser.add_argument("--spare", type=int, default=0)
    options = parser.parse_args()
    if options.new:
        try:
            enter_new_namespaces()
        except OSError as exc:
            sys.stdout.write(f"{exc}\n")
            return
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while os.read(sys.stdin.fileno(), 1):
        pass
    # The owner may be dead, and the pipe without a reader.
    with contextlib.suppress(OSError):
        os.write(1, "".join(f"{name}\n" for name in _sweep({os.getpid(), options.spare})).encode())


if __name__ == "__main__":
    _main()
