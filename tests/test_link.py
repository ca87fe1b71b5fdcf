"""What is said where the hub's interface can't be made."""

import os
from collections.abc import Sequence

import pytest

from backend.adapters.host.programs import ToolRefusedError
from backend.adapters.wireguard import link
from backend.errors import HubUpdateError
from backend.models.wireguard.interface import InterfaceName


@pytest.mark.parametrize(
    ("user", "message"),
    [
        (1000, "wireguard-go takes root; as root run `modprobe wireguard`"),
        (0, "kernel has first class support"),
    ],
)
def test_user_that_wireguard_go_refuses_is_told_how_to_get_the_kernels(
    monkeypatch: pytest.MonkeyPatch, user: int, message: str
) -> None:
    """wireguard-go refuses with a banner that names neither root nor the module."""

    def refuse(_: Sequence[str]) -> str:
        raise ToolRefusedError("kernel has first class support for WireGuard")

    monkeypatch.setattr(link, "run", refuse)
    monkeypatch.setattr(link, "find", lambda name: name)
    monkeypatch.setattr(link, "interface_exists", lambda _: False)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    with pytest.raises(HubUpdateError, match=message):
        link._make_interface("ip", InterfaceName.parse("wgtest"))
