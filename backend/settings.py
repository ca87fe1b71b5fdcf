"""What an operator can set: the environment, or `.env` in the working directory. See `.env.example`."""

import os
from datetime import timedelta
from difflib import get_close_matches
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from dotenv import dotenv_values
from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from backend.errors import StartRefusedError
from backend.models.access.sources import LimitKind, TrustedProxies
from backend.models.setting_values import (
    Auth,
    AuthMode,
    BackupDirectory,
    ConfigPath,
    Count,
    CountOrZero,
    DatabaseUrl,
    Days,
    Endpoint,
    HubAddress,
    Level,
    LogLevel,
    Pool,
    Proxies,
    PublicKey,
    RateLimit,
    RateLimitStorage,
    Reload,
    ReloadMode,
    StateDirectory,
)
from backend.models.trusted_paths import require_trusted
from backend.models.wireguard.interface import InterfaceName

_PREFIX: Final = "WIREGUARD_"
_ENV_FILE: Final = ".env"


class Settings(BaseSettings):
    """The service's settings, checked once. Field names in capitals are the variables' names."""

    model_config = SettingsConfigDict(
        env_file=_ENV_FILE,
        env_file_encoding="utf-8",
        # `WIREGUARD_HUB_PUBLIC_KEY=` in a file is how one says "not set".
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        # Every value is parsed from its text, and none is JSON.
        enable_decoding=False,
        # A default can be wrong too: 10.0.0.1 isn't inside every pool.
        validate_default=True,
        # An error must not show what was set: it may hold a password.
        hide_input_in_errors=True,
    )

    # The order matters: a field is checked against those before it, and the first wrong one is reported.
    wireguard_ip_pool: Pool = IPv4Network("10.0.0.0/24")
    wireguard_hub_public_key: PublicKey = None
    wireguard_hub_endpoint: Endpoint = "localhost:51820"
    wireguard_hub_ip: HubAddress = IPv4Address("10.0.0.1")
    wireguard_config_path: ConfigPath = Path("/etc/wireguard/wg0.conf")
    wireguard_reload: Reload = ReloadMode.SYNCCONF
    state_directory: StateDirectory = Path("var")
    database_url: DatabaseUrl = Field(default="", repr=False)
    enable_dbos: bool = True
    wireguard_rate_limit_storage: RateLimitStorage = Field(default="memory://", repr=False)
    wireguard_rate_limit_source: RateLimit = "60000/minute"
    wireguard_rate_limit_token: RateLimit = "60000/minute"  # noqa: S105 - no secret
    wireguard_rate_limit_key: RateLimit = "60000/minute"
    wireguard_rate_limit_failed_authentication: RateLimit = "30/minute"
    wireguard_auth: Auth = AuthMode.REQUIRED
    wireguard_max_connections: Count = 4096
    wireguard_max_connections_per_source: Count = 1024
    wireguard_trusted_proxies: Proxies = TrustedProxies()
    wireguard_require_proof: bool = False
    wireguard_audit_keep: Days = 365
    wireguard_health_interval: CountOrZero = 5
    wireguard_suspect_after: Count = 75
    wireguard_offline_after: Count = 180
    wireguard_metrics: bool = True
    wireguard_metrics_public: bool = False
    wireguard_metrics_per_peer: bool = False
    wireguard_backup_directory: BackupDirectory = None
    wireguard_backup_keep: CountOrZero = 14
    wireguard_backup_keep_days: Days = 30
    log_level: Level = LogLevel.INFO
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
    def backup_directory(self) -> Path:
        """Where backups are kept."""
        return self.wireguard_backup_directory or self.state_directory / "backups"

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

    @field_validator("wireguard_offline_after")
    @classmethod
    def _offline_comes_after_suspect(cls, seconds: int, info: ValidationInfo) -> int:
        suspect: int | None = info.data.get("wireguard_suspect_after")
        if suspect is not None and seconds <= suspect:
            raise ValueError(f"({seconds}) is not more than WIREGUARD_SUSPECT_AFTER ({suspect})")
        return seconds

    @field_validator("database_url")
    @classmethod
    def _default_database(cls, url: str, info: ValidationInfo) -> str:
        directory: Path | None = info.data.get("state_directory")
        if url or directory is None:
            return url
        # SQLAlchemy decodes what is percent-encoded.
        return f"sqlite:///{quote(str(directory / 'provisioning.sqlite'))}"


def unknown_settings() -> dict[str, str | None]:
    """Return names in the environment or `.env` that look like ours and aren't, each with the nearest.

    A setting whose name is misspelt would be ignored in silence.
    """
    try:
        in_file = set(dotenv_values(_ENV_FILE, interpolate=False, encoding="utf-8"))
    except (OSError, UnicodeError):  # load_settings refuses such a file
        in_file = set()
    known = {
        name.upper().removeprefix(_PREFIX)
        for name in Settings.model_fields
        if name.upper().startswith(_PREFIX)
    }
    ours = {name.upper() for name in os.environ.keys() | in_file if name.upper().startswith(_PREFIX)}
    unknown = sorted({name.removeprefix(_PREFIX) for name in ours} - known)
    nearest = {suffix: get_close_matches(suffix, known, 1) for suffix in unknown}
    return {_PREFIX + suffix: _PREFIX + near[0] if near else None for suffix, near in nearest.items()}


def trusted_env_file() -> Path | None:
    """Return `.env`'s path, None where there is none; raise StartRefusedError where others could change it.

    It says which database, which config and which credentials count. A file that is made after this check
    isn't read, so a directory in which other users may make files does no harm.
    """
    path = Path(_ENV_FILE).absolute()
    if not os.path.lexists(path):
        return None
    require_trusted(path, f"the file of settings {path}")
    return path


def load_settings(**given: Any) -> Settings:
    """Read the settings that aren't given; raise StartRefusedError for the first that is wrong.

    It is raised too for a `.env` that other users could change; TypeError for a name that no setting has.
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
            f"{Path(_ENV_FILE).absolute()} can't be read ({problem}); mend it or take it away."
        ) from None
