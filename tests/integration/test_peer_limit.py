"""How many peers an interface takes depends on the program that implements it."""

import subprocess
from pathlib import Path

import pytest

from backend.adapters.wireguard import host_link
from backend.adapters.wireguard.host_link import KERNEL_PEERS, WIREGUARD_GO_PEERS, most_peers
from tests.harness.service import StartService
from tests.harness.three_places import settings_for
from tests.harness.wireguard import HubInterface


def test_limit_depends_on_the_interfaces_implementation(
    hub_interface: HubInterface, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert most_peers(hub_interface.name) == WIREGUARD_GO_PEERS == 65_536
    # One without a socket is the kernel's.
    subprocess.run(["ip", "tuntap", "add", "dev", "wgkernel", "mode", "tun"], check=True)
    try:
        assert most_peers("wgkernel") == KERNEL_PEERS == 1_048_576
    finally:
        subprocess.run(["ip", "link", "delete", "dev", "wgkernel"], check=True)
    # Where there is none, the one that would be made.
    for kernel, most in ((True, KERNEL_PEERS), (False, WIREGUARD_GO_PEERS)):
        monkeypatch.setattr(host_link, "_kernel", lambda kernel=kernel: kernel)
        assert most_peers("wgabsent") == most


@pytest.mark.parametrize(("pool", "warned"), [("10.0.0.0/15", True), ("10.0.0.0/16", False)])
def test_pool_that_is_larger_than_the_interface_is_said_at_the_start(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path, pool: str, warned: bool
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path, WIREGUARD_IP_POOL=pool))
    line = (
        f"pool_larger_than_interface pool={pool} interface={hub_interface.name} consequence="
        "'when there are 65536 peers, the next one gets a 503'"
    )
    assert (line in service.log) is warned
