"""What the tests need of the machine.

Run as a program, before the tests: as root on Debian or Ubuntu it installs what is missing; then it says what
will be skipped. In a test, what is missing is a skip with its reason, or a failure with CI=true.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NoReturn

import pytest

from tests.harness.namespaces import Guard

# Debian's and Ubuntu's package for each program.
PACKAGES: Final = {
    "curl": "curl",
    "ip": "iproute2",
    "ping": "iputils-ping",
    "jq": "jq",
    "sqlite3": "sqlite3",
    "mount": "mount",
    "chattr": "e2fsprogs",
    "wg": "wireguard-tools",
    "wg-quick": "wireguard-tools",
    "wireguard-go": "wireguard-go",
    "initdb": "postgresql",
    "postgres": "postgresql",
    "prometheus": "prometheus",
    "promtool": "prometheus",
    # The server's program, see tests/harness/redis.py. The package redis-server would start a service.
    "redis-check-rdb": "redis-tools",
    "systemd-analyze": "systemd",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
}

_NO_CLUSTER: Final = Path("/etc/postgresql-common/createcluster.d/wireguard-provisioning-tests.conf")
# Debian's package of Prometheus starts a server on port 9090, and at each boot again. systemd starts no unit
# whose file here is a link to /dev/null, systemctl(1) `mask`.
_UNITS: Final = Path("/etc/systemd/system")
_SERVER: Final = "prometheus.service"


def find_tool(name: str) -> Path | None:
    """Find a program, also where an unprivileged PATH or Debian's PostgreSQL doesn't show it."""
    newest_first = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"),
        key=lambda path: (len(path.parent.name), path.parent.name),
        reverse=True,
    )
    places = [os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin", *map(str, newest_first)]
    found = shutil.which(name, path=os.pathsep.join(places))
    return Path(found) if found else None


def require(*tools: str) -> None:
    """Skip the test unless all tools are there; fail it where `CI=true` says that they were installed."""
    if missing := _missing(tools):
        do_without(f"needs {_named(missing)}")


def do_without(reason: str) -> NoReturn:
    """Skip the test for this reason; fail it where `CI=true` says that everything is there."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}, and CI has to have it", pytrace=False)
    pytest.skip(reason)


def _missing(tools: Iterable[str]) -> list[str]:
    return [tool for tool in tools if find_tool(tool) is None]


def _named(tools: Iterable[str]) -> str:
    packages = sorted({PACKAGES.get(tool, tool) for tool in tools})
    return f"{', '.join(tools)} (Debian: {' '.join(packages)})"


def skipped() -> list[str]:
    """Return which tests this machine can't run, and why."""
    found = []
    if missing := _missing(PACKAGES):
        found.append(f"the tests that need {_named(missing)}")
    if os.geteuid() != 0:
        found.append("the tests with network namespaces or WireGuard interfaces: they need root")
    elif reason := _no_namespaces():
        found.append(f"the tests with network namespaces or WireGuard interfaces: {reason}")
    elif not Path("/dev/net/tun").exists():
        found.append("the tests with WireGuard interfaces: they need /dev/net/tun")
    return found


def _no_namespaces() -> str:
    try:
        Guard.of_new_namespaces().close()
    except OSError as exc:
        return str(exc)
    return ""


def install(tools: Iterable[str]) -> None:
    """Install the programs' packages with apt. No service of the machine's is made or started."""
    # wireguard-tools recommends a kernel.
    command = ["apt-get", "install", "--yes", "--quiet", "--no-install-recommends"]
    command += sorted({PACKAGES[tool] for tool in tools})
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    with _no_postgresql_cluster(), _no_prometheus_server():
        if subprocess.run(command, env=environment, check=False).returncode != 0:
            # The lists of packages may be missing, or too old.
            subprocess.run(["apt-get", "update", "--quiet"], env=environment, check=False)
            subprocess.run(command, env=environment, check=False)


@contextmanager
def _no_postgresql_cluster() -> Iterator[None]:
    """Keep Debian's package of PostgreSQL from making a cluster that runs from then on."""
    _NO_CLUSTER.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    _NO_CLUSTER.write_text("create_main_cluster = false\n")
    try:
        yield
    finally:
        _NO_CLUSTER.unlink()
        with suppress(OSError):  # it may have been there before
            _NO_CLUSTER.parent.rmdir()


@contextmanager
def _no_prometheus_server() -> Iterator[None]:
    """Keep Debian's package of Prometheus from starting a server, now or at a boot."""
    unit = _UNITS / _SERVER
    if unit.is_symlink() or unit.exists():
        yield
        return
    _UNITS.mkdir(mode=0o755, parents=True, exist_ok=True)
    unit.symlink_to("/dev/null")
    try:
        yield
    finally:
        unit.unlink(missing_ok=True)
        # The package enables it, masked or not.
        for link in _UNITS.glob(f"*.wants/{_SERVER}"):
            link.unlink()


def _main() -> None:
    missing = _missing(PACKAGES)
    if missing and os.geteuid() == 0 and shutil.which("apt-get"):
        install(missing)
    sys.stdout.write(f"The tests need root, /dev/net/tun and {', '.join(PACKAGES)}.\n")
    for tests in skipped():
        sys.stdout.write(f"skipped here: {tests}\n")


if __name__ == "__main__":
    _main()
