"""Another host, and a service that listens on every address."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.harness.hosts import Host, LocalHost, connect
from tests.harness.service import ServiceProcess, StartService
from tests.harness.three_places import settings_for
from tests.harness.wireguard import HubInterface

MANY: Final = {"WIREGUARD_RATE_LIMIT_FAILED_AUTHENTICATION": "10000/minute"}


@pytest.fixture
def outside(needs_namespaces: None) -> Iterator[Host]:
    """Give the test another host, with a cable to this one."""
    with Host("outside") as host:
        yield host


@pytest.fixture
def here(outside: Host) -> str:
    """Return this host's address on that cable."""
    return str(connect(LocalHost(), outside, "192.0.2.0/30")[0])


@pytest.fixture
def service(hub_interface: HubInterface, start_service: StartService, tmp_path: Path) -> ServiceProcess:
    """Start a service that listens everywhere, as one does by mistake."""
    return start_service(settings_for(hub_interface, tmp_path, **MANY), address="0.0.0.0")  # noqa: S104 - for the other host
