"""The routes behind the hub's door."""

import pytest
from fastapi import APIRouter

from backend.api.door import DoorRoute, Reader


def test_endpoint_that_does_not_say_who_may_call_it_is_refused() -> None:
    """Every valid credential could call it, a node's token too."""
    router = APIRouter(prefix="/wireguard", route_class=DoorRoute)

    with pytest.raises(TypeError, match="/wireguard/secrets: no argument of the endpoint says"):

        @router.get("/secrets")
        async def read_secrets() -> str:
            return ""

    @router.get("/peers")
    async def read_peers(_: Reader) -> str:
        return ""

    assert [getattr(route, "path", None) for route in router.routes] == ["/wireguard/peers"]
