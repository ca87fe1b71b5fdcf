"""What implements the hub's interface, and how many peers that takes."""

from functools import cache
from pathlib import Path
from typing import Final

from backend.adapters.host.programs import kernel_has_wireguard
from backend.adapters.wireguard.link import interface_exists

# Linux, drivers/net/wireguard/messages.h: MAX_PEERS_PER_DEVICE. wireguard-go, device/constants: MaxPeers.
KERNEL_PEERS: Final = 2**20
WIREGUARD_GO_PEERS: Final = 2**16
_SOCKETS: Final = Path("/var/run/wireguard")


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
