"""Where a request comes from: the address that limits, connection caps and the audit log go by."""

import socket
from typing import Final

_MAPPED_IPV4: Final = bytes(10) + b"\xff\xff"


def network_of(address: str) -> str:
    """Return what an address counts as: IPv6 by its /64, the least that anybody is given.

    An IPv4 address that comes mapped into IPv6 counts as itself, and what is no address as it is.
    """
    if ":" not in address:
        return address
    try:
        packed = socket.inet_pton(socket.AF_INET6, address.partition("%")[0])
    except OSError:
        return address
    if packed.startswith(_MAPPED_IPV4):
        return socket.inet_ntoa(packed[len(_MAPPED_IPV4) :])
    return f"{socket.inet_ntop(socket.AF_INET6, packed[:8] + bytes(8))}/64"
