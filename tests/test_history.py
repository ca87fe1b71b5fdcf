"""Records held against what the hub has reached: who is adopted, when it waits for an operator."""

import json
import logging
import os
from datetime import UTC, datetime
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.errors import PausedError
from backend.models.access.audit import GENESIS, PRUNED
from backend.models.wireguard.interface import InterfacePeer, InterfaceState
from backend.models.wireguard.keys import WireGuardKey, WireGuardPrivateKey
from backend.models.wireguard.peer import Peer
from backend.models.wireguard.records import RecordedState
from backend.services.hub.config_text import PeerBlock
from backend.services.hub.history import adopt
from backend.services.hub.mark import HubMark, Mark
from backend.services.hub.removal_guard import HubPeer, RemovalGuard, find_peers, is_many, stepped_back
from tests.harness.peers import block
from tests.harness.requests import new_key, other_spelling

KEYS = [WireGuardPrivateKey(bytes([n] * 32)).public_key() for n in range(1, 41)]
NOW = datetime(2026, 2, 19, 12, tzinfo=UTC)


def managed(*numbers: int) -> list[PeerBlock]:
    return [block(f"node-{n}", KEYS[n], IPv4Address("10.0.0.2") + n) for n in numbers]


def recorded(number: int) -> Peer:
    return Peer(f"node-{number}", "id", KEYS[number], IPv4Address("10.0.0.2") + number, NOW)


@pytest.mark.parametrize(
    ("unknown", "present", "many"),
    [(5, 5, False), (6, 29, True), (6, 30, False), (6, 6, True), (0, 0, False)],
)
def test_more_than_five_and_more_than_a_fifth_are_many(unknown: int, present: int, *, many: bool) -> None:
    assert is_many(unknown, present) is many


def test_removed_peers_with_tombstones_do_not_pause() -> None:
    found = find_peers(managed(*range(12)), None, ())
    removed = set(KEYS[:12])
    assert RemovalGuard(removed.intersection).check(found, ()) == 0
    removed.remove(KEYS[0])
    assert RemovalGuard(removed.intersection).check(found, ()) == 1
    with pytest.raises(PausedError, match="12 of 12 peers on the hub are in no record"):
        RemovalGuard(lambda _: ()).check(found, ())


def test_peers_that_only_the_interface_has_count_unless_they_are_the_operators() -> None:
    interface = InterfaceState(None, 0, 0, {key: InterfacePeer(()) for key in KEYS[:10]})
    guard = RemovalGuard(lambda _: ())
    assert guard.check(find_peers((), interface, set(KEYS[4:10])), ()) == 4
    with pytest.raises(PausedError):
        guard.check(find_peers((), interface, ()), ())
    assert guard.paused
    assert guard.check(find_peers((), interface, ()), KEYS[:10]) == 0
    assert not guard.paused


def test_a_guard_that_holds_lets_nothing_go_on_until_it_is_released() -> None:
    guard = RemovalGuard(lambda _: ())
    guard.pause_for("older")
    with pytest.raises(PausedError, match="older"):
        guard.check(find_peers((), None, ()), ())
    guard.resume()
    assert guard.check(find_peers((), None, ()), ()) == 0


def test_records_step_back_by_generation_or_by_another_history() -> None:
    mark = Mark(7, 3, "a" * 64)
    assert stepped_back(RecordedState((), 7, 7), mark, "a" * 64) is None
    assert stepped_back(RecordedState((), 7, 7), mark, None) is None
    assert stepped_back(RecordedState((), 9, 7), Mark(7), None) is None
    assert "another database" in (stepped_back(RecordedState((), 9, 7), mark, None) or "")
    assert "generation 6" in (stepped_back(RecordedState((), 6, 6), mark, "a" * 64) or "")
    assert "row 3" in (stepped_back(RecordedState((), 8, 8), mark, "b" * 64) or "")


def test_pruned_row_of_the_mark_does_not_pause() -> None:
    mark = Mark(7, 3, "a" * 64)
    for generation in (7, 9):
        assert stepped_back(RecordedState((), generation, generation), mark, PRUNED) is None
    assert stepped_back(RecordedState((), 6, 6), mark, PRUNED) is not None


def test_an_adopted_peer_keeps_name_key_and_address() -> None:
    adoption = adopt(find_peers(managed(0, 1), None, ()), [recorded(5)])
    assert adoption.refused == []
    assert [(p.node_id, p.wireguard_public_key, str(p.address)) for p in adoption.peers] == [
        ("node-0", KEYS[0], "10.0.0.2"),
        ("node-1", KEYS[1], "10.0.0.3"),
    ]
    assert {peer.public_key for peer in adoption.peers} == {""}


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_no_adoption_gives_a_name_a_key_or_an_address_twice(rows: list[tuple[int, int, int]]) -> None:
    by_key = {
        KEYS[10 + key]: HubPeer(KEYS[10 + key], f"node-{name}", (f"10.0.0.{2 + address}/32",))
        for name, key, address in rows
    }
    known = [recorded(0)]
    adoption = adopt(by_key.values(), known)
    together = [*known, *adoption.peers]
    assert len({peer.node_id for peer in together}) == len(together)
    assert len({peer.address for peer in together}) == len(together)
    assert len({peer.wireguard_public_key for peer in together}) == len(together)
    assert len(adoption.peers) + len(adoption.refused) == len(by_key)


@pytest.mark.parametrize("allowed", [(), ("10.0.0.2/31",), ("10.0.0.2/32", "10.0.0.3/32"), ("fd00::2/128",)])
def test_a_peer_without_the_one_address_that_ours_have_is_not_adopted(allowed: tuple[str, ...]) -> None:
    peer = HubPeer(KEYS[0], None, allowed)
    assert adopt([peer], ()).refused == [peer]


def test_a_mark_is_read_as_it_was_written_and_is_its_owners_alone(tmp_path: Path) -> None:
    mark = HubMark(tmp_path / "wg0.conf")
    assert mark.read() == Mark(0, 0, GENESIS)
    for written in (Mark(123456789, 1, "f" * 64), Mark(7, 2, "0" * 64)):
        mark.write(written)
        assert HubMark(tmp_path / "wg0.conf").read() == written
    assert mark.path.stat().st_mode & 0o777 == 0o600
    assert mark.path.stat().st_size == 256


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "null",
        '{"generation": "x"}',
        "\0" * 256,
        "x" * 5000,
        "[" * 5000,
        f'{{"generation": 1e999, "audit_sequence": 0, "audit_hash": "{GENESIS}"}}',
        f'{{"generation": 1{"0" * 30}, "audit_sequence": 0, "audit_hash": "{GENESIS}"}}',
        f'{{"generation": 0, "audit_sequence": -1, "audit_hash": "{GENESIS}"}}',
        '{"generation": 1, "audit_sequence": 1, "audit_hash": "\\ud800"}',
    ],
)
def test_a_mark_that_cannot_be_read_is_said_and_stops_nothing(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    mark = HubMark(tmp_path / "wg0.conf")
    mark.path.write_text(text)
    assert mark.read() == Mark()
    assert "mark_unreadable" in caplog.text
    mark.write(Mark(5, 0, GENESIS))
    assert json.loads(mark.path.read_text())["generation"] == 5


@pytest.mark.parametrize("what", ["pipe", "directory", "link", "huge"])
def test_unreadable_mark_is_logged_and_does_not_block(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    mark = HubMark(tmp_path / "wg0.conf")
    if what == "pipe":
        os.mkfifo(mark.path)
    elif what == "directory":
        mark.path.mkdir()
    elif what == "link":
        mark.path.symlink_to("/dev/zero")
    else:
        mark.path.touch()
        os.truncate(mark.path, 2**40)
    assert mark.read() == Mark()
    assert "mark_unreadable" in caplog.text
    mark.write(Mark(5, 0, GENESIS))
    assert ("mark_not_written" in caplog.text) is (what != "huge")


def test_a_mark_that_cannot_be_written_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mark = HubMark(tmp_path / "wg0.conf")
    target = tmp_path / "target"
    # A link could lead the service to write to any file.
    mark.path.symlink_to(target)
    with caplog.at_level(logging.WARNING):
        mark.write(Mark(1, 0, GENESIS))
        mark.write(Mark(2, 0, GENESIS))
    assert caplog.text.count("mark_not_written") == 1
    assert not target.exists()


def test_invalid_key_on_the_interface_is_not_adopted() -> None:
    zero = WireGuardKey("A" * 43 + "=")
    assert adopt([HubPeer(zero, None, ("10.0.0.2/32",))], ()).peers == []


def test_a_peer_whose_key_is_a_second_spelling_is_adopted_like_any_other() -> None:
    found = HubPeer(other_spelling(new_key()), "node-1", ("10.0.0.2/32",))
    assert [peer.wireguard_public_key for peer in adopt([found], ()).peers] == [found.public_key]
