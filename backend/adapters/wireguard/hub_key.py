"""The hub's config and its key: kept when the config is lost, changed only where an operator says so twice.

Every node that has joined knows the public half. A hub with another key is another hub to them.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Final

from backend.adapters.host.programs import ToolRefusedError, find, query, run
from backend.adapters.wireguard.host_link import interface_exists
from backend.adapters.wireguard.link import wg_show
from backend.errors import HubUpdateError
from backend.models.operator_commands import command
from backend.models.trusted_paths import make_private_directory, require_trusted_file
from backend.models.wireguard.interface import InterfaceName
from backend.models.wireguard.keys import WireGuardKey, WireGuardPrivateKey
from backend.services.hub.staged_file import sync_directory
from backend.services.wireguard_config_manager import WireGuardConfigManager

_NONE: Final = "(none)"


@dataclass(frozen=True, slots=True)
class Consent:
    """What an operator has said: settings, and options of `hub init`."""

    stated_key: WireGuardKey | None = None
    # False: WIREGUARD_RELOAD=off, so that an interface of the hub's name is another program's.
    has_interface: bool = True
    recover: bool = False
    new_key: bool = False


@dataclass(frozen=True, slots=True)
class Made:
    """The result of `init`: the public key if it is the interface's, and the file with its peers."""

    recovered: WireGuardKey | None = None
    noted_peers: Path | None = None


@dataclass(frozen=True, slots=True)
class Replaced:
    """The interface's key before and after; `before` is None where it had none."""

    before: WireGuardKey | None
    after: WireGuardKey


def init(
    config_path: Path,
    address: IPv4Interface,
    port: int,
    consent: Consent,
    recorded_peers: Callable[[], int] = lambda: 0,
) -> Made | None:
    """Write a minimal config where there is none; return what was done, or None where there is one.

    A hub that was here keeps its key: it is taken from the interface, if that is known to be this hub's.
    Raises HubUpdateError, with what to do, where that can't be known, or where the key is gone while there
    are nodes that know it.
    """
    if os.path.lexists(config_path):
        return None
    name = InterfaceName.parse(config_path.stem)
    look = consent.recover or (consent.has_interface and not consent.new_key)
    found = _private_key_of(name) if look else None
    if found is None:
        if not consent.new_key:
            _refuse_to_forget(config_path, consent, recorded_peers)
        return Made() if write_config(config_path, address, port) else None
    public_key = found.public_key()
    _require_consent(name, public_key, config_path, consent)
    lines = _other_addresses(name, address)
    if (mark := _show(name, "fwmark")) != "off":
        lines.append(f"FwMark = {mark}")
    port = int(_show(name, "listen-port")) or port
    noted = _note_peers(name, config_path)
    if not write_config(config_path, address, port, found, lines):
        return None
    return Made(public_key, noted)


def write_config(
    config_path: Path,
    address: IPv4Interface,
    port: int,
    key: WireGuardPrivateKey | None = None,
    lines: Sequence[str] = (),
) -> bool:
    """Write a minimal config where there is none, with a new key unless one is given; return whether it did.

    `init` decides whether a hub was here before, whose key has to be kept.
    """
    text = [
        "[Interface]",
        f"PrivateKey = {(key or WireGuardPrivateKey.generate()).reveal()}",
        f"Address = {address}",
        f"ListenPort = {port}",
        *lines,
        "",
    ]
    try:
        make_private_directory(config_path.parent)
        require_trusted_file(config_path, "WIREGUARD_CONFIG_PATH")
        return _create(config_path, "\n".join(text).encode("ascii"))
    except OSError as exc:
        raise HubUpdateError(f"{config_path} could not be written ({exc.strerror})") from exc


def replace(config_path: Path, stated_key: WireGuardKey | None) -> Replaced | None:
    """Give the hub's interface the file's key in place of its own; return None where it has that already.

    The announced change of the key: the setting has to name the file's key, and the interface has to be this
    hub's by the peers that it has. Raises HubUpdateError otherwise.
    """
    manager = WireGuardConfigManager(config_path)
    config, name = manager.parsed, manager.interface
    new = config.hub_public_key
    if stated_key != new:
        raise HubUpdateError(
            f"the key of {config_path} is {new}; set WIREGUARD_HUB_PUBLIC_KEY to that first, if the hub "
            "shall have it from now on"
        )
    if not interface_exists(name):
        return None
    old = _show(name, "public-key")
    if old == new:
        return None
    peers = set(_show(name, "peers").split())
    ours: set[str] = {peer.public_key for peer in config.blocks}
    ours.update(peer.public_key for peer in config.operator_peers)
    if peers and not peers & ours:
        raise HubUpdateError(
            f"interface {name} has {len(peers)} peer(s) and none of those in {config_path}, so it isn't this "
            "hub's; it was left alone"
        )
    run(
        [find("wg"), "set", name, "private-key", "/dev/stdin"],
        stdin=config.private_key.reveal().encode(),
    )
    return Replaced(None if old == _NONE else WireGuardKey.parse(old), new)


def _private_key_of(name: InterfaceName) -> WireGuardPrivateKey | None:
    """Return the key of the interface of that name, if there is one and it has one."""
    if not interface_exists(name):
        return None
    try:
        key = _show(name, "private-key")
    except HubUpdateError as exc:
        raise HubUpdateError(
            f"interface {name} exists, and whether it has the hub's key can't be seen ({exc}). If it isn't "
            "this hub's, give the hub another name with WIREGUARD_CONFIG_PATH"
        ) from exc
    return None if key == _NONE else WireGuardPrivateKey.parse(key)


def _refuse_to_forget(config_path: Path, consent: Consent, recorded_peers: Callable[[], int]) -> None:
    """Raise HubUpdateError where nodes know a key that is nowhere here."""
    if peers := recorded_peers():
        known = f"the records hold {peers} peer(s) that know this hub's key"
    elif consent.stated_key is not None:
        known = f"WIREGUARD_HUB_PUBLIC_KEY says that this hub's key is {consent.stated_key}"
    else:
        return
    raise HubUpdateError(
        f"{known}, and no interface {config_path.stem} has it any more: put {config_path} back from a "
        f"backup. {command('hub init --new-key')} makes a new key, and then every node needs its "
        "configuration again"
    )


def _require_consent(
    name: InterfaceName, public_key: WireGuardKey, config_path: Path, consent: Consent
) -> None:
    if consent.stated_key not in {None, public_key}:
        raise HubUpdateError(
            f"interface {name} has the key {public_key}, and WIREGUARD_HUB_PUBLIC_KEY names another one, so "
            f"it isn't this hub's. Put {config_path} back from a backup, or give the hub another name with "
            "WIREGUARD_CONFIG_PATH"
        )
    if consent.stated_key is None and not consent.recover:
        raise HubUpdateError(
            f"interface {name} exists and has the key {public_key}. If it is this hub's, "
            f"{command('hub init --recover')} makes {config_path} with that key; if it is another program's, "
            "give the hub another name with WIREGUARD_CONFIG_PATH"
        )


def _other_addresses(name: InterfaceName, address: IPv4Interface) -> list[str]:
    """Return Address lines for what the interface has beside the hub's own address."""
    return [
        f"Address = {info['local']}/{info['prefixlen']}"
        for link in query([find("ip"), "-json", "address", "show", "dev", name])
        for info in link.get("addr_info", ())
        if info.get("scope") == "global" and info.get("local") != str(address.ip)
    ]


def _note_peers(name: InterfaceName, config_path: Path) -> Path | None:
    """Save the interface's configuration, if it has peers: the operator's are nowhere else any more."""
    if not _show(name, "peers"):
        return None
    text = run([find("wg"), "showconf", name])
    path = config_path.with_name(f"{config_path.name}.interface")
    try:
        path.unlink(missing_ok=True)
        _create(path, text.encode())
    except OSError as exc:
        raise HubUpdateError(f"{path} could not be written ({exc.strerror})") from exc
    return path


def _show(name: InterfaceName, what: str) -> str:
    try:
        return wg_show(name, what)
    except ToolRefusedError as exc:
        if exc.not_permitted:
            raise
        raise HubUpdateError(f"interface {name} is no WireGuard interface") from exc


def _create(path: Path, content: bytes) -> bool:
    """Make the whole file at once, 0600; return False if there is something of that name by now."""
    # mkstemp's files are 0600 from birth.
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # A link: unlike a rename it doesn't replace a file that another process has just made.
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        Path(temporary).unlink()
    sync_directory(path.parent)
    return True
