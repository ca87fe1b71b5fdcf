"""A peer's state follows its signs of life, whatever clocks, counters and looks do."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.errors import PeerNotFoundError
from backend.models.wireguard.health import HealthState, RecordedEndpoint
from backend.models.wireguard.interface import InterfacePeer, InterfaceState
from backend.models.wireguard.keys import WireGuardKey, WireGuardPrivateKey
from backend.models.wireguard.peer import Change, Peer
from backend.services.hub import health as module
from backend.services.hub.health import HealthMonitor
from backend.services.hub.operator_peers import OperatorPeers
from backend.services.ip_pool_manager import IPPoolManager
from backend.services.peer_directory import PeerDirectory

HUB, KEY, OTHER = (WireGuardPrivateKey(bytes([n] * 32)).public_key() for n in range(1, 4))
NODE = "node-1"
HOME, AWAY = "198.51.100.7:51820", "[2001:db8::1]:7"


@dataclass
class Clock:
    """Both clocks of the module under test. The wall clock can be set apart from the other."""

    monotonic_now: float = 1_000.0
    wall_offset: float = field(default_factory=lambda: datetime(2026, 6, 1, tzinfo=UTC).timestamp())

    def monotonic(self) -> float:
        return self.monotonic_now

    def time(self) -> float:
        return self.monotonic_now + self.wall_offset


def peer(node_id: str, key: WireGuardKey, number: int, provisioned_at: datetime) -> Peer:
    return Peer(node_id, "libp2p", key, IPv4Address(f"10.0.0.{number}"), provisioned_at)


class Watched:
    """One hub with one peer, which is looked at whenever a test says so."""

    def __init__(self, clock: Clock, **hooks: Callable[..., None]) -> None:
        self.clock = clock
        pool = IPPoolManager("10.0.0.0/24", ["10.0.0.1"])
        self.directory = PeerDirectory(pool, OperatorPeers(pool))
        self.now = datetime.now(UTC).replace(microsecond=0)
        self.directory.load([peer(NODE, KEY, 2, self.now + timedelta(seconds=5))])
        self.monitor = HealthMonitor(self.directory, lambda: HUB, **hooks)  # type: ignore[arg-type] # hooks alone
        self.shown = InterfacePeer(("10.0.0.2/32",))
        self.ifindex = 7

    def look(self, after: float = 5.0, **shown: object) -> HealthState:
        """Show an interface on which the peer has these fields, and return its state."""
        self.clock.monotonic_now += after
        self.shown = replace(self.shown, **shown)  # type: ignore[arg-type] # a field each
        self.monitor.observe(InterfaceState(HUB, 51820, 0, {KEY: self.shown}), self.ifindex)
        return self.state

    @property
    def state(self) -> HealthState:
        return self.monitor.peer(NODE).state

    def handshake(self) -> int:
        """Return the kernel's stamp for a handshake now."""
        return int(self.clock.time())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def hub(clock: Clock) -> Watched:
    return Watched(clock)


@pytest.fixture
def online(hub: Watched) -> Watched:
    hub.look()
    hub.look(latest_handshake=hub.handshake(), received_bytes=180, endpoint=HOME)
    return hub


def test_a_peer_without_a_handshake_was_never_there(hub: Watched) -> None:
    assert hub.state is HealthState.NEVER
    # An initiation that nothing came of counts as received, and teaches the interface an endpoint.
    assert hub.look(received_bytes=148, endpoint=HOME) is HealthState.NEVER
    assert hub.look(600) is HealthState.NEVER
    shown = hub.monitor.peer(NODE)
    assert (shown.handshake_age, shown.silent_seconds) == (None, None)
    assert list(hub.monitor.handshake_ages()) == []
    assert hub.monitor.unrecorded_endpoints() == {}


def test_silence_makes_a_peer_suspect_and_then_offline(online: Watched) -> None:
    assert online.state is HealthState.ONLINE
    assert online.look(74) is HealthState.ONLINE
    assert online.look(1) is HealthState.SUSPECT
    assert online.look(104) is HealthState.SUSPECT
    assert online.look(1) is HealthState.OFFLINE
    assert online.monitor.peer(NODE).silent_seconds == 180
    assert online.look(received_bytes=212) is HealthState.ONLINE


def test_received_data_alone_is_a_sign_of_life(online: Watched) -> None:
    for keepalive in range(100):
        assert online.look(25, received_bytes=212 + 32 * keepalive) is HealthState.ONLINE
    assert online.monitor.peer(NODE).handshake_age == 2500


def test_a_handshake_alone_is_a_sign_of_life(online: Watched) -> None:
    online.look(170)
    assert online.look(latest_handshake=online.handshake()) is HealthState.ONLINE


def test_sent_data_is_no_sign_of_life(online: Watched) -> None:
    online.look(179, sent_bytes=10_000)
    assert online.look(1, sent_bytes=20_000) is HealthState.OFFLINE


@pytest.mark.parametrize("jump", [-86_400.0, 86_400.0, 3e9])
def test_a_wall_clock_that_jumps_changes_no_state(online: Watched, jump: float) -> None:
    online.clock.wall_offset += jump
    assert online.look(60) is HealthState.ONLINE
    assert online.look(latest_handshake=online.handshake()) is HealthState.ONLINE
    assert online.monitor.peer(NODE).handshake_age == 0
    assert online.look(180) is HealthState.OFFLINE


def test_counters_of_a_new_interface_change_no_state(online: Watched) -> None:
    online.look(60)
    online.ifindex += 1
    assert (
        online.look(latest_handshake=0, received_bytes=0, sent_bytes=0, endpoint=None) is HealthState.ONLINE
    )
    # The time without an interface isn't counted, the silence before it is.
    assert online.look(14) is HealthState.ONLINE
    assert online.look(1) is HealthState.SUSPECT
    assert online.monitor.peer(NODE).endpoint == HOME
    assert online.look(105) is HealthState.OFFLINE
    assert online.look(received_bytes=148, latest_handshake=online.handshake()) is HealthState.ONLINE


def test_data_on_a_new_interface_is_a_sign_of_life_though_the_counter_is_lower(online: Watched) -> None:
    online.look(100, received_bytes=10_000)
    online.look(100)
    online.ifindex += 1
    assert online.look(received_bytes=148, latest_handshake=0) is HealthState.ONLINE
    assert online.monitor.peer(NODE).silent_seconds == 0


def test_an_interface_that_was_away_for_hours_makes_no_peer_offline(online: Watched) -> None:
    for _ in range(100):
        online.clock.monotonic_now += 60
        online.monitor.note_failure("no such device", is_away=True)
        assert online.state is HealthState.ONLINE
    online.ifindex += 1
    assert online.look(latest_handshake=0, received_bytes=0) is HealthState.ONLINE


def test_a_look_that_failed_changes_no_state(online: Watched) -> None:
    online.look(70)
    online.clock.monotonic_now += 1_000
    online.monitor.note_failure("`wg` gave up", is_away=False)
    assert online.state is HealthState.ONLINE
    assert (online.monitor.problem, online.monitor.is_away) == ("`wg` gave up", False)
    # The counter tells that the peer was silent all the time, or that it wasn't.
    assert online.look(0) is HealthState.OFFLINE
    assert online.look(0, received_bytes=999) is HealthState.ONLINE


def test_another_programs_interface_tells_nothing_of_our_peers(online: Watched) -> None:
    other = InterfacePeer((), None, 0, AWAY, online.handshake() + 9, 999_999, 7)
    online.clock.monotonic_now += 100
    online.monitor.observe(InterfaceState(OTHER, 51820, 0, {KEY: other}), online.ifindex)
    assert online.monitor.peer(NODE).endpoint == HOME
    assert online.monitor.is_away


def test_a_service_that_starts_takes_the_kernels_word_for_the_first_look(hub: Watched) -> None:
    stamp = hub.handshake() - 1_000
    assert hub.look(0, latest_handshake=stamp, received_bytes=5_000, endpoint=HOME) is HealthState.OFFLINE
    assert hub.monitor.peer(NODE).handshake_age == 1_000
    assert hub.look(received_bytes=5_032) is HealthState.ONLINE


def test_a_handshake_from_the_future_is_none_older_than_the_first_look(hub: Watched) -> None:
    assert hub.look(0, latest_handshake=hub.handshake() + 86_400) is HealthState.ONLINE
    assert hub.monitor.peer(NODE).handshake_age == 0


def test_the_records_tell_after_a_reboot_that_a_peer_was_there(hub: Watched) -> None:
    seen_at = datetime.fromtimestamp(hub.clock.time() - 60, UTC)
    hub.monitor.load({KEY: RecordedEndpoint(HOME, seen_at)})
    # What was received before the first look is no news.
    assert hub.look(0, received_bytes=0) is HealthState.ONLINE
    assert hub.look(75) is HealthState.SUSPECT
    long_ago = Watched(hub.clock)
    seen_at = datetime.fromtimestamp(hub.clock.time() - 86_400, UTC)
    long_ago.monitor.load({KEY: RecordedEndpoint(HOME, seen_at)})
    assert long_ago.look(0) is HealthState.OFFLINE


def test_a_restart_makes_no_peer_online_that_the_kernel_knows_to_be_away(hub: Watched) -> None:
    """The records are up to an hour behind: they take a peer for alive that was recorded within the last."""
    seen_at = datetime.fromtimestamp(hub.clock.time() - 3_000, UTC)
    hub.monitor.load({KEY: RecordedEndpoint(HOME, seen_at)})
    stamp = hub.handshake() - 2_900
    assert hub.look(0, latest_handshake=stamp, received_bytes=5_000, endpoint=HOME) is HealthState.OFFLINE
    # One that made its last handshake shortly before may have spoken since.
    spoke = Watched(hub.clock)
    spoke.monitor.load({KEY: RecordedEndpoint(HOME, seen_at)})
    assert spoke.look(0, latest_handshake=hub.handshake() - 110, endpoint=HOME) is HealthState.ONLINE


def test_an_interface_that_comes_long_after_the_start_makes_no_peer_offline(hub: Watched) -> None:
    seen_at = datetime.fromtimestamp(hub.clock.time() - 60, UTC)
    hub.monitor.load({KEY: RecordedEndpoint(HOME, seen_at)})
    hub.clock.monotonic_now += 600
    hub.monitor.note_failure("no such device", is_away=True)
    assert hub.state is HealthState.ONLINE
    assert hub.look(0) is HealthState.ONLINE
    assert hub.look(180) is HealthState.OFFLINE


def test_a_peer_that_was_away_before_the_start_is_so_before_the_first_look(hub: Watched) -> None:
    seen_at = datetime.fromtimestamp(hub.clock.time() - 86_400, UTC)
    hub.monitor.load({KEY: RecordedEndpoint(HOME, seen_at)})
    hub.monitor.note_failure("no such device", is_away=True)
    assert hub.state is HealthState.OFFLINE


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["look", "fail", "data", "handshake", "new interface", "clock"]),
            st.floats(0, 400, allow_nan=False),
        ),
        max_size=30,
    )
)
def test_no_sequence_makes_a_peer_offline_that_spoke_within_180_s(steps: list[tuple[str, float]]) -> None:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "time", clock)
        hub = Watched(clock)
        hub.look(0)
        hub.look(latest_handshake=hub.handshake(), received_bytes=100)
        spoke = clock.monotonic()
        for step, value in steps:
            clock.monotonic_now += value
            match step:
                case "look":
                    hub.look(0)
                case "fail":
                    hub.monitor.note_failure("no", is_away=False)
                case "data":
                    hub.look(0, received_bytes=hub.shown.received_bytes + 32)
                    spoke = clock.monotonic()
                case "handshake":
                    hub.look(0, latest_handshake=hub.handshake() + 1)
                    spoke = clock.monotonic()
                case "new interface":
                    hub.ifindex += 1
                    hub.look(0, latest_handshake=0, received_bytes=0)
                case "clock":
                    clock.wall_offset += value * 1e6 * (-1 if value > 200 else 1)
            silent = clock.monotonic() - spoke
            assert hub.state is not HealthState.NEVER
            assert hub.state is not HealthState.OFFLINE or silent >= 180


def test_each_listed_peer_is_counted_once(online: Watched) -> None:
    second = peer("node-2", OTHER, 3, online.now)
    online.directory.load([second])
    assert list(online.monitor.states()) == [HealthState.ONLINE, HealthState.NEVER]
    assert [shown.peer.node_id for shown in online.monitor.peers()] == [NODE, "node-2"]
    assert list(online.monitor.handshake_ages()) == [0]


def test_a_removed_peer_is_forgotten_and_its_key_starts_anew(online: Watched) -> None:
    known = online.directory.by_node(NODE)
    assert known is not None
    removal = Change(known, None)
    with online.directory.lock:
        online.directory.begin(removal)
    online.directory.end(removal, applied=True)
    online.clock.monotonic_now += 5
    online.monitor.observe(InterfaceState(HUB, 51820, 0, {}), online.ifindex)
    with pytest.raises(PeerNotFoundError):
        online.monitor.peer(NODE)
    online.directory.load([replace(known, node_id="node-9")])
    shown = InterfacePeer(("10.0.0.2/32",))
    online.monitor.observe(InterfaceState(HUB, 51820, 0, {KEY: shown}), online.ifindex)
    assert online.monitor.peer("node-9").state is HealthState.NEVER
    assert online.monitor.peer("node-9").endpoint is None


def test_a_key_that_was_removed_and_added_between_two_looks_starts_anew(online: Watched) -> None:
    """Else the records would not get the endpoint: the row of the earlier peer had it, and is gone."""
    online.monitor.note_recorded(online.monitor.unrecorded_endpoints())
    known = online.directory.by_node(NODE)
    assert known is not None
    removal = Change(known, None)
    with online.directory.lock:
        online.directory.begin(removal)
    online.directory.end(removal, applied=True)
    online.directory.load([replace(known, provisioned_at=online.now + timedelta(seconds=60))])
    assert online.look(latest_handshake=0, received_bytes=0, endpoint=None) is HealthState.NEVER
    online.look(latest_handshake=online.handshake(), received_bytes=180, endpoint=HOME)
    assert online.monitor.unrecorded_endpoints()[KEY].endpoint == HOME


def test_the_time_to_the_first_handshake_is_told_once(clock: Clock) -> None:
    told: list[float] = []
    hub = Watched(clock, on_first_handshake=told.append)
    hub.look()
    stamp = int(hub.now.timestamp()) + 5
    hub.look(latest_handshake=stamp + 3)
    hub.look(latest_handshake=stamp + 125)
    assert told == [3]


def test_a_peer_from_before_the_start_has_no_first_handshake(clock: Clock) -> None:
    told: list[float] = []
    hub = Watched(clock, on_first_handshake=told.append)
    hub.directory.load([peer("old", OTHER, 3, hub.now - timedelta(days=1))])
    shown = InterfacePeer((), None, 0, HOME, 77)
    for stamp in (0, 77):
        clock.monotonic_now += 5
        hub.monitor.observe(
            InterfaceState(HUB, 51820, 0, {OTHER: replace(shown, latest_handshake=stamp)}), hub.ifindex
        )
    assert told == []
    assert hub.monitor.peer("old").state is HealthState.ONLINE


def test_two_nodes_with_one_key_are_flagged_once_until_it_rests(clock: Clock) -> None:
    flagged: list[str] = []
    hub = Watched(clock, on_flapping=flagged.append)
    for number in range(12):
        hub.look(latest_handshake=1 + number, endpoint=(HOME, AWAY)[number % 2])
    assert flagged == [NODE]
    assert hub.monitor.flapping == 1
    assert hub.monitor.peer(NODE).endpoint_flapping
    hub.look(601)
    assert hub.monitor.flapping == 0
    assert not hub.monitor.peer(NODE).endpoint_flapping


def test_a_node_that_moves_on_is_not_flagged(clock: Clock) -> None:
    flagged: list[str] = []
    hub = Watched(clock, on_flapping=flagged.append)
    for number in range(50):
        hub.look(latest_handshake=1 + number, endpoint=f"198.51.100.{number}:7")
    # And back home once, as each evening.
    hub.look(endpoint="198.51.100.0:7")
    assert flagged == []


def test_a_node_that_seldom_changes_between_two_places_is_not_flagged(clock: Clock) -> None:
    flagged: list[str] = []
    hub = Watched(clock, on_flapping=flagged.append)
    for number in range(12):
        hub.look(301, latest_handshake=1 + number, endpoint=(HOME, AWAY)[number % 2])
    assert flagged == []


def test_only_recent_endpoints_are_given_back_and_none_over_a_newer_one(online: Watched) -> None:
    def lost() -> dict[str, str]:
        return online.monitor.lost_endpoints(InterfaceState(HUB, 51820, 0, {KEY: online.shown}))

    assert lost() == {}
    online.ifindex += 1
    online.look(latest_handshake=0, received_bytes=0, endpoint=None)
    assert lost() == {KEY: HOME}
    # The peer was silent since, so the endpoint ages, whatever is credited to the peer.
    online.clock.monotonic_now += 86_380
    assert lost() == {KEY: HOME}
    online.clock.monotonic_now += 21
    assert lost() == {}


def test_a_link_local_endpoint_is_not_given_back(online: Watched) -> None:
    online.look(endpoint="[fe80::1%eth0]:51820", received_bytes=10_000)
    assert online.monitor.lost_endpoints(InterfaceState(HUB, 51820, 0, {KEY: InterfacePeer(())})) == {}


def test_an_endpoint_whose_age_is_unknown_is_not_given_back(hub: Watched) -> None:
    future = datetime.fromtimestamp(hub.clock.time() + 60, UTC)
    hub.monitor.load({KEY: RecordedEndpoint(HOME, future)})
    hub.look()
    assert hub.monitor.lost_endpoints(InterfaceState(HUB, 51820, 0, {KEY: hub.shown})) == {}


def test_an_endpoint_is_recorded_once_and_again_when_it_is_new_or_an_hour_has_passed(online: Watched) -> None:
    first = online.monitor.unrecorded_endpoints()
    assert first[KEY].endpoint == HOME
    assert first[KEY].seen_at.timestamp() == pytest.approx(online.clock.time(), abs=0.01)
    online.monitor.note_recorded(first)
    assert online.monitor.unrecorded_endpoints() == {}
    online.look(3_500, received_bytes=500)
    assert online.monitor.unrecorded_endpoints() == {}
    online.look(200, received_bytes=600)
    again = online.monitor.unrecorded_endpoints()
    assert again[KEY].endpoint == HOME
    online.monitor.note_recorded(again)
    online.look(received_bytes=700, endpoint=AWAY)
    assert online.monitor.unrecorded_endpoints()[KEY].endpoint == AWAY
