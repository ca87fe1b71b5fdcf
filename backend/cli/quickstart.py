"""`make run`: a hub of its own under the state directory, from nothing, on whatever host this is."""

import json
import os
import re
import secrets
import shlex
from collections.abc import Callable, Iterable
from ipaddress import IPv4Interface
from os.path import lexists
from pathlib import Path
from typing import Final

from backend.adapters.host.private_files import ADMIN_HEADER
from backend.adapters.host.programs import obstacles
from backend.adapters.records.peers import count_recorded_peers
from backend.adapters.wireguard import hub_key, link
from backend.adapters.wireguard.host_link import interface_exists
from backend.adapters.wireguard.hub_key import Consent
from backend.errors import StartRefusedError
from backend.models.setting_values import ReloadMode
from backend.models.trusted_paths import make_private_directory, require_trusted
from backend.models.wireguard.keys import WireGuardPrivateKey
from backend.settings import Settings

_NAMES: Final = [f"wg{number}" for number in range(100)]
_OWN_CONFIG: Final = re.compile(r"wg([0-9]+)\.conf")
_PATTERN: Final = "wg*.conf"
_SYSTEM_CONFIGS: Final = Path("/etc/wireguard")
_PORTS_TO_TRY: Final = 100


def prepare(settings: Settings, say: Callable[[str], None]) -> Settings:
    """Make the hub and bring it up as far as this host allows; return the settings to serve with."""
    try:
        make_private_directory(settings.state_directory)
    except OSError as exc:
        raise StartRefusedError(
            f"{settings.state_directory} can't be made ({exc.strerror}); set STATE_DIRECTORY to another one"
        ) from exc
    require_trusted(settings.state_directory, "STATE_DIRECTORY")
    config_path = _choose_config(settings, say)
    endpoint = _choose_endpoint(settings, config_path)
    settings = settings.model_copy(
        update={"wireguard_config_path": config_path, "wireguard_hub_endpoint": endpoint}
    )
    make_config(settings, say)
    if settings.wireguard_reload is ReloadMode.OFF:
        return settings
    return _bring_up_if_possible(settings, say)


def make_config(
    settings: Settings, say: Callable[[str], None], *, recover: bool = False, new_key: bool = False
) -> bool:
    """Make the hub's config if there is none, and say how; HubUpdateError where its key would be lost."""
    path = settings.wireguard_config_path
    made = hub_key.init(
        path,
        hub_address(settings),
        settings.listen_port,
        Consent(
            settings.wireguard_hub_public_key,
            settings.wireguard_reload is not ReloadMode.OFF,
            recover,
            new_key,
        ),
        lambda: count_recorded_peers(settings.database_url) if settings.enable_dbos else 0,
    )
    if made is None:
        return False
    if made.recovered is None:
        say(f"made {path} with a new key")
        return True
    say(f"made {path} with the key of interface {path.stem}, {made.recovered}")
    if made.noted_peers is not None:
        say(
            f"{made.noted_peers} has what the interface had: peers of the records come back by themselves, "
            f"those made by hand belong into {path} once more"
        )
    return True


def hub_address(settings: Settings) -> IPv4Interface:
    """Return the hub's own address in the pool."""
    return IPv4Interface((settings.wireguard_hub_ip, settings.wireguard_ip_pool.prefixlen))


def beside_run(settings: Settings) -> Settings:
    """Return the settings with the hub of `make run`, where nothing says that another one is meant."""
    return _with_config(
        settings, _made_config(settings.state_directory) or _lost_config(settings.state_directory)
    )


def beside_lost(settings: Settings) -> Settings:
    """Return the settings with the hub of `make run` where its config is lost and has to be made again."""
    directory = settings.state_directory
    return _with_config(settings, None if _made_config(directory) else _lost_config(directory))


def _with_config(settings: Settings, path: Path | None) -> Settings:
    named = "wireguard_config_path" in settings.model_fields_set
    if path is None or named or lexists(_SYSTEM_CONFIGS / settings.wireguard_config_path.name):
        return settings
    return settings.model_copy(
        update={"wireguard_config_path": path, "wireguard_hub_endpoint": _choose_endpoint(settings, path)}
    )


def try_it(url: str, state_directory: Path) -> str:
    """Return commands that can be pasted: a node joins, is looked at, and leaves."""
    # The file is root's, and the user who started this by sudo is not root.
    sudo = "sudo " if os.geteuid() == 0 and "SUDO_USER" in os.environ else ""
    curl = f"{sudo}curl -sS -H @{shlex.quote(str(state_directory / ADMIN_HEADER))}"
    node_id = f"node-{secrets.token_hex(3)}"
    body = {
        "node_id": node_id,
        "public_key": f"libp2p-key-of-{node_id}",
        "wireguard_public_key": WireGuardPrivateKey.generate().public_key(),
        "capabilities": {"gpu_count": 1, "gpu_memory_mb": 16384, "cpu_cores": 8, "models": ["llama-2-7b"]},
        "version": "1.0.0",
    }
    api = f"{url}/api/v1/wireguard"
    return (
        f"{curl} {api}/provision -H 'Content-Type: application/json' -d '{json.dumps(body)}'\n"
        f"{curl} {api}/peers/{node_id}\n"
        f"{curl} -X DELETE {api}/peers/{node_id}"
    )


def bring_up(settings: Settings, say: Callable[[str], None], warn: Callable[[str], None]) -> None:
    """Bring the hub's interface up, and say what was done."""
    raised = link.up(settings.wireguard_config_path, hub_address(settings), settings.wireguard_hub_public_key)
    say(f"interface {settings.interface} {'is up' if raised.created else 'was up already'}")
    for warning in raised.warnings:
        warn(f"note: {warning}")


def _bring_up_if_possible(settings: Settings, say: Callable[[str], None]) -> Settings:
    if missing := obstacles():
        say(f"no interface {settings.interface}: {'; '.join(missing)}")
        say("goes on with WIREGUARD_RELOAD=off, which keeps the records and the file only")
        return settings.model_copy(update={"wireguard_reload": ReloadMode.OFF})
    bring_up(settings, say, say)
    say(
        f"{settings.interface} stays up after Ctrl-C; take it down with: "
        f"WIREGUARD_CONFIG_PATH={settings.wireguard_config_path} .venv/bin/python -m backend hub down"
    )
    return settings


def _choose_config(settings: Settings, say: Callable[[str], None]) -> Path:
    """Take the config that is set, else the one that an earlier run made, else the first free name."""
    if "wireguard_config_path" in settings.model_fields_set:
        return settings.wireguard_config_path
    directory = settings.state_directory
    # A lost one too: under another name the hub would come up with a new key, beside the interface that has
    # its own.
    if known := _made_config(directory) or _lost_config(directory):
        return known
    for name in _NAMES:
        if interface_exists(name):
            say(f"{name} is left alone: an interface of that name exists")
        elif lexists(_SYSTEM_CONFIGS / f"{name}.conf"):
            say(f"{name} is left alone: {_SYSTEM_CONFIGS / name}.conf exists")
        else:
            return directory / f"{name}.conf"
    raise StartRefusedError(
        f"{_NAMES[0]} to {_NAMES[-1]} are all in use; name another one with WIREGUARD_CONFIG_PATH"
    )


def _made_config(directory: Path) -> Path | None:
    """Return the config that an earlier run made."""
    return _first_config(directory, (path.name for path in directory.glob(_PATTERN)))


def _lost_config(directory: Path) -> Path | None:
    """Return the config that an earlier run had and that is gone, by the lock that stays beside it."""
    locks = directory.glob(f".{_PATTERN}.lock")
    return _first_config(directory, (path.name[1 : -len(".lock")] for path in locks))


def _first_config(directory: Path, names: Iterable[str]) -> Path | None:
    numbers = {int(match[1]): match[0] for name in names if (match := _OWN_CONFIG.fullmatch(name))}
    return directory / numbers[min(numbers)] if numbers else None


def _choose_endpoint(settings: Settings, config_path: Path) -> str:
    """Take the endpoint that is set, else one with the config's own port, else with a port that is free."""
    if "wireguard_hub_endpoint" in settings.model_fields_set:
        return settings.wireguard_hub_endpoint
    host = settings.wireguard_hub_endpoint.rpartition(":")[0]
    wanted = settings.listen_port
    port = link.listen_port(config_path) or next(
        (port for port in range(wanted, wanted + _PORTS_TO_TRY) if link.is_free(port)), wanted
    )
    return f"{host}:{port}"
