"""What an operator can set: the environment, or `.env` in the working directory. See `.env.example`."""

import os
import re
from datetime import timedelta
from difflib import get_close_matches
from enum import StrEnum
from ipaddress import AddressValueError, IPv4Address, IPv4Network, IPv6Address
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, PlainValidator, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from backend.adapters.env_file import names_in_env_file, trusted_env_file
from backend.errors import StartRefusedError
from backend.models.sources import TrustedProxies
from backend.models.wireguard.interface import InterfaceName
from backend.models.wireguard.keys import WireGuardKey
from backend.services.ports import LimitKind

_PREFIX: Final = "WIREGUARD_"
_LONGEST_PREFIX: Final = 30
_SHORTEST_PREFIX: Final = 8
_LARGEST_PORT: Final = 65535
_LONGEST_HOST_NAME: Final = 253
_DAY_SECONDS: Final = 24 * 60 * 60

_HOST_LABEL: Final = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
_REDIS_DATABASE: Final = re.compile(r"(/[0-9]{0,9})?")
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


def _is_address(kind: type[IPv4Address | IPv6Address], text: str) -> bool:
    try:
        kind(text)
    except AddressValueError:
        return False
    return True


def _is_host(host: str) -> bool:
    """Tell whether peers could look up or reach `host`: a name, an IPv4 address or an [IPv6] one."""
    if host.startswith("[") and host.endswith("]"):
        # A zone ("fe80::1%eth0") names an interface of this host, which means nothing on a peer's.
        return "%" not in host and _is_address(IPv6Address, host[1:-1])
    labels = host.removesuffix(".").split(".")
    if labels[-1].isdecimal():  # no top-level domain is a number: this is meant to be an address
        return _is_address(IPv4Address, host)
    return len(host) <= _LONGEST_HOST_NAME and all(_HOST_LABEL.fullmatch(label) for label in labels)


def _parse_endpoint(value: Any) -> str:
    text = str(value).strip()
    host, colon, port = text.rpartition(":")
    if not colon or not _is_host(host):
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


def _parse_reload(value: Any) -> ReloadMode:
    try:
        return ReloadMode(str(value).strip().lower())
    except ValueError:
        raise ValueError("is neither syncconf nor off; write one of the two") from None


def _parse_auth(value: Any) -> AuthMode:
    try:
        return AuthMode(str(value).strip().lower())
    except ValueError:
        raise ValueError("is neither required nor off; write one of the two") from None


def _parse_log_level(value: Any) -> LogLevel:
    try:
        return LogLevel(str(value).strip().lower())
    except ValueError:
        raise ValueError(f"is unknown; write one of {', '.join(LogLevel)}") from None


def _parse_database_url(value: Any) -> str:
    """Check the URL's kind. No message repeats any of it: there may be a password inside."""
    # Here, because SQLAlchemy takes a while to import and most commands have no use for it.
    from sqlalchemy.engine import make_url  # noqa: PLC0415
    from sqlalchemy.exc import ArgumentError  # noqa: PLC0415

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
    text = f"{scheme}://{rest}"
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise ValueError(
            "can't be read as a URL; percent-encode special characters in the user name and the password"
        ) from None
    if scheme == "sqlite" and (url.host or url.database in {None, "", ":memory:"}):
        raise ValueError(
            "names no file; write sqlite:////absolute/path, or set ENABLE_DBOS=false for records in memory"
        )
    return text


def _parse_rate_limit(value: Any) -> str:
    # Here, as above.
    from limits import parse_many  # noqa: PLC0415

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


def _parse_connections(value: Any) -> int:
    text = str(value).strip()
    if not _TO_99999.fullmatch(text):
        raise ValueError("is not a number from 1 to 99999; write one like 1024")
    return int(text)


def _parse_days(value: Any) -> int:
    text = str(value).strip()
    if not _TO_99999.fullmatch(text):
        raise ValueError("is no number of days from 1 to 99999; write one like 365")
    return int(text)


def _parse_proxies(value: Any) -> TrustedProxies:
    return value if isinstance(value, TrustedProxies) else TrustedProxies.parse(str(value))


class Settings(BaseSettings):
    """The service's settings, checked once. Field names in capitals are the variables' names."""

    model_config = SettingsConfigDict(
        env_file=".env",
        env_file_encoding="utf-8",
        # `WIREGUARD_HUB_PUBLIC_KEY=` in a file is how one says "not set".
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        # A default can be wrong too: 10.0.0.1 isn't inside every pool.
        validate_default=True,
        # An error must not show what was set: it may hold a password.
        hide_input_in_errors=True,
    )

    # The order matters: a field is checked against those before it, and the first wrong one is reported.
    wireguard_ip_pool: Annotated[IPv4Network, BeforeValidator(_parse_pool)] = IPv4Network("10.0.0.0/24")
    wireguard_hub_public_key: Annotated[WireGuardKey | None, BeforeValidator(_parse_public_key)] = None
    wireguard_hub_endpoint: Annotated[str, BeforeValidator(_parse_endpoint)] = "localhost:51820"
    wireguard_hub_ip: Annotated[IPv4Address, BeforeValidator(_parse_hub_ip)] = IPv4Address("10.0.0.1")
    wireguard_config_path: Annotated[Path, BeforeValidator(_parse_config_path)] = Path(
        "/etc/wireguard/wg0.conf"
    )
    wireguard_reload: Annotated[ReloadMode, BeforeValidator(_parse_reload)] = ReloadMode.SYNCCONF
    state_directory: Annotated[Path, BeforeValidator(_parse_state_directory)] = Path("var")
    database_url: Annotated[str, BeforeValidator(_parse_database_url)] = Field(default="", repr=False)
    enable_dbos: bool = True
    wireguard_rate_limit_storage: Annotated[str, BeforeValidator(_parse_rate_limit_storage)] = Field(
        default="memory://", repr=False
    )
    wireguard_rate_limit_source: Annotated[str, BeforeValidator(_parse_rate_limit)] = "60000/minute"
    wireguard_rate_limit_token: Annotated[str, BeforeValidator(_parse_rate_limit)] = "60000/minute"  # noqa: S105
    wireguard_rate_limit_key: Annotated[str, BeforeValidator(_parse_rate_limit)] = "60000/minute"
    wireguard_rate_limit_failed_authentication: Annotated[str, BeforeValidator(_parse_rate_limit)] = (
        "30/minute"
    )
    wireguard_auth: Annotated[AuthMode, BeforeValidator(_parse_auth)] = AuthMode.REQUIRED
    wireguard_max_connections: Annotated[int, BeforeValidator(_parse_connections)] = 4096
    wireguard_max_connections_per_source: Annotated[int, BeforeValidator(_parse_connections)] = 1024
    wireguard_trusted_proxies: Annotated[TrustedProxies, PlainValidator(_parse_proxies)] = TrustedProxies()
    wireguard_require_proof: bool = False
    wireguard_audit_keep: Annotated[int, BeforeValidator(_parse_days)] = 365
    log_level: Annotated[LogLevel, BeforeValidator(_parse_log_level)] = LogLevel.INFO
    access_log: bool = False

    @property
    def rate_limits(self) -> dict[LimitKind, str]:
        """How often is allowed for each kind, in the notation of the library `limits`."""
        return {
            LimitKind.SOURCE: self.wireguard_rate_limit_source,
            LimitKind.TOKEN: self.wireguard_rate_limit_token,
            LimitKind.KEY: self.wireguard_rate_limit_key,
            LimitKind.FAILED_AUTHENTICATION: self.wireguard_rate_limit_failed_authentication,
        }

    @property
    def audit_keep(self) -> timedelta:
        """How long rows of the audit log are kept."""
        return timedelta(days=self.wireguard_audit_keep)

    @property
    def interface(self) -> InterfaceName:
        """The WireGuard interface's name, as wg-quick(8) takes it from the file's."""
        return InterfaceName.parse(self.wireguard_config_path.stem)

    @property
    def listen_port(self) -> int:
        """The UDP port of the endpoint that peers are given."""
        return int(self.wireguard_hub_endpoint.rpartition(":")[2])

    @field_validator("wireguard_hub_ip")
    @classmethod
    def _hub_ip_is_a_host_of_the_pool(cls, address: IPv4Address, info: ValidationInfo) -> IPv4Address:
        pool: IPv4Network | None = info.data.get("wireguard_ip_pool")
        if pool is None:  # it was refused itself
            return address
        first = pool.network_address + 1
        if address not in pool:
            raise ValueError(f"({address}) is outside of WIREGUARD_IP_POOL ({pool}); set it to {first}")
        if address in {pool.network_address, pool.broadcast_address}:
            kind = "network" if address == pool.network_address else "broadcast"
            raise ValueError(f"({address}) is the {kind} address of {pool}; set it to {first}")
        return address

    @field_validator("database_url")
    @classmethod
    def _default_database(cls, url: str, info: ValidationInfo) -> str:
        directory: Path | None = info.data.get("state_directory")
        if url or directory is None:
            return url
        from sqlalchemy.engine import URL  # noqa: PLC0415 - as above

        return URL.create("sqlite", database=str(directory / "provisioning.sqlite")).render_as_string()


def unknown_settings() -> dict[str, str | None]:
    """Return names in the environment or `.env` that look like ours and aren't, each with the nearest.

    A setting whose name is misspelt would be ignored in silence.
    """
    names = {name.upper() for name in (*os.environ, *names_in_env_file())}
    known = {
        name.upper().removeprefix(_PREFIX)
        for name in Settings.model_fields
        if name.upper().startswith(_PREFIX)
    }
    found = {}
    for name in sorted(names):
        suffix = name.removeprefix(_PREFIX)
        if suffix != name and suffix not in known:
            nearest = get_close_matches(suffix, known, 1)
            found[name] = _PREFIX + nearest[0] if nearest else None
    return found


def load_settings(**given: Any) -> Settings:
    """Read the settings that aren't given; raise StartRefusedError for the first that is wrong.

    So does a `.env` that others could change. TypeError for a name that no setting has.
    """
    unknown = given.keys() - Settings.model_fields.keys()
    if unknown:
        raise TypeError(f"there is no setting {', '.join(sorted(unknown))}")
    try:
        return Settings(_env_file=trusted_env_file(), **given)
    except ValidationError as exc:
        error = exc.errors(include_url=False, include_input=False)[0]
        name = str(error["loc"][0]).upper()
        if error["type"] == "value_error":
            reason = str(error["ctx"]["error"])
        else:  # a field that pydantic parses alone: a bool
            reason = "is neither true nor false; write one of the two"
        # The chain would show the value.
        raise StartRefusedError(f"{name} {reason}.") from None
    except (OSError, UnicodeError, SettingsError) as exc:
        problem = exc.strerror if isinstance(exc, OSError) else "it isn't UTF-8 text"
        raise StartRefusedError(
            f"{Path('.env').absolute()} can't be read ({problem}); mend it or take it away."
        ) from None
