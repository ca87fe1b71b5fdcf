"""What the hub tells a node, checked before anything is made of it."""

import re
from dataclasses import dataclass
from datetime import datetime
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import Any, Final, Self

from backend.client.errors import AnswerError
from backend.models.wireguard.keys import WireGuardKey, WireGuardPrivateKey

# No space and no line's end, or the hub could write other lines into the node's file.
_ENDPOINT: Final = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}")
_MAX_KEEPALIVE: Final = 65535
# RFC 1918, RFC 6598 and RFC 4193. A hub that could name others would take a node's traffic to anywhere.
_PRIVATE: Final = tuple(
    map(ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"))
)

_Address = IPv4Address | IPv6Address
_Network = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class Configuration:
    """What the hub tells a node, each value checked. The names are the API's; seconds for the keepalive.

    Prefixes and name servers are in private networks alone, and each IPv4 prefix holds the node's network.
    """

    node_id: str
    assigned_ip: IPv4Address
    subnet_mask: IPv4Address
    hub_public_key: WireGuardKey
    hub_endpoint: str
    allowed_ips: tuple[_Network, ...]
    persistent_keepalive: int
    dns_servers: tuple[_Address, ...]
    provisioned_at: datetime

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Check what the hub sent. Fields of a newer hub are passed over. Raises AnswerError."""
        try:
            fields = json_object(value)
            address = IPv4Address(json_text(fields["assigned_ip"]))
            mask = IPv4Network(f"0.0.0.0/{json_text(fields['subnet_mask'])}").netmask
            return cls(
                node_id=json_text(fields["node_id"]),
                assigned_ip=address,
                subnet_mask=mask,
                hub_public_key=WireGuardKey.parse(json_text(fields["hub_public_key"])),
                hub_endpoint=_endpoint(json_text(fields["hub_endpoint"])),
                allowed_ips=_prefixes(json_text(fields["allowed_ips"]), address, mask),
                persistent_keepalive=_keepalive(fields["persistent_keepalive"]),
                dns_servers=tuple(_name_server(json_text(server)) for server in fields["dns_servers"]),
                provisioned_at=datetime.fromisoformat(json_text(fields["provisioned_at"])),
            )
        except (KeyError, TypeError, ValueError) as exc:
            raise AnswerError(f"the configuration isn't usable: {type(exc).__name__}: {exc}") from exc

    def wg_quick(self, private_key: WireGuardPrivateKey, *, dns: bool = False) -> str:
        """Return the node's wg-quick(8) file, private key and all: write it with mode 0600.

        `dns` makes the hub the node's name server, for which wg-quick needs resolvconf(8).
        """
        prefix = IPv4Network(f"0.0.0.0/{self.subnet_mask}").prefixlen
        servers = f"DNS = {', '.join(map(str, self.dns_servers))}\n" if dns and self.dns_servers else ""
        return (
            "[Interface]\n"
            f"PrivateKey = {private_key.reveal()}\n"
            f"Address = {self.assigned_ip}/{prefix}\n"
            f"{servers}\n"
            "[Peer]\n"
            f"PublicKey = {self.hub_public_key}\n"
            f"Endpoint = {self.hub_endpoint}\n"
            f"AllowedIPs = {', '.join(map(str, self.allowed_ips))}\n"
            f"PersistentKeepalive = {self.persistent_keepalive}\n"
        )


def json_object(value: object) -> dict[str, Any]:
    """Return a JSON object as what it is; raise TypeError for anything else."""
    if not isinstance(value, dict):
        raise TypeError("a JSON object is expected")
    return value


def json_text(value: object) -> str:
    """Return a JSON string as what it is; raise TypeError for anything else."""
    if not isinstance(value, str):
        raise TypeError("text is expected")
    return value


def _endpoint(text: str) -> str:
    if _ENDPOINT.fullmatch(text) is None:
        raise ValueError("an endpoint is host:port")
    return text


def _prefixes(text: str, address: IPv4Address, mask: IPv4Address) -> tuple[_Network, ...]:
    # wg-quick routes the network of Address, too.
    network = IPv4Network((address, str(mask)), strict=False)
    prefixes = tuple(ip_network(_without_zone(prefix.strip(" "))) for prefix in text.split(","))
    for prefix in prefixes:
        if not any(_is_within(prefix, private) for private in _PRIVATE):
            raise ValueError(f"{prefix} among the prefixes is in no private network")
        if prefix.version == network.version and not _is_within(network, prefix):
            raise ValueError(f"{prefix} among the prefixes doesn't hold the node's own network, {network}")
    if not any(_is_within(network, prefix) for prefix in prefixes):
        raise ValueError(f"none of the prefixes holds the node's own network, {network}")
    return prefixes


def _without_zone(text: str) -> str:
    # Python takes any text for the zone of an IPv6 address, more lines too.
    if "%" in text:
        raise ValueError("an address with a zone is none of another host's")
    return text


def _is_within(network: _Network, other: _Network) -> bool:
    # An address is in no network of the other version, for which `subnet_of` would raise.
    return network.network_address in other and network.broadcast_address in other


def _name_server(text: str) -> _Address:
    server = ip_address(_without_zone(text))
    if not any(server in private for private in _PRIVATE):
        raise ValueError(f"the name server {server} is in no private network")
    return server


def _keepalive(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_KEEPALIVE:
        raise ValueError("a keepalive is 0 to 65535 seconds")
    return value
