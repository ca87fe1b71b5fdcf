"""The harness keeps what it promises: what is isolated, what is real, and that nothing stays behind."""

import itertools
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from ipaddress import IPv4Address
from pathlib import Path
from types import SimpleNamespace
from typing import Final

import psycopg
import pytest

from tests.harness.hosts import CommandFailedError, Host, LocalHost, connect
from tests.harness.requirements import find_tool, install, require, skipped
from tests.harness.service import ServiceFailedError, ServiceProcess
from tests.harness.torture import Torture
from tests.harness.wireguard import HubInterface, Interface, genkey

_ROOT: Final = Path(__file__).parents[1]


def _processes_in(network: Path) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "ns" / "net").readlink() == network:
                found.append(entry.name)
        except OSError:
            continue
    return found


@pytest.mark.usefixtures("needs_namespaces")
def test_pytest_has_a_network_of_its_own() -> None:
    assert Path("/proc/self/ns/net").readlink() != Path(f"/proc/{os.getppid()}/ns/net").readlink()


@pytest.mark.usefixtures("needs_namespaces")
def test_hosts_reach_each_other_by_their_cable_alone() -> None:
    require("ping")
    with Host("one") as one, Host("two") as two:
        here, there = connect(one, two, "192.0.2.0/30")
        assert (here, there) == (IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2"))
        one.run(["ping", "-c1", "-W5", str(there)])
        with pytest.raises(CommandFailedError):
            LocalHost().run(["ping", "-c1", "-W1", str(there)])


@pytest.mark.usefixtures("needs_namespaces")
def test_closing_a_host_kills_what_runs_on_it() -> None:
    with Host("short-lived") as host:
        network = Path(f"/proc/{host.pid}/ns/net").readlink()
        host.popen(["sleep", "1000"])
        host.run(["sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 &"])
        _wait_until(lambda: len(_processes_in(network)) >= 3)
    assert _processes_in(network) == []


@pytest.mark.usefixtures("needs_namespaces")
def test_a_host_ends_with_its_owner_even_if_that_is_killed() -> None:
    script = (
        "from tests.harness.hosts import Host; host = Host('orphan'); host.popen(['sleep', '1000']);"
        "print(host.pid, flush=True); input()"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=_ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert owner.stdout is not None
        guard = owner.stdout.readline().strip()
        # An open descriptor, so that the kernel can't give the same number to another namespace.
        with Path(f"/proc/{guard}/ns/net").open() as held:
            network = Path(f"/proc/self/fd/{held.fileno()}").readlink()
            # The guard and the command; the guard can't find one that has yet to come in.
            _wait_until(lambda: len(_processes_in(network)) >= 2)
            owner.kill()
            owner.communicate()
            _wait_until(lambda: _processes_in(network) == [])
    finally:
        owner.kill()
        owner.communicate()


def _wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.usefixtures("needs_namespaces")
def test_a_guard_spares_its_owner_and_names_what_it_killed() -> None:
    with Host("guarded") as host:
        script = (
            "import subprocess; from tests.harness.namespaces import Guard; guard = Guard.of_this_process();"
            "child = subprocess.Popen(['sleep', '1000']); print(*guard.close()); child.wait()"
        )
        # The host's own guard is in the same network, so it is among the killed.
        answer = host.run([sys.executable, "-c", script], env=dict(os.environ, PYTHONPATH=str(_ROOT)))
    assert "sleep" in answer.stdout.split()


@pytest.mark.usefixtures("needs_wireguard")
def test_two_hosts_may_have_an_interface_of_the_same_name(tmp_path: Path) -> None:
    with (
        Host("one") as one,
        Host("two") as two,
        Interface(one, "wg0", tmp_path) as first,
        Interface(two, "wg0", tmp_path) as second,
    ):
        first.up()
        second.up()
        _, key = genkey()
        one.run(["wg", "set", "wg0", "peer", key, "allowed-ips", "10.0.0.2/32,10.0.0.3/32"])
        assert first.peers() == {key: {"10.0.0.2/32", "10.0.0.3/32"}}
        assert second.peers() == {}


def test_hub_interface_vanishes_and_comes_back_empty(hub_interface: HubInterface) -> None:
    _, key = genkey()
    hub_interface.host.run(["wg", "set", hub_interface.name, "peer", key])
    assert hub_interface.peers() == {key: set()}
    assert hub_interface.show("public-key") == hub_interface.public_key
    hub_interface.down()
    assert not hub_interface.exists()
    hub_interface.up()
    assert hub_interface.peers() == {}
    assert hub_interface.show("public-key") == "(none)"


def test_hub_interface_config_is_private_and_taken_by_wg(hub_interface: HubInterface) -> None:
    assert hub_interface.config_path.stat().st_mode & 0o777 == 0o600
    assert hub_interface.config_path.stem == hub_interface.name
    hub_interface.configure(hub_interface.config_path.read_text())
    assert hub_interface.show("listen-port") == str(hub_interface.listen_port)


def test_a_command_that_hangs_is_killed_with_its_children() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        LocalHost().run(["sh", "-c", "sleep 1000 & wait"], timeout=0.2)


def test_each_postgres_database_is_empty(postgres_database: str) -> None:
    with psycopg.connect(postgres_database.replace("+psycopg", "")) as connection:
        tables = connection.execute(
            "SELECT count(*) FROM information_schema.tables WHERE table_schema = 'public'"
        ).fetchone()
    assert tables == (0,)


def test_a_missing_tool_is_a_skip_that_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.harness.requirements.find_tool", {"ip": Path("/ip")}.get)
    monkeypatch.setenv("CI", "")
    require("ip")
    with pytest.raises(
        pytest.skip.Exception, match=r"needs wg, postgres \(Debian: postgresql wireguard-tools\)"
    ):
        require("ip", "wg", "postgres")


def test_a_missing_tool_is_a_failure_where_ci_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.harness.requirements.find_tool", {}.get)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=r"needs wg .* CI has to have it"):
        require("wg")


@pytest.fixture
def apt_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put an apt-get on the PATH that fails once; return the log of what it was called with."""
    program, log = tmp_path / "apt-get", tmp_path / "log"
    no_cluster = tmp_path / "postgresql-common" / "createcluster.d" / "none.conf"
    program.write_text(f'#!/bin/sh\necho "$@" $(cat {no_cluster}) >>{log}\n[ "$(grep -c . {log})" -gt 1 ]\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("tests.harness.requirements._NO_CLUSTER", no_cluster)
    monkeypatch.setattr("tests.harness.requirements._UNITS", tmp_path / "units")
    return log


def test_missing_packages_are_installed_without_a_cluster_of_postgresql(
    apt_get: Path, tmp_path: Path
) -> None:
    install(["wg", "postgres", "initdb"])
    asked = "install --yes --quiet --no-install-recommends postgresql wireguard-tools"
    no_cluster = "create_main_cluster = false"
    assert apt_get.read_text().splitlines() == [
        f"{asked} {no_cluster}",
        f"update --quiet {no_cluster}",
        f"{asked} {no_cluster}",
    ]
    assert [path.name for path in (tmp_path / "postgresql-common").iterdir()] == []


def test_prometheus_is_installed_without_a_server_that_runs_now_or_after_a_boot(
    apt_get: Path, tmp_path: Path
) -> None:
    units, wants = tmp_path / "units", tmp_path / "units" / "multi-user.target.wants"
    wants.mkdir(parents=True)
    # As the package does.
    apt_get.with_name("apt-get").write_text(
        f"#!/bin/sh\nreadlink {units}/prometheus.service >{apt_get}\n"
        f"ln -s /lib/systemd/system/prometheus.service {wants}\n"
    )
    install(["promtool"])
    assert apt_get.read_text() == "/dev/null\n"
    assert list(units.rglob("prometheus.service")) == []


def test_what_will_be_skipped_is_said_with_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.harness.requirements.find_tool", lambda name: None if name == "wg" else name)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert skipped() == [
        "the tests that need wg (Debian: wireguard-tools)",
        "the tests with network namespaces or WireGuard interfaces: they need root",
    ]


def test_a_loop_has_few_rounds_and_under_torture_as_many_as_its_share_of_the_time_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = itertools.count(100.0)  # each look at the clock takes a second
    monkeypatch.setattr("tests.harness.torture.time", SimpleNamespace(monotonic=lambda: next(now)))
    torture = Torture()
    assert list(torture.rounds(2)) == [0, 1]
    torture.is_on = True
    torture.divide(seconds=20, tests=2, workers=1)
    assert torture.begin_test()
    assert len(list(torture.rounds(2))) == 2 + 9
    assert torture.begin_test()
    assert len(list(torture.rounds(2))) == 2 + 7
    assert not torture.begin_test()


def test_one_seed_gives_a_test_the_same_random_numbers(
    chance: random.Random, pytestconfig: pytest.Config, request: pytest.FixtureRequest
) -> None:
    again = random.Random(f"{pytestconfig.option.seed} {request.node.nodeid}")  # noqa: S311 - not a secret
    assert chance.random() == again.random()


def test_tools_outside_of_path_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_tool("sh") is None
    assert find_tool("chroot") == Path("/usr/sbin/chroot")


def test_a_service_that_refuses_to_start_shows_why(start_service: Callable[..., ServiceProcess]) -> None:
    with pytest.raises(ServiceFailedError, match="WIREGUARD_IP_POOL"):
        start_service({"WIREGUARD_IP_POOL": "nonsense"})
