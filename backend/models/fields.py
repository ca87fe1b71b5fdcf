"""What several models check, each once: hosts, printable text, secrets, IPv4 inside IPv6, unknown fields."""

import re
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, model_validator

# More than any of these models has. Each unknown field is an error of its own, and 64 KiB hold thousands.
_MAX_FIELDS: Final = 32
_CONTAINERS: Final = (dict, list)
_LONGEST_HOST_NAME: Final = 253
_HOST_LABEL: Final = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
# The text of a credential, to find one where none belongs.
SECRET_TEXT: Final = re.compile(r"ocw_([0-9a-f]{16})_([0-9a-f]{64})")
# RFC 4291, section 2.5.5.2: how a socket for both families names an IPv4 address.
_MAPPED_IPV4: Final = IPv6Network("::ffff:0:0/96")


class FrozenModel(BaseModel):
    """Has no other fields than its own, and doesn't change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StrictModel(FrozenModel):
    """The base of requests: it does not turn one type into another, and its work is bounded."""

    model_config = ConfigDict(strict=True)

    @model_validator(mode="before")
    @classmethod
    def _bounded(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > _MAX_FIELDS:
            raise ValueError(f"at most {_MAX_FIELDS} fields are allowed, these are {len(value)}")
        return value


def printable(text: str) -> str:
    """Return the text; raise ValueError where a character in it isn't printable."""
    if not text.isprintable():
        raise ValueError("only printable characters are allowed")
    return text


def escaped(text: str) -> str:
    """Return the text with an escape in place of each character that isn't printable."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def redacted(text: str) -> str:
    """Return a text with the secrets of the credentials in it replaced by `***`."""
    return SECRET_TEXT.sub(r"ocw_\1_***", text) if "ocw_" in text else text


def require_no_secret(text: str) -> str:
    """Return the text; raise ValueError, which doesn't repeat it, if a credential is in it."""
    if "ocw_" in text and SECRET_TEXT.search(text) is not None:
        raise ValueError("this is a credential, which belongs into the header Authorization; revoke it")
    return text


def unmapped(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """Return the IPv4 address that is mapped into this IPv6 one, else the address itself."""
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address


def is_mapped(network: IPv4Network | IPv6Network) -> bool:
    """Tell whether a network holds nothing but IPv4 addresses that are mapped into IPv6."""
    return isinstance(network, IPv6Network) and network.subnet_of(_MAPPED_IPV4)


def is_deeper(value: object, levels: int) -> bool:
    """Tell whether JSON has more levels than that. Goes down level by level, without recursion."""
    level = [value]
    for _ in range(levels):
        level = [
            child
            for container in level
            if isinstance(container, _CONTAINERS)
            for child in (container.values() if isinstance(container, dict) else container)
        ]
    return any(isinstance(value, _CONTAINERS) for value in level)


def is_host(text: str) -> bool:
    """Tell whether another host could look up or reach this: a name, an IPv4 address or an [IPv6] one."""
    if text.startswith("[") and text.endswith("]"):
        # A zone ("fe80::1%eth0") names an interface of this host, which means nothing on another one.
        return "%" not in text and _is_address(IPv6Address, text[1:-1])
    labels = text.removesuffix(".").split(".")
    if labels[-1].isdecimal():  # no top-level domain is a number: this is meant to be an address
        return _is_address(IPv4Address, text)
    return len(text) <= _LONGEST_HOST_NAME and all(_HOST_LABEL.fullmatch(label) for label in labels)


def _is_address(kind: type[IPv4Address | IPv6Address], text: str) -> bool:
    try:
        kind(text)
    except AddressValueError:
        return False
    return True
