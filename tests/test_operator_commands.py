"""What messages tell an operator to type."""

import re
from pathlib import Path

import pytest

from backend.models.operator_commands import VARIABLE, bring_up, command, put_key_back
from backend.services.hub.interface_observer import InterfaceObserver
from backend.services.hub.operator_peers import OperatorPeers
from backend.services.hub.reconciler import Reconciler
from backend.services.ip_pool_manager import IPPoolManager
from backend.services.wireguard_config_manager import WireGuardConfigManager
from tests.harness.fakes import FakeHub

DEPLOY = Path(__file__).parent.parent / "deploy"
CONFIG = "[Interface]\nPrivateKey = iB4Y8yRkAyI8mdFBYCpOUXLTn1kAbGbyGmtXGvRZ/F4=\n"


@pytest.fixture
def missing(tmp_path: Path) -> Reconciler:
    """Return the reconciler of a hub whose interface has vanished."""
    path = tmp_path / "wg0.conf"
    path.touch(mode=0o600)
    path.write_text(CONFIG)
    hub = FakeHub()
    hub.vanish()
    operator_peers = OperatorPeers(IPPoolManager("10.0.0.0/24"))
    return Reconciler(WireGuardConfigManager(path), hub, operator_peers, InterfaceObserver(hub))


def test_missing_interface_is_brought_up_by_the_program_that_made_it(missing: Reconciler) -> None:
    problem = missing.reconcile()
    assert problem is not None
    assert problem.endswith("bring it up with `python -m backend hub up` or `wg-quick up wg0`")


def test_under_the_unit_no_message_recommends_wg_quick(
    missing: Reconciler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`wg-quick` would run, as root, the hooks of a file that the service may write."""
    monkeypatch.setenv(VARIABLE, "wireguard-provisioning")
    problem = missing.reconcile()
    assert problem is not None
    assert problem.endswith("bring it up with `wireguard-provisioning hub up`")
    assert "wg-quick" not in bring_up("wg0")
    assert command("hub show") == "`wireguard-provisioning hub show`"


def test_unit_and_wrapper_name_the_command_that_is_installed() -> None:
    line = f"{VARIABLE}=wireguard-provisioning\n"
    assert f"\nEnvironment={line}" in (DEPLOY / "wireguard-provisioning.service").read_text()
    assert f"\nexport {line}" in (DEPLOY / "wireguard-provisioning").read_text()
    assert (DEPLOY / "wireguard-provisioning").is_file()


def test_lost_key_is_to_be_put_back_and_never_made_anew() -> None:
    advice = put_key_back("wg7")
    assert "`wg show wg7 private-key`" in advice
    assert re.search("genkey|hub init", advice) is None
