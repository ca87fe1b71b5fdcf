"""What a test needs of the machine: missing is a skip with its reason, or a failure where CI installs it."""

import os
import shutil
from pathlib import Path
from typing import Final, NoReturn

import pytest

# What .ci/run installs, by the package that brings it.
PACKAGES: Final = {
    "ip": "iproute2",
    "ping": "iputils-ping",
    "wg": "wireguard-tools",
    "wireguard-go": "wireguard-go",
    "initdb": "postgresql",
    "postgres": "postgresql",
    "redis-server": "redis-server",
    "systemd-analyze": "systemd",
}


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
    missing = [tool for tool in tools if find_tool(tool) is None]
    if not missing:
        return
    packages = sorted({PACKAGES.get(tool, tool) for tool in missing})
    do_without(f"needs {', '.join(missing)} (Debian: {' '.join(packages)})")


def do_without(reason: str) -> NoReturn:
    """Skip the test for this reason; fail it where `CI=true` says that everything is there."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}, and CI has to have it: see .ci/run", pytrace=False)
    pytest.skip(reason)
