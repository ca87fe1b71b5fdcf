"""The Address lines of the hub's file, which only wg-quick(8) reads, held against the settings."""

from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Final

from backend.errors import ConfigFileError
from backend.services.hub.config_text import ParsedConfig

_SHORTEST_PREFIX: Final = 8
_LONGEST_PREFIX: Final = 30


def require_address(path: Path, config: ParsedConfig, hub_ip: IPv4Address) -> None:
    """Raise ConfigFileError if the file has addresses and `hub_ip` lies within none of them.

    No route would lead to the peers. Without any Address there is nothing to compare: another program than
    wg-quick may give the interface its addresses.
    """
    found = config.addresses
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
