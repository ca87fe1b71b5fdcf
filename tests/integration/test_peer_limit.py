"""The interface takes so many peers and no more: a limit with a name, in place of a `wg` that fails."""

import subprocess
from pathlib import Path

import pytest

from backend.adapters.wireguard import host_link
from backend.adapters.wireguard.host_link import KERNEL_PEERS, WIREGUARD_GO_PEERS, most_peers
from backend.api.errors import answer
from backend.errors import DuplicatePeerError, PeerLimitError
from backend.services.hub.peer_limit import PeerLimit
from tests.harness.fakes import FakeHub
from tests.harness.requests import new_key
from tests.harness.service import StartService
from tests.harness.three_places import settings_for
from tests.harness.wireguard import HubInterface
from tests.test_provisioning_service import World, hub, make_world, world

__all__ = ["hub", "make_world", "world"]


def test_peer_beyond_the_limit_is_refused_before_anything_is_written(world: World, hub: FakeHub) -> None:
    key = new_key()
    with world.path.open("a") as file:
        file.write(f"\n[Peer]\nPublicKey = {new_key()}\nAllowedIPs = 192.168.7.0/24\n")
    world.service._hand_made._limit = PeerLimit("wg0", lambda: 3)
    world.provision("node-1", key)
    world.provision("node-2")
    before, changes = world.text, hub.changes
    with pytest.raises(PeerLimitError) as caught:
        world.provision("node-3")
    assert str(caught.value) == "Interface wg0 takes no more than 3 peers and has them all; delete some first"
    with pytest.raises(PeerLimitError):
        world.service.check()
    assert (world.text, hub.changes) == (before, changes)
    # Who is in already is told so, as ever.
    with pytest.raises(DuplicatePeerError):
        world.provision("node-1", key)
    world.service.deprovision_peer("node-1", 10)
    world.service.check()
    assert str(world.provision("node-3").assigned_ip) == "10.0.0.2"


def test_limit_is_a_503_that_says_when_to_ask_again() -> None:
    response = answer(PeerLimitError("wg0", 65536))
    assert (response.status_code, response.headers["retry-after"]) == (503, "60")
    assert b"no more than 65536 peers" in response.body


def test_limit_is_that_of_what_implements_the_interface(
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
