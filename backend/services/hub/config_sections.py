"""What the keys of a section add up to, as `wg` reads them (wg(8), CONFIGURATION FILE FORMAT)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import ClassVar

from backend.models.wireguard.keys import WireGuardPrivateKey
from backend.services.hub import config_values
from backend.services.hub.config_values import HubKeyError, InvalidConfigError

# By the key in lower case: its name, the attribute that takes the value, and what reads the value.
_Keys = Mapping[bytes, tuple[str, str, Callable[[bytes], object]]]


class Section:
    """One section. Of a key that stands there twice the last value counts, but AllowedIPs add up."""

    keys: ClassVar[_Keys]

    def take(self, compact: bytes) -> None:
        """Take a key line as `wg` sees it; raise InvalidConfigError."""
        key, equals, value = compact.partition(b"=")
        if not equals or key.lower() not in self.keys:
            raise InvalidConfigError("a key that `wg` doesn't know in this section")
        name, attribute, read = self.keys[key.lower()]
        if not value and name == "PrivateKey":
            raise HubKeyError(f"{name} has no value")
        if not value:
            raise InvalidConfigError(f"{name} has no value", "Give it one, or take the line out")
        found = read(value)
        if isinstance(found, tuple):
            found = (*getattr(self, attribute), *found)
        setattr(self, attribute, found)


@dataclass(slots=True)
class InterfaceSection(Section):
    """All [Interface] sections together. `listen_port` is None for any, `fwmark` 0 for none."""

    private_key: WireGuardPrivateKey | None = None
    listen_port: int | None = None
    fwmark: int = 0

    keys: ClassVar[_Keys] = {
        b"privatekey": ("PrivateKey", "private_key", config_values.private_key),
        b"listenport": ("ListenPort", "listen_port", config_values.port_number),
        b"fwmark": ("FwMark", "fwmark", config_values.fwmark),
    }


@dataclass(slots=True)
class PeerSection(Section):
    """One [Peer] section, which starts at line `number`."""

    number: int = 0
    public_key: str | None = None
    preshared_key: str | None = None
    allowed_ips: tuple[IPv4Network | IPv6Network, ...] = ()
    endpoint: str | None = None
    persistent_keepalive: int | None = None

    keys: ClassVar[_Keys] = {
        b"publickey": ("PublicKey", "public_key", config_values.key_text),
        b"presharedkey": ("PresharedKey", "preshared_key", config_values.preshared_key),
        b"allowedips": ("AllowedIPs", "allowed_ips", config_values.allowed_ips),
        b"endpoint": ("Endpoint", "endpoint", config_values.check_endpoint),
        b"persistentkeepalive": ("PersistentKeepalive", "persistent_keepalive", config_values.keepalive),
    }
