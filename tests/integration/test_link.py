"""`hub init|up|down` with real interfaces, in pytest's own network namespace."""

import itertools
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Final

import pytest

from backend.adapters.host import programs
from backend.adapters.wireguard import hub_key, link
from backend.adapters.wireguard.host_link import interface_exists
from backend.adapters.wireguard.link import LinkState
from backend.errors import ConfigFileError, HubUpdateError
from backend.models.wireguard.keys import WireGuardKey
from backend.services.wireguard_config_manager import WireGuardConfigManager
from tests.harness.peers import block
from tests.harness.requests import new_key
from tests.harness.wireguard import HubInterface

_NUMBERS: Final = itertools.count()


@dataclass(frozen=True)
class Hub:
    """A config that `init` has made, and the address and name that nobody else in the namespace has."""

    config_path: Path
    address: IPv4Interface
    port: int

    @property
    def name(self) -> str:
        return self.config_path.stem


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def wg(name: str, what: str) -> str:
    return subprocess.run(
        ["wg", "show", name, what], check=True, capture_output=True, text=True
    ).stdout.strip()


def wireguard_go_of(name: str) -> list[int]:
    """Return the processes `wireguard-go NAME`; a zombie has no command line and doesn't count."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdecimal() else []
        except OSError:
            continue
        if words[:1] and words[0].endswith(b"wireguard-go") and name.encode() in words:
            found.append(int(entry.name))
    return found


def gone(name: str) -> bool:
    """Wait for the end of `wireguard-go NAME`."""
    deadline = time.monotonic() + 10
    while wireguard_go_of(name):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture
def hub(needs_wireguard: None, tmp_path: Path) -> Iterator[Hub]:
    """Give the test a hub with a config and no interface yet."""
    number = next(_NUMBERS)
    made = Hub(
        tmp_path / "etc" / f"wgdev{number}.conf", IPv4Interface(f"10.66.{number}.1/24"), 41000 + number
    )
    assert hub_key.write_config(made.config_path, made.address, made.port)
    yield made
    if interface_exists(made.name):
        ip("link", "delete", "dev", made.name)


@pytest.fixture
def other_network(needs_wireguard: None) -> Iterator[Callable[[str], str]]:
    """Give the test a function that gives the host an address in another network; it returns the device."""
    made: list[str] = []

    def join(address: str) -> str:
        name = f"lan{next(_NUMBERS)}"
        ip("tuntap", "add", "dev", name, "mode", "tun")
        made.append(name)
        ip("address", "add", address, "dev", name)
        ip("link", "set", "dev", name, "up")
        return name

    yield join
    for name in made:
        ip("link", "delete", "dev", name)


def test_init_writes_a_file_that_wg_takes_and_only_its_owner_reads(hub: Hub) -> None:
    manager = WireGuardConfigManager(hub.config_path)
    manager.refresh()
    assert hub.config_path.stat().st_mode & 0o777 == 0o600
    assert hub.config_path.parent.stat().st_mode & 0o777 == 0o700
    assert list(hub.config_path.parent.iterdir()) == [hub.config_path]
    assert link.listen_port(hub.config_path) == hub.port


def test_init_twice_keeps_the_first_key(hub: Hub) -> None:
    before = hub.config_path.read_bytes()
    assert not hub_key.write_config(hub.config_path, hub.address, hub.port)
    assert hub.config_path.read_bytes() == before


def test_of_many_inits_at_once_one_makes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "wg0.conf"
    barrier = threading.Barrier(16)
    made: list[bool] = []

    def make() -> None:
        barrier.wait()
        made.append(hub_key.write_config(path, IPv4Interface("10.0.0.1/24"), 51820))

    threads = [threading.Thread(target=make) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False] * 15 + [True]
    assert list(tmp_path.iterdir()) == [path]


def test_init_says_why_it_could_not_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "wg0.conf"
    with pytest.raises(HubUpdateError, match=f"{re.escape(str(path))} could not be written"):
        hub_key.write_config(path, IPv4Interface("10.0.0.1/24"), 51820)


def test_up_makes_an_interface_with_the_configs_key_port_and_peers(hub: Hub) -> None:
    manager = WireGuardConfigManager(hub.config_path)
    key = WireGuardKey.parse(new_key())
    manager.write([block("node-1", key, hub.address.ip + 1)])
    raised = link.up(hub.config_path, hub.address)
    assert raised.created
    assert wg(hub.name, "public-key") == manager.parsed.hub_public_key
    assert wg(hub.name, "listen-port") == str(hub.port)
    assert wg(hub.name, "allowed-ips") == f"{key}\t{hub.address.ip + 1}/32"
    assert f"inet {hub.address} " in ip("address", "show", "dev", hub.name)
    assert "mtu 1420" in ip("link", "show", "up", "dev", hub.name)


def test_up_twice_leaves_the_interface_and_puts_its_address_back(hub: Hub) -> None:
    link.up(hub.config_path, hub.address)
    index = socket.if_nametoindex(hub.name)
    ip("address", "flush", "dev", hub.name)
    ip("link", "set", "dev", hub.name, "down")
    assert not link.up(hub.config_path, hub.address).created
    assert not link.up(hub.config_path, hub.address).created
    assert socket.if_nametoindex(hub.name) == index
    assert ip("-4", "address", "show", "dev", hub.name).count("inet ") == 1
    assert ip("link", "show", "up", "dev", hub.name) != ""


def test_a_terminals_ctrl_c_does_not_reach_the_interface(hub: Hub) -> None:
    link.up(hub.config_path, hub.address)
    (process,) = wireguard_go_of(hub.name)
    # It goes to the terminal's foreground group, which is of the terminal's session.
    assert os.getsid(process) != os.getsid(0)


def test_down_takes_the_interface_and_its_process_away(hub: Hub) -> None:
    link.up(hub.config_path, hub.address)
    assert link.down(hub.config_path)
    assert not interface_exists(hub.name)
    assert gone(hub.name)
    assert not link.down(hub.config_path)


def test_a_foreign_wireguard_interface_of_the_name_is_refused_and_untouched(
    hub_interface: HubInterface, tmp_path: Path
) -> None:
    ours = tmp_path / "ours" / f"{hub_interface.name}.conf"
    hub_key.write_config(ours, IPv4Interface("10.66.250.1/24"), 41999)
    before = ip("-details", "address", "show", "dev", hub_interface.name)
    with pytest.raises(HubUpdateError, match=f"interface {hub_interface.name} exists and isn't this hub's"):
        link.up(ours, IPv4Interface("10.66.250.1/24"))
    with pytest.raises(HubUpdateError, match="isn't this hub's; it was left alone"):
        link.down(ours)
    assert ip("-details", "address", "show", "dev", hub_interface.name) == before
    assert wg(hub_interface.name, "public-key") == hub_interface.public_key
    assert wg(hub_interface.name, "listen-port") == str(hub_interface.listen_port)
    assert link.show(ours).state is LinkState.ANOTHERS


def test_an_interface_that_is_not_wireguard_is_refused_and_untouched(
    other_network: Callable[[str], str], tmp_path: Path
) -> None:
    name = other_network("192.0.2.1/24")
    config_path = tmp_path / f"{name}.conf"
    hub_key.write_config(config_path, IPv4Interface("10.66.251.1/24"), 41998)
    before = ip("-details", "address", "show", "dev", name)
    with pytest.raises(HubUpdateError, match=f"interface {name} exists and isn't this hub's"):
        link.up(config_path, IPv4Interface("10.66.251.1/24"))
    with pytest.raises(HubUpdateError, match="left alone"):
        link.down(config_path)
    assert ip("-details", "address", "show", "dev", name) == before


def test_up_that_fails_half_way_leaves_no_interface(hub: Hub) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind(("", hub.port))
        with pytest.raises(HubUpdateError, match=f"UDP port {hub.port} is in use; choose another ListenPort"):
            link.up(hub.config_path, hub.address)
    assert not interface_exists(hub.name)
    assert gone(hub.name)


def test_a_pool_inside_of_another_network_takes_none_of_its_traffic(
    hub: Hub, other_network: Callable[[str], str]
) -> None:
    device = other_network("10.66.200.7/16")
    neighbour = str(hub.address.ip + 8)
    before = ip("route", "get", neighbour)
    assert f"dev {device}" in before
    overlap, *others = link.up(hub.config_path, hub.address).warnings
    assert f"the pool {hub.address.network} overlaps what this host reaches elsewhere" in overlap
    assert f"10.66.0.0/16 on {device}" in overlap
    assert any("WIREGUARD_IP_POOL=10.77.0.0/24 and WIREGUARD_HUB_IP=10.77.0.1" in text for text in others)
    assert ip("route", "get", neighbour) == before
    assert f"inet {hub.address.ip}/32 " in ip("address", "show", "dev", hub.name)
    assert ip("route", "show", "dev", hub.name) == ""


def test_a_hub_address_that_is_the_hosts_gateway_is_not_taken(
    hub: Hub, other_network: Callable[[str], str]
) -> None:
    device = other_network(f"{hub.address.ip + 99}/24")
    ip("route", "add", "203.0.113.0/24", "via", str(hub.address.ip), "dev", device)
    before = ip("route", "get", "203.0.113.5")
    warnings = link.up(hub.config_path, hub.address).warnings
    assert (
        f"{hub.address.ip} is a gateway of this host on {device}: {hub.name} was left without" in warnings[1]
    )
    assert ip("route", "get", "203.0.113.5") == before
    assert "inet " not in ip("-4", "address", "show", "dev", hub.name)


def test_a_hub_address_that_the_host_has_elsewhere_is_not_taken_again(
    hub: Hub, other_network: Callable[[str], str]
) -> None:
    device = other_network(f"{hub.address.ip}/32")
    warnings = link.up(hub.config_path, hub.address).warnings
    assert f"{hub.address.ip} is this host's own address on {device}" in warnings[1]
    assert "inet " not in ip("-4", "address", "show", "dev", hub.name)


def test_default_routes_are_no_overlap(hub: Hub, other_network: Callable[[str], str]) -> None:
    device = other_network("198.51.100.7/24")
    for route in ("default", "0.0.0.0/1", "128.0.0.0/1"):
        ip("route", "add", route, "dev", device)
    ip("route", "add", "blackhole", "10.0.0.0/8")
    try:
        raised = link.up(hub.config_path, hub.address)
    finally:
        ip("route", "delete", "blackhole", "10.0.0.0/8")
    assert [text for text in raised.warnings if "overlaps" in text] == []


def test_forwarding_is_hinted_at_and_not_changed(hub: Hub) -> None:
    switch = Path("/proc/sys/net/ipv4/ip_forward")
    before = switch.read_text()
    hint = "peers reach each other only with `sysctl -w net.ipv4.ip_forward=1`"
    try:
        switch.write_text("0")
        assert hint in link.up(hub.config_path, hub.address).warnings
        assert switch.read_text() == "0\n"
        switch.write_text("1")
        assert hint not in link.up(hub.config_path, hub.address).warnings
    finally:
        switch.write_text(before)


def test_show_tells_what_the_file_and_the_interface_have(hub: Hub) -> None:
    down = link.show(hub.config_path)
    assert (down.state, down.listen_port, down.peers_on_interface) == (LinkState.ABSENT, None, None)
    link.up(hub.config_path, hub.address)
    manager = WireGuardConfigManager(hub.config_path)
    manager.write([block("node-1", new_key(), "10.66.0.2")])
    up = link.show(hub.config_path)
    assert (up.state, up.listen_port) == (LinkState.OURS, hub.port)
    assert (up.peers_in_file, up.peers_on_interface) == (1, 0)
    private_key = hub.config_path.read_text().splitlines()[1].removeprefix("PrivateKey = ")
    assert private_key not in repr(up)


def test_the_commands_say_what_they_did(hub: Hub, tmp_path: Path) -> None:
    def command(name: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "backend", "hub", name],
            cwd=tmp_path,
            env={
                **{key: value for key, value in os.environ.items() if key.startswith(("PATH", "COVERAGE_"))},
                "PYTHONPATH": str(Path(__file__).parents[2]),
                "WIREGUARD_CONFIG_PATH": str(hub.config_path),
                "WIREGUARD_IP_POOL": str(hub.address.network),
                "WIREGUARD_HUB_IP": str(hub.address.ip),
            },
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout

    assert command("up") == f"interface {hub.name} is up\n"
    assert command("up") == f"interface {hub.name} was up already\n"
    assert f"inet {hub.address} " in ip("address", "show", "dev", hub.name)
    shown = command("show")
    assert f"interface:      {hub.name} (up)\n" in shown
    assert f"listening port: {hub.port}\n" in shown
    assert "peers:          0 in the file, 0 on the interface\n" in shown
    assert command("down") == f"interface {hub.name} is gone\n"
    assert command("down") == f"interface {hub.name} was not there\n"


def test_a_config_without_a_key_makes_nothing(hub: Hub) -> None:
    hub.config_path.write_bytes(b"[Interface]\nListenPort = 1\n")
    with pytest.raises(ConfigFileError):
        link.up(hub.config_path, hub.address)
    assert not interface_exists(hub.name)


def test_what_a_tool_quotes_is_not_repeated() -> None:
    key = new_key()
    with pytest.raises(programs.ToolRefusedError) as caught:
        programs.run(["/bin/sh", "-c", f'echo "Key is not right: \\`{key}\'" >&2; exit 1'])
    assert str(caught.value).endswith("failed: Key is not right: ...")


def test_a_tool_that_is_missing_is_named_with_its_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(programs, "_SYSTEM_PATH", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HubUpdateError, match="`wg` isn't installed; install the package wireguard-tools"):
        programs.find("wg")


def test_a_tool_that_others_could_change_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for directory in (theirs, ours):
        directory.mkdir()
        (directory / "wg").touch(mode=0o755)
    theirs.chmod(0o777)
    monkeypatch.setattr(programs, "_SYSTEM_PATH", str(ours))
    monkeypatch.setenv("PATH", str(theirs))
    assert programs.find("wg") == str(ours / "wg")
    monkeypatch.setattr(programs, "_SYSTEM_PATH", str(tmp_path))
    with pytest.raises(HubUpdateError, match=f"only as {theirs}/wg, which other users could change"):
        programs.find("wg")
    theirs.chmod(0o755)
    (theirs / "wg").chmod(0o757)
    with pytest.raises(HubUpdateError, match=f"only as {theirs}/wg, which other users could change"):
        programs.find("wg")


@pytest.mark.parametrize("path", ["", ".", ":", "bin", "./bin::../bin"])
def test_a_tool_is_never_looked_for_in_the_working_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str
) -> None:
    (tmp_path / "bin").mkdir()
    for place in (tmp_path, tmp_path / "bin"):
        (place / "wg").touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(programs, "_SYSTEM_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("PATH", path)
    with pytest.raises(HubUpdateError, match="`wg` isn't installed"):
        programs.find("wg")


def test_a_tool_in_a_directory_that_cannot_be_entered_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "wg").touch(mode=0o755)

    # What the kernel says to somebody who isn't root.
    def refuse(path: object, **_: object) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(programs, "_SYSTEM_PATH", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(HubUpdateError, match="`wg` isn't installed"):
        programs.find("wg")


def test_a_tool_that_hangs_or_cannot_start_is_said(tmp_path: Path) -> None:
    with pytest.raises(HubUpdateError, match="`sleep 5` didn't end within"):
        programs.run(["/bin/sleep", "5"], timeout=0.05)
    with pytest.raises(HubUpdateError, match="could not be started"):
        programs.run([str(tmp_path)])
