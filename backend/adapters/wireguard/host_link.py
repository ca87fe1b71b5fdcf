"""What this host says of a network interface, without starting a program: netdevice(7)."""

import array
import errno
import fcntl
import socket
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from backend.adapters.host.programs import kernel_has_wireguard
from backend.errors import HubUpdateError
from backend.models.operator_commands import command

_SIOCGIFCONF: Final = 0x8912
_SIOCGIFFLAGS: Final = 0x8913
_SIOCGIFINDEX: Final = 0x8933
_IFF_UP: Final = 1
_NAME_BYTES: Final = 16
# struct ifreq: the name, then a union whose largest member, struct ifmap, begins with two longs.
_IFREQ_BYTES: Final = _NAME_BYTES + 2 * struct.calcsize("l") + 8
# struct sockaddr_in behind the name: family, port, address.
_ADDRESS: Final = slice(_NAME_BYTES + 4, _NAME_BYTES + 8)
_MOST_ADDRESSES: Final = 4096
# Linux, drivers/net/wireguard/messages.h: MAX_PEERS_PER_DEVICE. wireguard-go, device/constants: MaxPeers.
KERNEL_PEERS: Final = 2**20
WIREGUARD_GO_PEERS: Final = 2**16
_SOCKETS: Final = Path("/var/run/wireguard")


class HostLinks:
    """Asks by a socket that stays open, so that it can be asked when the process has no descriptor left.

    socket.if_nametoindex opens one each time, and where it can't it says that there is no such interface. To
    be used by one thread at a time. The socket is opened by the first question, also after `close`.
    """

    def __init__(self) -> None:
        """Open nothing yet."""
        self._control: socket.socket | None = None

    def close(self) -> None:
        """Close the socket."""
        if self._control is not None:
            self._control.close()
            self._control = None

    def index(self, name: str) -> int | None:
        """Return an interface's index, None where there is no such interface; raise HubUpdateError."""
        with _asking_about(name):
            answer = self._ioctl(_SIOCGIFINDEX, struct.pack("16si20x", name.encode(), 0))
            index: int = struct.unpack_from("16xi", answer)[0]
            return index
        return None

    def problem(self, name: str, address: IPv4Address) -> str | None:
        """Say why peers can't reach this host at `address` through an interface, or return None.

        None as well where there is no such interface, which is not this function's to report. Raises
        HubUpdateError where the kernel can't be asked.
        """
        with _asking_about(name):
            if not self._is_up(name):
                return f"interface {name} is down; bring it up with `ip link set up dev {name}`"
            if address not in self._addresses(name):
                return (
                    f"interface {name} doesn't have the hub's address {address}; add it with "
                    f"{command('hub up')}, or set WIREGUARD_HUB_IP to the address that it has"
                )
        return None

    def _ioctl(self, request: int, argument: bytes) -> bytes:
        if self._control is None:
            self._control = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        return fcntl.ioctl(self._control, request, argument)

    def _is_up(self, name: str) -> bool:
        request = struct.pack("16sH14x", name.encode(), 0)
        (flags,) = struct.unpack("16xH14x", self._ioctl(_SIOCGIFFLAGS, request))
        return bool(flags & _IFF_UP)

    def _addresses(self, name: str) -> set[IPv4Address]:
        """Return the interface's IPv4 addresses, also those with a label of their own (NAME:1)."""
        room = array.array("B", bytes(_MOST_ADDRESSES * _IFREQ_BYTES))
        # struct ifconf: how many bytes, and where.
        answer = self._ioctl(_SIOCGIFCONF, struct.pack("iP", len(room), room.buffer_info()[0]))
        (filled, _) = struct.unpack("iP", answer)
        found = set()
        for start in range(0, filled, _IFREQ_BYTES):
            entry = room[start : start + _IFREQ_BYTES].tobytes()
            label = entry[:_NAME_BYTES].partition(b"\0")[0].decode("ascii", "replace")
            if label.partition(":")[0] == name:
                found.add(IPv4Address(entry[_ADDRESS]))
        return found


@contextmanager
def _asking_about(name: str) -> Iterator[None]:
    """End the `with` block where there is no such interface; raise HubUpdateError for any other OSError."""
    try:
        yield
    except OSError as exc:
        if exc.errno != errno.ENODEV:
            raise HubUpdateError(f"interface {name} can't be looked at ({exc.strerror})") from exc


def interface_exists(name: str) -> bool:
    """Tell whether this network namespace has an interface of that name, of whatever kind."""
    with closing(HostLinks()) as links:
        return links.index(name) is not None


def most_peers(name: str) -> int:
    """Return how many peers the interface of that name takes, or would take if it were made now.

    wg(8): an implementation outside of the kernel is known by its socket.
    """
    if (_SOCKETS / f"{name}.sock").exists():
        return WIREGUARD_GO_PEERS
    if interface_exists(name) or _kernel():
        return KERNEL_PEERS
    return WIREGUARD_GO_PEERS


@cache
def _kernel() -> bool:
    return kernel_has_wireguard()
