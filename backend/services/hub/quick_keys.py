"""What wg-quick(8) alone reads in the hub's file, and `wg` never sees: its Address lines."""

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Interface, IPv6Interface, ip_interface
from pathlib import Path
from typing import Final

from backend.errors import ConfigFileError

_WHITESPACE: Final = b" \t\r\v\f"
_SHORTEST_PREFIX: Final = 8
_LONGEST_PREFIX: Final = 30


def addresses(text: bytes) -> list[IPv4Interface | IPv6Interface]:
    """Return every Address, as wg-quick would find them: in any [Interface] section, several in a line.

    One that can't be read is left out: wg-quick would stop at it, and this is no reason for us to.
    """
    found = []
    for word in _words(text):
        try:
            found.append(ip_interface(word.decode("ascii")))
        except ValueError:
            continue
    return found


def require_address(path: Path, text: bytes, hub_ip: IPv4Address) -> None:
    """Raise ConfigFileError where the file has addresses and `hub_ip` lies within none of them.

    No route would lead to what is handed out. Without any Address there is nothing to compare: another
    program than wg-quick may give the interface its addresses.
    """
    found = addresses(text)
    if not found or any(hub_ip in address.network for address in found):
        return
    remedy = "Change Address in the file to one that does"
    fitting = (
        address
        for address in found
        if isinstance(address, IPv4Interface)
        and _SHORTEST_PREFIX <= address.network.prefixlen <= _LONGEST_PREFIX
    )
    if other := next(fitting, None):
        remedy = f"Set WIREGUARD_IP_POOL={other.network} and WIREGUARD_HUB_IP={other.ip}, or c{remedy[1:]}"
    raise ConfigFileError(
        str(path),
        f"Address = {', '.join(map(str, found))} doesn't hold WIREGUARD_HUB_IP={hub_ip}, so no route would "
        "lead to the peers",
        remedy,
    )


def _words(text: bytes) -> Iterator[bytes]:
    in_interface = False
    for line in text.split(b"\n"):
        key, _, value = line.partition(b"#")[0].partition(b"=")
        key = key.strip(_WHITESPACE).lower()
        if key.startswith(b"["):
            in_interface = key == b"[interface]"
        elif in_interface and key == b"address":
            yield from value.replace(b",", b" ").split()
