"""How changes reach a real interface: by a `wg addconf` that waits for its input, or by `wg set`."""

import os
import signal
from contextlib import suppress
from ipaddress import IPv4Address
from pathlib import Path

from backend.adapters.wireguard.wg import WgInterface
from backend.errors import HubUpdateError
from backend.models.wireguard.keys import WireGuardKey
from tests.harness.patience import eventually
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
    keys = [WireGuardKey.parse(new_key()) for _ in range(4)]
    for number, key in enumerate(keys):
        interface.change({key: IPv4Address("10.0.0.2") + number}, ())()
        assert hub_interface.peers()[key] == {f"10.0.0.{2 + number}/32"}
        eventually(lambda: len(waiting(hub_interface)) == 1)
        if number == 2:
            os.kill(waiting(hub_interface)[0], signal.SIGKILL)
            # Either `wg set` does the work, or the caller hears of it and syncs.
            with suppress(HubUpdateError):
                interface.change({keys[3]: IPv4Address("10.0.0.5")}, ())()
    interface.change({}, keys[:3])()
    assert hub_interface.peers() == {keys[3]: {"10.0.0.5/32"}}
    interface.close()
    eventually(lambda: waiting(hub_interface) == [])
