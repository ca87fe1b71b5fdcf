"""What the keys of a section add up to, as `wg` reads them (wg(8), CONFIGURATION FILE FORMAT)."""

from collections.abc import Callable, Mapping
from ipaddress import IPv4Network, IPv6Network

from backend.models.wireguard.keys import WireGuardPrivateKey
from backend.services.hub.config_values import (
    HubKeyError,
    InvalidConfigError,
    allowed_ip,
    check_endpoint,
    fwmark,
    keepalive,
    key_text,
    port_number,
    preshared_key,
    private_key,
)


class Section:
    """What the keys of one section add up to."""

    def __init__(self) -> None:
        self.keys: Mapping[bytes, tuple[str, Callable[[bytes], None]]] = {}

    def take(self, compact: bytes) -> None:
        """Take a key line as `wg` sees it; raise InvalidConfigError."""
        key, equals, value = compact.partition(b"=")
        if not equals or key.lower() not in self.keys:
            raise InvalidConfigError("a key that `wg` doesn't know in this section")
        name, take = self.keys[key.lower()]
        if not value and name == "PrivateKey":
            raise HubKeyError(f"{name} has no value")
        if not value:
            raise InvalidConfigError(f"{name} has no value", "Give it one, or take the line out")
        take(value)


class InterfaceSection(Section):
    """All [Interface] sections together: `wg` takes the last of several values."""

    def __init__(self) -> None:
        super().__init__()
        self.private_key: WireGuardPrivateKey | None = None
        self.listen_port: int | None = None
        self.fwmark = 0
        self.keys = {
            b"privatekey": ("PrivateKey", self._take_private_key),
            b"listenport": ("ListenPort", self._take_listen_port),
            b"fwmark": ("FwMark", self._take_fwmark),
        }

    def _take_listen_port(self, value: bytes) -> None:
        # For `wg` 0 is any port.
        self.listen_port = port_number(value) or None

    def _take_fwmark(self, value: bytes) -> None:
        self.fwmark = fwmark(value)

    def _take_private_key(self, value: bytes) -> None:
        self.private_key = private_key(value)


class PeerSection(Section):
    """One [Peer] section: networks add up, of other keys the last value counts."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.public_key: str | None = None
        self.preshared_key: str | None = None
        self.allowed_ips: list[IPv4Network | IPv6Network] = []
        self.persistent_keepalive: int | None = None
        self.keys = {
            b"publickey": ("PublicKey", self._take_public_key),
            b"presharedkey": ("PresharedKey", self._take_preshared_key),
            b"allowedips": ("AllowedIPs", self._take_allowed_ips),
            b"endpoint": ("Endpoint", check_endpoint),
            b"persistentkeepalive": ("PersistentKeepalive", self._take_keepalive),
        }

    def _take_public_key(self, value: bytes) -> None:
        self.public_key = key_text(value, "PublicKey")

    def _take_preshared_key(self, value: bytes) -> None:
        self.preshared_key = preshared_key(value)

    def _take_allowed_ips(self, value: bytes) -> None:
        self.allowed_ips.extend(map(allowed_ip, value.split(b",")))

    def _take_keepalive(self, value: bytes) -> None:
        self.persistent_keepalive = keepalive(value)
