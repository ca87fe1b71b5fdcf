"""How each setting is written, read from its text; what is wrong with one is said behind its name."""

import re
from collections.abc import Callable
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

from pydantic import BeforeValidator, PlainValidator

from backend.models.access.sources import TrustedProxies
from backend.models.fields import is_host
from backend.models.wireguard.interface import InterfaceName
from backend.models.wireguard.keys import WireGuardKey

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


def _parse_pool(text: str) -> IPv4Network:
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


def _parse_public_key(text: str) -> WireGuardKey | None:
    if not text:
        return None
    try:
        return WireGuardKey.parse(text)
    except ValueError as exc:
        raise ValueError(f"is not a usable key ({exc}); leave it empty to take the config's own") from None


def _parse_endpoint(text: str) -> str:
    host, colon, port = text.rpartition(":")
    if not colon or not is_host(host):
        raise ValueError(
            "is not host:port; write one like hub.example.com:51820, 192.0.2.1:51820 or [2001:db8::1]:51820"
        )
    if not _TO_99999.fullmatch(port) or int(port) > _LARGEST_PORT:
        raise ValueError(f"has no usable port; write a number from 1 to {_LARGEST_PORT} after the last colon")
    return text


def _parse_config_path(text: str) -> Path:
    path = Path(text)
    example = "write one like /etc/wireguard/wg0.conf"
    if path.suffix != ".conf":
        raise ValueError(f"must end in INTERFACE.conf; {example}")
    try:
        InterfaceName.parse(path.stem)
    except ValueError as exc:
        raise ValueError(f"must end in INTERFACE.conf, and {exc}; {example}") from None
    return _absolute(path)


def _parse_state_directory(text: str) -> Path:
    # systemd.exec(5): several directories come separated by colons.
    first = text.partition(":")[0].strip()
    if not first:
        raise ValueError("names no directory; write one like /var/lib/wireguard-provisioning")
    return _absolute(Path(first))


def _parse_backup_directory(text: str) -> Path | None:
    return _absolute(Path(text)) if text else None


def _absolute(path: Path) -> Path:
    if "\0" in str(path):
        raise ValueError("holds a NUL character, which no path can; write it without")
    return path.absolute()


def _parse_database_url(text: str) -> str:
    """Check the URL as SQLAlchemy reads it. No message repeats any of it: there may be a password inside."""
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


def _parse_rate_limit(text: str) -> str:
    from limits import parse_many  # noqa: PLC0415 - slow to import, and most commands have no use for it

    try:
        (limit,) = parse_many(text)
    except ValueError:
        raise ValueError("is not one rate limit; write one like 30/minute or 1000 per 2 hours") from None
    if limit.amount < 1:
        raise ValueError("allows nothing at all; write one like 30/minute")
    if limit.get_expiry() > _DAY_SECONDS:
        raise ValueError("counts for longer than a day; write one like 1000/day")
    return text


def _parse_rate_limit_storage(text: str) -> str:
    """Check the URL. No message repeats any of it: there may be a password inside."""
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


def _parse_number(text: str) -> int:
    if not _TO_99999.fullmatch(text):
        raise ValueError("not from 1 to 99999")
    return int(text)


def _read(parse: Callable[[str], Any], problem: str | None = None) -> BeforeValidator:
    """Return the validator that parses a setting's text, and says `problem` where the parser refuses it."""

    def validate(value: Any) -> Any:
        try:
            return parse("" if value is None else str(value).strip())
        except ValueError as exc:
            raise ValueError(problem or str(exc)) from None

    return BeforeValidator(validate)


Pool = Annotated[IPv4Network, _read(_parse_pool)]
PublicKey = Annotated[WireGuardKey | None, _read(_parse_public_key)]
Endpoint = Annotated[str, _read(_parse_endpoint)]
HubAddress = Annotated[
    IPv4Address,
    _read(IPv4Address, "is not an IPv4 address; write one like 10.0.0.1, without a prefix length"),
]
ConfigPath = Annotated[Path, _read(_parse_config_path)]
StateDirectory = Annotated[Path, _read(_parse_state_directory)]
BackupDirectory = Annotated[Path | None, _read(_parse_backup_directory)]
DatabaseUrl = Annotated[str, _read(_parse_database_url)]
RateLimit = Annotated[str, _read(_parse_rate_limit)]
RateLimitStorage = Annotated[str, _read(_parse_rate_limit_storage)]
Proxies = Annotated[TrustedProxies, PlainValidator(_parse_proxies)]
Count = Annotated[int, _read(_parse_number, "is not a number from 1 to 99999; write one like 1024")]
CountOrZero = Annotated[
    int,
    _read(
        lambda text: 0 if text == "0" else _parse_number(text),
        "is not a number from 0 to 99999; write one like 14",
    ),
]
Days = Annotated[int, _read(_parse_number, "is no number of days from 1 to 99999; write one like 365")]
Reload = Annotated[
    ReloadMode,
    _read(lambda text: ReloadMode(text.lower()), "is neither syncconf nor off; write one of the two"),
]
Auth = Annotated[
    AuthMode, _read(lambda text: AuthMode(text.lower()), "is neither required nor off; write one of the two")
]
Level = Annotated[
    LogLevel, _read(lambda text: LogLevel(text.lower()), f"is unknown; write one of {', '.join(LogLevel)}")
]
