"""How each setting is written, read from its text; what is wrong with one is said behind its name."""

import re
from collections.abc import Callable
from enum import StrEnum
from ipaddress import AddressValueError, IPv4Address, IPv4Network
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

from pydantic import BeforeValidator, PlainValidator

from backend.models.access.sources import TrustedProxies
from backend.models.fields import is_host
from backend.models.wireguard.interface import InterfaceName
from backend.models.wireguard.keys import WireGuardKey

_Choice = TypeVar("_Choice", bound=StrEnum)

_LONGEST_PREFIX: Final = 30
_SHORTEST_PREFIX: Final = 8
_LARGEST_PORT: Final = 65535
_DAY_SECONDS: Final = 24 * 60 * 60

_REDIS_DATABASE: Final = re.compile(r"(/[0-9]{0,9})?")
# User and password, host and port, as sqlalchemy.engine.url takes them apart. That is slow to import.
_AUTHORITY: Final = re.compile(r"(?:[^:/]*(?::[^@]*)?@)?+(?:\[[^/?]+\]|[^/:?]+)?(?::[0-9]{1,5})?(?:[/?]|\Z)")
_TO_99999: Final = re.compile(r"[1-9][0-9]{0,4}")


class AuthMode(StrEnum):
    """Whether a caller has to show a credential."""

    REQUIRED = "required"
    OFF = "off"


class ReloadMode(StrEnum):
    """How a change of the file reaches the interface."""

    SYNCCONF = "syncconf"
    OFF = "off"


class LogLevel(StrEnum):
    """The least severe events that are logged."""

    CRITICAL = "critical"
    ERROR = "error"
    WARNING = "warning"
    INFO = "info"
    DEBUG = "debug"


def _parse_pool(value: Any) -> IPv4Network:
    text = str(value).strip()
    try:
        network = IPv4Network(text, strict=False)
    except ValueError:
        raise ValueError("is not an IPv4 network in CIDR notation; write one like 10.0.0.0/24") from None
    if not _SHORTEST_PREFIX <= network.prefixlen <= _LONGEST_PREFIX:
        raise ValueError(
            f"is a /{network.prefixlen}; choose a prefix length from "
            f"/{_LONGEST_PREFIX} (2 addresses) to /{_SHORTEST_PREFIX}"
        )
    try:
        return IPv4Network(text)
    except ValueError:
        raise ValueError(f"has host bits set; write {network}") from None


def _parse_public_key(value: Any) -> WireGuardKey | None:
    text = "" if value is None else str(value).strip()
    if not text:
        return None
    try:
        return WireGuardKey.parse(text)
    except ValueError as exc:
        raise ValueError(f"is not a usable key ({exc}); leave it empty to take the config's own") from None


def _parse_endpoint(value: Any) -> str:
    text = str(value).strip()
    host, colon, port = text.rpartition(":")
    if not colon or not is_host(host):
        raise ValueError(
            "is not host:port; write one like hub.example.com:51820, 192.0.2.1:51820 or [2001:db8::1]:51820"
        )
    if not _TO_99999.fullmatch(port) or int(port) > _LARGEST_PORT:
        raise ValueError(f"has no usable port; write a number from 1 to {_LARGEST_PORT} after the last colon")
    return text


def _parse_hub_ip(value: Any) -> IPv4Address:
    try:
        return IPv4Address(str(value).strip())
    except AddressValueError:
        raise ValueError("is not an IPv4 address; write one like 10.0.0.1, without a prefix length") from None


def _parse_config_path(value: Any) -> Path:
    path = Path(str(value).strip())
    example = "write one like /etc/wireguard/wg0.conf"
    if path.suffix != ".conf":
        raise ValueError(f"must end in INTERFACE.conf; {example}")
    try:
        InterfaceName.parse(path.stem)
    except ValueError as exc:
        raise ValueError(f"must end in INTERFACE.conf, and {exc}; {example}") from None
    return _absolute(path)


def _parse_state_directory(value: Any) -> Path:
    # systemd.exec(5): several directories come separated by colons.
    text = str(value).split(":", maxsplit=1)[0].strip()
    if not text:
        raise ValueError("names no directory; write one like /var/lib/wireguard-provisioning")
    return _absolute(Path(text))


def _absolute(path: Path) -> Path:
    if "\0" in str(path):
        raise ValueError("holds a NUL character, which no path can; write it without")
    return path.absolute()


def _parse_database_url(value: Any) -> str:
    """Check the URL as SQLAlchemy reads it. No message repeats any of it: there may be a password inside."""
    text = str(value).strip()
    if not text:
        return ""
    scheme, separator, rest = text.partition("://")
    if scheme in {"postgres", "postgresql"}:
        scheme = "postgresql+psycopg"
    if not separator or scheme not in {"sqlite", "postgresql+psycopg"}:
        raise ValueError(
            "is of a kind that isn't supported; write sqlite:////absolute/path or "
            "postgresql+psycopg://user:password@host/database"
        )
    if scheme == "sqlite":
        _check_sqlite(*rest.partition("?")[::2])
    elif _AUTHORITY.match(rest) is None:
        raise ValueError(
            "can't be read as a URL; percent-encode special characters in the user name and the password"
        )
    return f"{scheme}://{rest}"


def _check_sqlite(path: str, query: str) -> None:
    if not path.startswith("/") or unquote(path[1:]) in {"", ":memory:"}:
        raise ValueError(
            "names no file; write sqlite:////absolute/path, or set ENABLE_DBOS=false for records in memory"
        )
    if "uri" in parse_qs(query, keep_blank_values=True):
        # SQLite would open another file than the one that is locked and watched.
        raise ValueError("has the option uri, which isn't supported; write sqlite:////absolute/path")


def _parse_rate_limit(value: Any) -> str:
    from limits import parse_many  # noqa: PLC0415 - slow to import, and most commands have no use for it

    text = str(value).strip()
    try:
        limit, *others = parse_many(text)
    except ValueError:
        others = []
        limit = None
    if limit is None or others:
        raise ValueError("is not one rate limit; write one like 30/minute or 1000 per 2 hours")
    if limit.amount < 1:
        raise ValueError("allows nothing at all; write one like 30/minute")
    if limit.get_expiry() > _DAY_SECONDS:
        raise ValueError("counts for longer than a day; write one like 1000/day")
    return text


def _parse_rate_limit_storage(value: Any) -> str:
    """Check the URL. No message repeats any of it: there may be a password inside."""
    text = str(value).strip()
    if text == "memory://":
        return text
    try:
        url = urlsplit(text)
        readable = url.port != 0 and bool(url.hostname) and not (url.query or url.fragment)
    except ValueError:
        url = None
    if url is not None and url.scheme not in {"redis", "rediss"}:
        raise ValueError(
            "is of a kind that isn't supported; write memory:// or redis://user:password@host:6379/0"
        )
    if url is None or not readable or not _REDIS_DATABASE.fullmatch(url.path):
        raise ValueError(
            "can't be read as redis://user:password@host:port/number; percent-encode special characters in "
            "the user name and the password"
        )
    return text


def _parse_proxies(value: Any) -> TrustedProxies:
    return value if isinstance(value, TrustedProxies) else TrustedProxies.parse(str(value))


def _choice(kind: type[_Choice], problem: str) -> Callable[[Any], _Choice]:
    def parse(value: Any) -> _Choice:
        try:
            return kind(str(value).strip().lower())
        except ValueError:
            raise ValueError(problem) from None

    return parse


def _whole_number(problem: str) -> Callable[[Any], int]:
    """Return a parser of the numbers from 1 to 99999."""

    def parse(value: Any) -> int:
        text = str(value).strip()
        if not _TO_99999.fullmatch(text):
            raise ValueError(problem)
        return int(text)

    return parse


Pool = Annotated[IPv4Network, BeforeValidator(_parse_pool)]
PublicKey = Annotated[WireGuardKey | None, BeforeValidator(_parse_public_key)]
Endpoint = Annotated[str, BeforeValidator(_parse_endpoint)]
HubAddress = Annotated[IPv4Address, BeforeValidator(_parse_hub_ip)]
ConfigPath = Annotated[Path, BeforeValidator(_parse_config_path)]
StateDirectory = Annotated[Path, BeforeValidator(_parse_state_directory)]
DatabaseUrl = Annotated[str, BeforeValidator(_parse_database_url)]
RateLimit = Annotated[str, BeforeValidator(_parse_rate_limit)]
RateLimitStorage = Annotated[str, BeforeValidator(_parse_rate_limit_storage)]
Proxies = Annotated[TrustedProxies, PlainValidator(_parse_proxies)]
Count = Annotated[int, BeforeValidator(_whole_number("is not a number from 1 to 99999; write one like 1024"))]
Days = Annotated[
    int, BeforeValidator(_whole_number("is no number of days from 1 to 99999; write one like 365"))
]
Reload = Annotated[
    ReloadMode,
    BeforeValidator(_choice(ReloadMode, "is neither syncconf nor off; write one of the two")),
]
Auth = Annotated[
    AuthMode, BeforeValidator(_choice(AuthMode, "is neither required nor off; write one of the two"))
]
Level = Annotated[
    LogLevel, BeforeValidator(_choice(LogLevel, f"is unknown; write one of {', '.join(LogLevel)}"))
]
