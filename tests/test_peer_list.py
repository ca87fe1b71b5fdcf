"""The list of peers as JSON, which is made again only when it has changed."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.harness.core import World


def read(pieces: Iterator[bytes]) -> dict[str, Any]:
    listed: dict[str, Any] = json.loads(b"".join(pieces))
    return listed


@pytest.fixture
def two_peers(world: World) -> World:
    world.provision("node-1")
    world.provision("node-2")
    return world


def begin_list(world: World) -> tuple[Iterator[bytes], bytes]:
    """Begin a list, as a slow reader does; return the rest of it and its first piece."""
    pieces = world.service.list_json()
    return pieces, next(pieces)


def test_a_list_that_was_begun_before_an_addition_is_not_shown_after_it(two_peers: World) -> None:
    pieces, first = begin_list(two_peers)
    two_peers.provision("node-3")
    assert set(read(iter([first, *pieces]))) == {"node-1", "node-2"}
    assert set(read(two_peers.service.list_json())) == {"node-1", "node-2", "node-3"}


def test_a_list_that_was_begun_before_a_removal_is_not_shown_after_it(two_peers: World) -> None:
    pieces, first = begin_list(two_peers)
    two_peers.deprovision("node-2")
    assert set(read(iter([first, *pieces]))) == {"node-1", "node-2"}
    assert set(read(two_peers.service.list_json())) == {"node-1"}


def test_a_list_that_was_read_is_not_shown_after_a_change(two_peers: World) -> None:
    for present in ({"node-1", "node-2", "node-3"}, {"node-1", "node-2"}):
        read(two_peers.service.list_json())
        if "node-3" in present:
            two_peers.provision("node-3")
        else:
            two_peers.deprovision("node-3")
        assert set(read(two_peers.service.list_json())) == present


def test_a_list_that_nothing_has_changed_is_made_once(
    two_peers: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = b"".join(two_peers.service.list_json())

    def make_again(_: object) -> Iterator[str]:
        raise AssertionError("the list is made again")

    monkeypatch.setattr(two_peers.configurations, "json_by_node", make_again)
    assert b"".join(two_peers.service.list_json()) == first
