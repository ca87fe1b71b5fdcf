"""The hub's interface, made and deleted by an operator's command: `hub up|down|show`, by ip(8) and wg(8).

No interface and no address is touched that this hub doesn't own: an interface is this hub's if, and only if,
it has the key of the hub's config.
"""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from typing import Final

from backend.adapters.host.programs import ToolRefusedError, find, query, run
from backend.adapters.wireguard.host_link import interface_exists
from backend.errors import ConfigFileError, HubUpdateError
from backend.models.operator_commands import put_key_back
from backend.models.trusted_paths import require_trusted_file
from backend.models.wireguard.interface import InterfaceName
from backend.models.wireguard.keys import WireGuardKey
from backend.services.hub.config_text import ParsedConfig
from backend.services.wireguard_config_manager import WireGuardConfigManager, require_address

# 1500 less 80 for IPv6, UDP and WireGuard's own header, as wg-quick(8) does.
_MTU: Final = 1420
# Either half of the address space stands for a default route, as VPNs set them, and is no network of its own.
_DEFAULT_ROUTE_PREFIX: Final = 1
_IP_FORWARD: Final = Path("/proc/sys/net/ipv4/ip_forward")


class LinkState(StrEnum):
    """Which interface has the hub's name."""

    ABSENT = "absent"
    OURS = "up"
    # It has neither key nor peers yet, so no other program uses it.
    NEW = "there, without a key"
    ANOTHERS = "another one of that name, which isn't this hub's"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class HubState:
    """What can be told about a hub, without any secret."""

    public_key: WireGuardKey
    state: LinkState
    listen_port: int | None
    peers_in_file: int
    peers_on_interface: int | None
    # Why the service doesn't start with it.
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Raised:
    """What `up` did: whether it made the interface, and what the operator should know."""

    created: bool
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Route:
    destination: IPv4Network
    device: str
    gateways: frozenset[IPv4Address]
    local: bool


def up(config_path: Path, address: IPv4Interface, stated_key: WireGuardKey | None = None) -> Raised:
    """Make the hub's interface from its config, or see that it has its address and is up.

    `stated_key` is WIREGUARD_HUB_PUBLIC_KEY, which has to be the file's.
    """
    require_trusted_file(config_path, "WIREGUARD_CONFIG_PATH")
    name, config = _read(config_path, stated_key)
    require_address(config_path, config, address.ip)
    ip, wg = find("ip"), find("wg")
    routes = list(_other_routes(ip, name))
    state = _state(name, config.hub_public_key)
    if state is LinkState.ANOTHERS:
        raise HubUpdateError(
            f"interface {name} exists and isn't this hub's, whose key is {config.hub_public_key}; it was "
            f"left alone. If only the file has another key by now: {put_key_back(name)}. If the interface is "
            "another program's, give the hub another name with WIREGUARD_CONFIG_PATH"
        )
    created = state is LinkState.ABSENT
    if created:
        # Asked of the port itself: wireguard-go takes it in the background, and may say nothing when it
        # can't.
        if not is_free(config.listen_port or 0):
            raise HubUpdateError(
                f"UDP port {config.listen_port} is in use; choose another ListenPort in {config_path} "
                "and the same in WIREGUARD_HUB_ENDPOINT"
            )
        _make_interface(ip, name)
    try:
        if state is not LinkState.OURS:
            run([wg, "setconf", name, "/dev/stdin"], stdin=config.stripped)
        run([ip, "link", "set", "dev", name, "mtu", str(_MTU), "up"])
        warnings = _give_address(ip, name, address, routes)
    except BaseException:
        if created:
            with suppress(HubUpdateError):
                run([ip, "link", "delete", "dev", name])
        raise
    return Raised(created, (*warnings, *_forwarding_hint()))


def down(config_path: Path) -> bool:
    """Take the hub's interface away; return False if there was none."""
    name, config = _read(config_path)
    state = _state(name, config.hub_public_key)
    if state is LinkState.ABSENT:
        return False
    if state is not LinkState.OURS:
        raise HubUpdateError(
            f"interface {name} hasn't the key of {config_path}, so it isn't this hub's; it was left alone"
        )
    # A wireguard-go process ends with its interface.
    run([find("ip"), "link", "delete", "dev", name])
    return True


def show(
    config_path: Path, hub_ip: IPv4Address | None = None, stated_key: WireGuardKey | None = None
) -> HubState:
    """Say what the file holds, and what the interface has, if this process may see it.

    Where the settings WIREGUARD_HUB_IP and WIREGUARD_HUB_PUBLIC_KEY don't fit the file, that's said, too.
    """
    name, config = _read(config_path)
    port = peers = None
    try:
        state = _state(name, config.hub_public_key)
        if state is LinkState.OURS:
            port = int(wg_show(name, "listen-port"))
            peers = len(wg_show(name, "peers").split())
    except HubUpdateError:
        state = LinkState.UNKNOWN
    problems = []
    try:
        _read(config_path, stated_key)
        if hub_ip is not None:
            require_address(config_path, config, hub_ip)
    except ConfigFileError as exc:
        problems.append(str(exc))
    return HubState(
        public_key=config.hub_public_key,
        state=state,
        listen_port=port,
        peers_in_file=len(config.blocks) + len(config.operator_peers),
        peers_on_interface=peers,
        problems=tuple(problems),
    )


def listen_port(config_path: Path) -> int | None:
    """Return the port that the config names, if it does and can be read."""
    with suppress(ConfigFileError):
        return _read(config_path)[1].listen_port
    return None


def wg_show(name: InterfaceName, what: str) -> str:
    """Return what `wg show NAME what` prints; raise HubUpdateError."""
    return run([find("wg"), "show", name, what]).strip()


def is_free(port: int) -> bool:
    """Tell whether no other program listens on a UDP port."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _read(config_path: Path, stated_key: WireGuardKey | None = None) -> tuple[InterfaceName, ParsedConfig]:
    manager = WireGuardConfigManager(config_path, stated_key=stated_key)
    return manager.interface, manager.parsed


def _state(name: InterfaceName, public_key: WireGuardKey) -> LinkState:
    if not interface_exists(name):
        return LinkState.ABSENT
    try:
        found = wg_show(name, "public-key")
    except ToolRefusedError as exc:
        if exc.not_permitted:
            raise
        return LinkState.ANOTHERS  # not a WireGuard interface at all
    if found == "(none)" and not wg_show(name, "peers"):
        return LinkState.NEW
    return LinkState.OURS if found == public_key else LinkState.ANOTHERS


def _make_interface(ip: str, name: InterfaceName) -> None:
    try:
        run([ip, "link", "add", "dev", name, "type", "wireguard"])
    except ToolRefusedError as exc:
        # Any other failure than the kernel's not knowing the type would only come back from wireguard-go,
        # which attaches itself to an existing tun of that name without a word.
        if exc.not_permitted or interface_exists(name):
            raise
        try:
            # In the root directory, or the daemon would keep its own from being unmounted.
            run(["/bin/sh", "-c", 'cd / && exec "$0" "$1"', find("wireguard-go"), name])
        except ToolRefusedError:
            if os.geteuid() == 0:
                raise
            # wireguard-go itself prints a banner that doesn't say so.
            raise HubUpdateError(
                "the kernel has no WireGuard, and wireguard-go takes root; as root run `modprobe wireguard`"
            ) from exc


def _give_address(
    ip: str, name: InterfaceName, address: IPv4Interface, routes: Sequence[_Route]
) -> tuple[str, ...]:
    """Add the hub's address unless it is there, without taking any of the host's own traffic."""
    pool = address.network
    overlaps = (route for route in routes if route.destination.overlaps(pool) and not _is_default(route))
    overlapping = sorted({f"{route.destination} on {route.device}" for route in overlaps})
    holder = _holder(address.ip, routes)
    present = {
        f"{info.get('local')}/{info.get('prefixlen')}"
        for link in query([ip, "-json", "-4", "address", "show", "dev", name])
        for info in link.get("addr_info", ())
    }
    # With a prefix the kernel would add a route to it, and its broadcast address, which may be a host of
    # the network that overlaps.
    own = [f"{address.ip}/32", "noprefixroute"] if overlapping else [str(address)]
    if holder is None and own[0] not in present:
        run([ip, "address", "add", own[0], "dev", name, *own[1:]])
    warnings: list[str] = []
    if overlapping:
        warnings.append(
            f"the pool {pool} overlaps what this host reaches elsewhere ({', '.join(overlapping)}): those "
            "routes stay in force, so peers reach neither this host nor each other"
        )
    if holder:
        warnings.append(
            f"{address.ip} is {holder}: {name} was left without an address, since this host would lose "
            "that connection"
        )
    if warnings:
        other = _free_pool(routes)
        warnings.append(
            f"to choose another pool, set WIREGUARD_IP_POOL={other} and "
            f"WIREGUARD_HUB_IP={other.network_address + 1}"
        )
    return tuple(warnings)


def _is_default(route: _Route) -> bool:
    return route.destination.prefixlen <= _DEFAULT_ROUTE_PREFIX


def _holder(address: IPv4Address, routes: Sequence[_Route]) -> str | None:
    """Return what has the address elsewhere: a gateway of this host, or another of its interfaces."""
    for route in routes:
        if address in route.gateways:
            return f"a gateway of this host on {route.device}"
        if route.local and route.destination == IPv4Network(address):
            return f"this host's own address on {route.device}"
    return None


def _free_pool(routes: Sequence[_Route]) -> IPv4Network:
    candidates = [IPv4Network(f"10.{second}.0.0/24") for second in range(77, 256)]
    taken = [route.destination for route in routes if not _is_default(route)]
    free = (pool for pool in candidates if not any(pool.overlaps(network) for network in taken))
    return next(free, IPv4Network("172.30.77.0/24"))


def _other_routes(ip: str, name: str) -> Iterator[_Route]:
    """Return the host's IPv4 routes, of whatever table, that don't lead through the hub's interface."""
    for entry in query([ip, "-json", "-4", "route", "show", "table", "all"]):
        kind = entry.get("type", "unicast")
        if kind not in {"unicast", "local"}:
            continue  # broadcast and multicast come with the others; blackholes and the like lead nowhere
        hops = entry.get("nexthops") or [entry]
        devices = sorted({str(hop["dev"]) for hop in hops if "dev" in hop})
        if devices == [name]:
            continue
        destination = str(entry.get("dst", "default"))
        gateways = [hop["gateway"] for hop in hops if ":" not in hop.get("gateway", ":")]
        yield _Route(
            destination=IPv4Network("0.0.0.0/0" if destination == "default" else destination),
            device=", ".join(devices) or "no interface",
            gateways=frozenset(map(IPv4Address, gateways)),
            local=kind == "local",
        )


def _forwarding_hint() -> tuple[str, ...]:
    try:
        forwards = _IP_FORWARD.read_text(encoding="ascii").strip() != "0"
    except OSError:
        return ()
    return () if forwards else ("peers reach each other only with `sysctl -w net.ipv4.ip_forward=1`",)
