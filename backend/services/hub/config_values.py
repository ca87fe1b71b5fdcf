"""What `wg` takes for the value of a key; these raise InvalidConfigError for what it doesn't take."""

import re
from contextlib import suppress
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_interface,
)
from typing import Final

from backend.models.wireguard.keys import KEY_PATTERN, WireGuardPrivateKey

_KEY_BYTES: Final = re.compile(KEY_PATTERN.encode())
_NO_KEY: Final = b"A" * 43 + b"="
UINT16_MAX: Final = 2**16 - 1
_UINT32_MAX: Final = 2**32 - 1
_DECIMAL: Final = re.compile(rb"0*([0-9]{1,10})")
_HEXADECIMAL: Final = re.compile(rb"0x0*[0-9A-Fa-f]{1,8}")
_ALLOWED_IP: Final = re.compile(rb"([0-9A-Fa-f:.]+)(?:/0*([0-9]{1,3}))?")
_ENDPOINT: Final = re.compile(rb"(?:\[([^\[\]]+)\]|([^\[\]]+)):([0-9]+)")
_SCOPE: Final = re.compile(rb"[A-Za-z0-9_.-]+")
_HOST_NAME: Final = re.compile(
    rb"[A-Za-z0-9_]+(?:-+[A-Za-z0-9_]+)*(?:\.[A-Za-z0-9_]+(?:-+[A-Za-z0-9_]+)*)*\.?"
)
_HOST_NAME_MAX: Final = 253
_LINK_LOCAL: Final = IPv6Network("fe80::/10")

_CORRECT_IT: Final = "Correct the line, see wg(8) and wg-quick(8)"
_KEY_REMEDY: Final = "Use what `wg pubkey` or `wg genpsk` prints, unchanged"


class InvalidConfigError(ValueError):
    """`wg` or wg-quick would refuse the text, or we must. Never repeats a value: it may be a key."""

    def __init__(self, problem: str, remedy: str = _CORRECT_IT) -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}. {self.remedy}"


class HubKeyError(InvalidConfigError):
    """The hub's own key isn't there. Never a reason to make a new one: the nodes know the old one.

    It is to be put back, and how depends on the interface: that is for the caller to say.
    """


def private_key(value: bytes) -> WireGuardPrivateKey:
    """Read the hub's own key; raise HubKeyError."""
    if _KEY_BYTES.fullmatch(value) is None:
        raise HubKeyError("PrivateKey is not the canonical base64 of 32 bytes")
    if value == _NO_KEY:
        # It would take the key away from the interface.
        raise HubKeyError("PrivateKey is all zero, which is no key")
    return WireGuardPrivateKey.parse(value.decode("ascii"))


def number(value: bytes, limit: int, name: str) -> int:
    """Read a decimal number from 0 to `limit`."""
    match = _DECIMAL.fullmatch(value)
    found = -1 if match is None else int(match[1])
    if not 0 <= found <= limit:
        raise InvalidConfigError(f"{name} is not a number from 0 to {limit}")
    return found


def key_text(value: bytes, name: str = "PublicKey") -> str:
    """Read a key of a peer's as `wg` spells it."""
    if _KEY_BYTES.fullmatch(value) is None:
        raise InvalidConfigError(f"{name} is not the canonical base64 of 32 bytes", _KEY_REMEDY)
    return value.decode("ascii")


def allowed_ip(value: bytes) -> IPv4Network | IPv6Network:
    """Read one of AllowedIPs as inet_pton(3) would; host bits are dropped, as `wg` does.

    The + and - in front of it that newer versions of `wg` take are refused: they depend on what the
    interface had before, which a file can't know, and older versions refuse the whole file.
    """
    match = _ALLOWED_IP.fullmatch(value)
    if match is None:
        raise InvalidConfigError("AllowedIPs is not a list of addresses in CIDR notation")
    text = match[1].decode("ascii")
    try:
        if ":" in text:
            return IPv6Network((IPv6Address(text), int(match[2] or 128)), strict=False)
        return IPv4Network((IPv4Address(text), int(match[2] or 32)), strict=False)
    except ValueError:
        raise InvalidConfigError("AllowedIPs is not a list of addresses in CIDR notation") from None


def allowed_ips(value: bytes) -> tuple[IPv4Network | IPv6Network, ...]:
    """Read one line of AllowedIPs."""
    return tuple(map(allowed_ip, value.split(b",")))


def interface_addresses(value: bytes) -> list[IPv4Interface | IPv6Interface]:
    """Read a line of Address; one that can't be read is left out, since only wg-quick would refuse it."""
    found = []
    for word in value.replace(b",", b" ").split():
        with suppress(ValueError):
            found.append(ip_interface(word.decode("ascii")))
    return found


def _is_host(value: bytes) -> bool:
    """Whether this may be a host: an address, or a name, of which only DNS knows whether it is one."""
    if b":" in value:
        address, percent, scope = value.partition(b"%")
        try:
            parsed = IPv6Address(address.decode("ascii"))
        except ValueError:
            return False
        return not percent or (parsed in _LINK_LOCAL and _SCOPE.fullmatch(scope) is not None)
    if not value.strip(b"0123456789."):
        try:
            IPv4Address(value.decode("ascii"))
        except ValueError:
            return False
        return True
    return len(value) <= _HOST_NAME_MAX and _HOST_NAME.fullmatch(value) is not None


def check_endpoint(value: bytes) -> None:
    """Check host:port, without a look at DNS."""
    match = _ENDPOINT.fullmatch(value)
    if match is None or not _is_host(match[1] or match[2]):
        raise InvalidConfigError("Endpoint is not host:port, or [IPv6 address]:port")
    if number(match[3], UINT16_MAX, "Endpoint's port") == 0:
        raise InvalidConfigError("Endpoint's port is 0")


def keepalive(value: bytes) -> int:
    """Read seconds; off is 0."""
    return 0 if value.lower() == b"off" else number(value, UINT16_MAX, "PersistentKeepalive")


def port_number(value: bytes) -> int | None:
    """Read ListenPort, None for any."""
    # getaddrinfo(3) reads it for `wg`, so service names would do as well; they depend on the machine.
    return number(value, UINT16_MAX, "ListenPort") or None


def preshared_key(value: bytes) -> str | None:
    """Read a preshared key; the all-zero one is none."""
    text = key_text(value, "PresharedKey")
    return None if value == _NO_KEY else text


def fwmark(value: bytes) -> int:
    """Read a mark: off, decimal or hexadecimal."""
    if value.lower() == b"off":
        return 0
    if _HEXADECIMAL.fullmatch(value) is not None:
        return int(value, 16)
    return number(value, _UINT32_MAX, "FwMark")


def check_save_config(value: bytes) -> None:
    """Check wg-quick's own switch, which must not be on."""
    if value == b"true":
        raise InvalidConfigError(
            "SaveConfig = true lets `wg-quick down` overwrite the file",
            "Set it to false, or take the line out",
        )
    if value != b"false":
        raise InvalidConfigError(
            "SaveConfig is neither true nor false", "Set it to false, or take the line out"
        )
