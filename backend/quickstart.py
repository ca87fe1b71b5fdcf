"""`make run`: a hub of its own under the state directory, from nothing, on whatever host this is."""

import json
import re
import secrets
import socket
from collections.abc import Callable
from ipaddress import IPv4Interface
from os.path import lexists
from pathlib import Path
from typing import Final

from backend.adapters import hub_device
from backend.adapters.host_tools import install_missing, obstacles
from backend.adapters.trusted_paths import make_private_directory, require_trusted
from backend.errors import StartRefusedError
from backend.models.wireguard.keys import WireGuardPrivateKey
from backend.settings import ReloadMode, Settings

_NAMES: Final = [f"wg{number}" for number in range(100)]
_OWN_CONFIG: Final = re.compile(r"wg([0-9]+)\.conf")
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
    address = IPv4Interface((settings.wireguard_hub_ip, settings.wireguard_ip_pool.prefixlen))
    if hub_device.init(config_path, address, settings.listen_port):
        say(f"made {config_path} with a new key")
    if settings.wireguard_reload is ReloadMode.OFF:
        return settings
    return _bring_up(settings, address, say)


def try_it(url: str) -> str:
    """Return commands that can be pasted: a node joins, is looked at, and leaves."""
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
        f"curl -sS {api}/provision -H 'Content-Type: application/json' -d '{json.dumps(body)}'\n"
        f"curl -sS {api}/peers/{node_id}\n"
        f"curl -sS -X DELETE {api}/peers/{node_id}"
    )


def _bring_up(settings: Settings, address: IPv4Interface, say: Callable[[str], None]) -> Settings:
    if installed := install_missing():
        say(f"installed with apt-get: {', '.join(installed)}")
    missing = obstacles()
    if missing:
        say(f"no interface {settings.interface}: {'; '.join(missing)}")
        say("goes on with WIREGUARD_RELOAD=off, which keeps the records and the file only")
        return settings.model_copy(update={"wireguard_reload": ReloadMode.OFF})
    raised = hub_device.up(settings.wireguard_config_path, address)
    say(f"interface {settings.interface} {'is up' if raised.created else 'was up already'}")
    for warning in raised.warnings:
        say(f"note: {warning}")
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
    made = {
        int(match[1]): path
        for path in directory.glob("wg*.conf")
        if (match := _OWN_CONFIG.fullmatch(path.name)) is not None
    }
    if made:
        return made[min(made)]
    for name in _NAMES:
        if hub_device.interface_exists(name):
            say(f"{name} is left alone: an interface of that name exists")
        elif lexists(_SYSTEM_CONFIGS / f"{name}.conf"):
            say(f"{name} is left alone: {_SYSTEM_CONFIGS / name}.conf exists")
        else:
            return directory / f"{name}.conf"
    raise StartRefusedError(
        f"{_NAMES[0]} to {_NAMES[-1]} are all in use; name another one with WIREGUARD_CONFIG_PATH"
    )


def _choose_endpoint(settings: Settings, config_path: Path) -> str:
    """Take the endpoint that is set, else one with the config's own port, else with a port that is free."""
    if "wireguard_hub_endpoint" in settings.model_fields_set:
        return settings.wireguard_hub_endpoint
    host = settings.wireguard_hub_endpoint.rpartition(":")[0]
    wanted = settings.listen_port
    port = hub_device.listen_port(config_path) or next(
        (port for port in range(wanted, wanted + _PORTS_TO_TRY) if _is_free(port)), wanted
    )
    return f"{host}:{port}"


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
