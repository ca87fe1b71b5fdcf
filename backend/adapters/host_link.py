"""What the kernel says of a network interface, without a program: netdevice(7)."""

import array
import errno
import fcntl
import socket
import struct
from ipaddress import IPv4Address
from typing import Final

from backend.models.operator_commands import command

_SIOCGIFCONF: Final = 0x8912
_SIOCGIFFLAGS: Final = 0x8913
_IFF_UP: Final = 1
_NAME_BYTES: Final = 16
# struct ifreq: the name, then a union whose largest member, struct ifmap, begins with two longs.
_IFREQ_BYTES: Final = _NAME_BYTES + 2 * struct.calcsize("l") + 8
# struct sockaddr_in behind the name: family, port, address.
_ADDRESS: Final = slice(_NAME_BYTES + 4, _NAME_BYTES + 8)
_MOST_ADDRESSES: Final = 4096


def problem(name: str, address: IPv4Address) -> str | None:
    """Say why peers can't reach this host at `address` through an interface, or return None.

    None as well where there is no such interface, which is not this function's to report.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        try:
            up = _is_up(control, name)
        except OSError as exc:
            if exc.errno == errno.ENODEV:
                return None
            raise
        if not up:
            return f"interface {name} is down; bring it up with `ip link set up dev {name}`"
        if address not in _addresses(control, name):
            return (
                f"interface {name} doesn't have the hub's address {address}; add it with "
                f"{command('hub up')}, or set WIREGUARD_HUB_IP to the address that it has"
            )
    return None


def _is_up(control: socket.socket, name: str) -> bool:
    request = struct.pack("16sH14x", name.encode(), 0)
    (flags,) = struct.unpack("16xH14x", fcntl.ioctl(control, _SIOCGIFFLAGS, request))
    return bool(flags & _IFF_UP)


def _addresses(control: socket.socket, name: str) -> set[IPv4Address]:
    """Return the interface's IPv4 addresses, also those with a label of their own (NAME:1)."""
    room = array.array("B", bytes(_MOST_ADDRESSES * _IFREQ_BYTES))
    # struct ifconf: how many bytes, and where.
    answer = fcntl.ioctl(control, _SIOCGIFCONF, struct.pack("iP", len(room), room.buffer_info()[0]))
    (filled, _) = struct.unpack("iP", answer)
    found = set()
    for start in range(0, filled, _IFREQ_BYTES):
        entry = room[start : start + _IFREQ_BYTES].tobytes()
        label = entry[:_NAME_BYTES].partition(b"\0")[0].decode("ascii", "replace")
        if label.partition(":")[0] == name:
            found.add(IPv4Address(entry[_ADDRESS]))
    return found
