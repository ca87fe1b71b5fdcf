"""Hubs for nodes to join: one that asks for proofs, and one that asks for none."""

from collections.abc import Iterator

import pytest

from tests.harness.credentials import with_admin_key
from tests.harness.hosts import LocalHost
from tests.harness.service import ServiceProcess
from tests.harness.three_places import settings_for
from tests.harness.wireguard import HubInterface


@pytest.fixture(scope="module")
def hub(needs_wireguard: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubInterface]:
    """Give the module an interface."""
    with HubInterface(LocalHost(), "wgproof", tmp_path_factory.mktemp("proof"), listen_port=39100) as hub:
        hub.start()
        yield hub


@pytest.fixture(scope="module")
def service(hub: HubInterface) -> Iterator[ServiceProcess]:
    """Give the module a hub that asks for proofs, and has an admin's key."""
    directory = hub.config_path.parent
    settings = settings_for(hub, directory, WIREGUARD_REQUIRE_PROOF="true")
    with ServiceProcess(directory, settings) as service:
        yield with_admin_key(service)


@pytest.fixture(scope="module")
def trusting(
    needs_wireguard: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ServiceProcess, HubInterface]]:
    """Give the module a hub that asks for no proof, and has no interface."""
    directory = tmp_path_factory.mktemp("trusting")
    hub = HubInterface(LocalHost(), "wgtrusting", directory)
    with ServiceProcess(directory, settings_for(hub, directory, WIREGUARD_RELOAD="off")) as service:
        yield with_admin_key(service), hub
