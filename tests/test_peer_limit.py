"""A full interface refuses further peers with an error of its own, before `wg` fails."""

import pytest

from backend.api.errors import answer
from backend.errors import DuplicatePeerError, PeerLimitError
from backend.services.hub.operator_peers import PeerLimit
from tests.harness.core import Worlds
from tests.harness.fakes import FakeHub
from tests.harness.requests import new_key


def test_peer_beyond_the_limit_is_refused_before_anything_is_written(
    make_world: Worlds, fake_hub: FakeHub
) -> None:
    world = make_world(limit=PeerLimit("wg0", lambda: 3))
    key = new_key()
    world.append(new_key(), "192.168.7.0/24")
    world.look()
    world.provision("node-1", key)
    world.provision("node-2")
    before, changes = world.text, fake_hub.changes
    with pytest.raises(PeerLimitError) as caught:
        world.provision("node-3")
    assert str(caught.value) == "Interface wg0 takes no more than 3 peers and has them all; delete some first"
    with pytest.raises(PeerLimitError):
        world.check()
    assert (world.text, fake_hub.changes) == (before, changes)
    # A node that is known already is told so, as ever.
    with pytest.raises(DuplicatePeerError):
        world.provision("node-1", key)
    world.deprovision("node-1")
    world.check()
    assert str(world.provision("node-3").assigned_ip) == "10.0.0.2"


def test_limit_is_a_503_that_says_when_to_ask_again() -> None:
    response = answer(PeerLimitError("wg0", 65536))
    assert (response.status_code, response.headers["retry-after"]) == (503, "60")
    assert b"no more than 65536 peers" in response.body
