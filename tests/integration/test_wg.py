"""How changes reach a real interface: by a `wg addconf` that waits for its input, or by `wg set`."""

import os
import signal
from contextlib import suppress
from ipaddress import IPv4Address
from pathlib import Path

from backend.adapters.wireguard.wg import WgInterface
from backend.errors import HubUpdateError
from tests.harness.patience import eventually
from tests.harness.peers import peer
from tests.harness.requests import new_key
from tests.harness.wireguard import HubInterface


def waiting(hub: HubInterface) -> list[int]:
    """Return the processes of this test's `wg addconf`."""
    command = f"addconf\0{hub.name}\0".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if command in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue  # it has just ended
    return found


def test_additions_reach_the_interface_also_where_the_waiting_wg_was_killed(
    hub_interface: HubInterface,
) -> None:
    interface = WgInterface(hub_interface.name, IPv4Address("10.0.0.1"))
    peers = [peer(f"node-{number}", new_key(), f"10.0.0.{2 + number}") for number in range(4)]
    for number, added in enumerate(peers):
        interface.change([added], ())()
        assert hub_interface.peers()[added.wireguard_public_key] == {f"10.0.0.{2 + number}/32"}
        eventually(lambda: len(waiting(hub_interface)) == 1)
        if number == 2:
            os.kill(waiting(hub_interface)[0], signal.SIGKILL)
            # Either `wg set` does the work, or the caller hears of it and syncs.
            with suppress(HubUpdateError):
                interface.change([peers[3]], ())()
    interface.change((), peers[:3])()
    assert hub_interface.peers() == {peers[3].wireguard_public_key: {"10.0.0.5/32"}}
    interface.close()
    eventually(lambda: waiting(hub_interface) == [])
