"""File and interface brought up to the records: what stops that, and is only a problem."""

from collections.abc import Collection
from pathlib import Path

from backend.errors import RecordsUnavailableError
from backend.models.wireguard.keys import WireGuardPrivateKey
from backend.services.hub.hub_mirror import HubMirror
from backend.services.hub.operator_peers import OperatorPeers
from backend.services.hub.removal_guard import RemovalGuard
from backend.services.ip_pool_manager import IPPoolManager
from backend.services.wireguard_config_manager import WireGuardConfigManager
from tests.harness.fakes import FakeHub


def test_records_that_do_not_say_who_was_removed_stop_a_reconciliation_and_no_more(tmp_path: Path) -> None:
    answers = False

    def removed_keys(keys: Collection[str]) -> Collection[str]:
        if not answers:
            raise RecordsUnavailableError("the records can't be read")
        return keys

    keys = [WireGuardPrivateKey(bytes([number] * 32)) for number in (1, 2)]
    path = tmp_path / "wg0.conf"
    path.touch(mode=0o600)
    path.write_text(f"[Interface]\nPrivateKey = {keys[0].reveal()}\n")
    config = WireGuardConfigManager(path)
    config.add_peer(keys[1].public_key(), ["10.0.0.2/32"])
    before = path.read_bytes()
    pool = IPPoolManager("10.0.0.0/24")
    mirror = HubMirror(config, FakeHub(), OperatorPeers(pool), guard=RemovalGuard(removed_keys))
    mirror.assume(())
    assert mirror.reconcile() == "the records can't be read"
    assert mirror.problem == "the records can't be read"
    assert path.read_bytes() == before
    answers = True
    assert mirror.reconcile() is None
    assert mirror.problem is None
    assert path.read_bytes() != before
    mirror.close()
