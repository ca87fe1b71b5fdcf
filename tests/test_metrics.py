"""What the metrics count, what they read when Prometheus asks, and what they never show."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from backend.adapters.metrics.prometheus import PrometheusMetrics
from backend.adapters.metrics.state import AGES
from backend.errors import HubUpdateError
from backend.loops import Loop
from backend.models.access.audit import AuditAction, AuditOutcome
from backend.models.access.callers import SERVICE
from backend.models.access.credentials import KeyRequest, Role, TokenRequest
from backend.models.wireguard.health import HealthState, PeerHealth
from backend.models.wireguard.keys import WireGuardKey
from backend.models.wireguard.peer import Peer
from backend.services.hub.drift import DriftKind
from tests.harness.core import NEVER, World
from tests.harness.fakes import FakeHub
from tests.harness.peers import NOON
from tests.harness.requests import new_key
from tests.harness.scrapes import FakeHealth, Scrape, promtool, watch

FIRST = IPv4Address("10.0.0.2")


def peer(number: int, state: HealthState = HealthState.ONLINE, age: float | None = 10.0) -> PeerHealth:
    return PeerHealth(
        peer=Peer(
            f"node-{number}", "libp2p", WireGuardKey(new_key()), IPv4Address("10.0.0.2") + number, NOON
        ),
        state=state,
        endpoint="192.0.2.7:51820",
        received_bytes=1000 + number,
        sent_bytes=2000 + number,
        handshake_age=None if state is HealthState.NEVER else age,
    )


@pytest.fixture
def metrics() -> PrometheusMetrics:
    return PrometheusMetrics(hub="wg0", per_peer=True)


@pytest.fixture
def world(tmp_path: Path, metrics: PrometheusMetrics) -> Iterator[World]:
    world = World(tmp_path, hub=FakeHub(), look_every=NEVER, metrics=metrics)
    yield world
    world.stop()
    world.records.database.close()


def test_two_services_in_one_process_count_apart_and_leave_the_global_registry_alone() -> None:
    """An app around the service may have metrics of its own in the library's registry."""
    before = {family.name for family in REGISTRY.collect()}
    one, other = PrometheusMetrics(hub="wg0"), PrometheusMetrics(hub="wg1")
    one.look_failed()
    assert Scrape.of(one).value("look_failures_total") == 1
    assert Scrape.of(other).value("look_failures_total") == 0
    assert {family.name for family in REGISTRY.collect()} == before


def test_events_are_counted(metrics: PrometheusMetrics) -> None:
    for status in (200, 200, 409):
        metrics.request_answered("POST", "/x/{node_id}", status, 0.02)
    metrics.provision_ended("duplicate")
    metrics.deprovision_ended("not_found")
    metrics.authentication_failed("unknown")
    metrics.batch_begun(3)
    metrics.stage_ended("commit", 0.003)
    metrics.database_used("read", 0.0002)
    metrics.drift_found({DriftKind.MISSING, DriftKind.FILE})
    metrics.drift_mended({DriftKind.MISSING})
    metrics.reloaded(succeeded=True)
    metrics.reloaded(succeeded=False)
    metrics.first_handshake(4.0)
    metrics.endpoints_restored(20)
    metrics.endpoint_flapped()
    found = Scrape.of(metrics)
    route = {"method": "POST", "route": "/x/{node_id}"}
    assert found.value("http_requests_total", **route, status="200") == 2
    assert found.value("http_requests_total", **route, status="409") == 1
    assert found.value("http_request_duration_seconds_count", **route) == 3
    assert found.value("http_request_duration_seconds_bucket", **route, le="0.025") == 3
    assert found.value("http_request_duration_seconds_bucket", **route, le="0.01") == 0
    assert found.by("provisions_total", "outcome") == {
        "provisioned": 0,
        "duplicate": 1,
        "pool_exhausted": 0,
        "refused": 0,
        "unavailable": 0,
        "unknown": 0,
    }
    assert found.value("deprovisions_total", outcome="not_found") == 1
    assert found.by("failed_authentications_total", "reason") == {"unknown": 1}
    assert found.value("batch_changes_sum") == 3
    assert found.value("stage_duration_seconds_count", stage="commit") == 1
    assert found.value("database_duration_seconds_count", operation="read") == 1
    assert found.by("drift_found_total", "kind") == {
        "missing": 1,
        "changed": 0,
        "surplus": 0,
        "settings": 0,
        "file": 1,
    }
    assert found.value("drift_mended_total", kind="missing") == 1
    assert (found.value("reloads_total"), found.value("reload_failures_total")) == (2, 1)
    assert found.value("first_handshake_seconds_sum") == 4
    assert found.value("restored_endpoints_total") == 20
    assert found.value("endpoint_flapping_total") == 1


def test_no_series_is_about_when_a_counter_was_made(metrics: PrometheusMetrics) -> None:
    metrics.provision_ended("provisioned")
    assert "_created" not in Scrape.of(metrics).text


def test_pool_queue_and_hub_are_read_when_prometheus_asks(metrics: PrometheusMetrics, world: World) -> None:
    watch(metrics, world, FakeHealth())
    before = Scrape.of(metrics)
    assert (before.value("hub_reconciled"), before.value("hub_paused")) == (0, 0)
    assert before.value("pool_capacity") == 254
    assert before.by("pool_addresses", "state") == {"allocated": 0, "reserved": 1, "available": 253}
    world.start()
    world.provision("node-1")
    after = Scrape.of(metrics)
    assert after.by("pool_addresses", "state") == {"allocated": 1, "reserved": 1, "available": 252}
    assert (after.value("generation"), after.value("observed_generation")) == (1, 1)
    assert after.value("hub_reconciled") == 1
    assert after.value("queue_changes") == 0
    assert after.value("batch_changes_count") == 1
    for stage in ("prepare", "commit", "apply"):
        assert after.value("stage_duration_seconds_count", stage=stage) == 1


def test_drift_is_counted_when_it_is_found_and_when_it_is_mended(
    metrics: PrometheusMetrics, world: World
) -> None:
    hub = world.hub
    assert isinstance(hub, FakeHub)
    world.start()
    world.provision("node-1")
    assert Scrape.of(metrics).value("reloads_total") == 1
    world.look()
    hub.table.clear()
    hub.table[new_key()] = frozenset()
    hub.failures = 1
    world.observer.look()
    world.look()
    world.look()
    found = Scrape.of(metrics)
    assert found.value("drift_found_total", kind="missing") == 1
    assert found.value("drift_found_total", kind="surplus") == 1
    # The first `wg syncconf` failed.
    assert (found.value("reloads_total"), found.value("reload_failures_total")) == (3, 1)
    assert found.value("drift_mended_total", kind="missing") == 1
    assert found.value("drift_mended_total", kind="surplus") == 1
    assert found.value("drift_mended_total", kind="changed") == 0


def test_blocks_of_ours_that_were_edited_count_as_drift_of_the_file(
    metrics: PrometheusMetrics, world: World
) -> None:
    world.start()
    world.provision("node-1")
    world.path.write_text(world.text.replace("managed peer node-1", "managed peer node-2"))
    world.look()
    found = Scrape.of(metrics)
    assert found.value("drift_found_total", kind="file") == 1
    assert found.value("drift_mended_total", kind="file") == 1


def test_loops_show_a_success_only_after_the_first(metrics: PrometheusMetrics, world: World) -> None:
    done, new = Loop("done", 1.0, lambda: None), Loop("new", 60.0, lambda: None)
    done._call()
    watch(metrics, world, FakeHealth(), [done, new])
    found = Scrape.of(metrics)
    assert found.by("loop_interval_seconds", "loop") == {"done": 1.0, "new": 60.0}
    assert found.by("loop_last_success_timestamp_seconds", "loop") == {"done": done.succeeded_at}
    assert found.by("loop_last_duration_seconds", "loop") == {"done": done.duration_seconds}


def test_credentials_are_counted_by_kind_and_state(metrics: PrometheusMetrics, world: World) -> None:
    now = datetime.now(UTC)
    event = SERVICE.event(now, AuditAction.KEY_MADE, AuditOutcome.ACCEPTED)
    old = now - timedelta(days=2)
    token, _ = TokenRequest(max_uses=1).make("test", now)
    expired, _ = TokenRequest(expires_in=60).make("test", old)
    key, _ = KeyRequest(role=Role.READ).make("test", now)
    revoked, _ = KeyRequest(role=Role.READ).make("test", now)
    for credential in (token, expired, key, revoked):
        world.store.keep_credential(credential, event)
    world.store.revoke_credential(revoked.id, event)
    world.access.cache.refresh()
    # Granted since the row was loaded.
    world.access.uses.count(token.id)
    watch(metrics, world, FakeHealth())
    found = Scrape.of(metrics)
    states = {
        kind: {
            state: found.value("credentials", kind=kind, state=state)
            for state in ("active", "used_up", "expired", "revoked")
        }
        for kind in ("token", "key")
    }
    assert states == {
        "token": {"active": 0, "used_up": 1, "expired": 1, "revoked": 0},
        "key": {"active": 1, "used_up": None, "expired": 0, "revoked": 1},
    }


def test_peers_are_counted_by_state_and_their_ages_without_the_never_seen(
    metrics: PrometheusMetrics, world: World
) -> None:
    ages = [29.0, 30.0, 31.0, 179.0, 200_000.0]
    seen = [peer(number, age=age) for number, age in enumerate(ages)]
    watch(metrics, world, FakeHealth([*seen, peer(9, HealthState.NEVER)]))
    found = Scrape.of(metrics)
    assert found.by("peers", "state") == {"never": 1, "online": 5, "suspect": 0, "offline": 0}
    assert found.value("peers_endpoint_flapping") == 0
    buckets = found.by("handshake_age_seconds_bucket", "le")
    assert (buckets["30.0"], buckets["60.0"], buckets["180.0"], buckets["86400.0"]) == (2, 3, 4, 4)
    assert buckets["+Inf"] == found.value("handshake_age_seconds_count") == 5
    assert found.value("handshake_age_seconds_sum") == sum(ages)
    assert len(buckets) == len(AGES) + 1


def test_series_of_a_peer_have_two_labels_and_are_absent_while_it_was_never_seen(
    metrics: PrometheusMetrics, world: World
) -> None:
    states = (HealthState.ONLINE, HealthState.SUSPECT, HealthState.OFFLINE, HealthState.NEVER)
    watch(metrics, world, FakeHealth([peer(number, state) for number, state in enumerate(states)]))
    found = Scrape.of(metrics)
    assert found.by("peer_receive_bytes_total", "node_id") == {"node-0": 1000, "node-1": 1001, "node-2": 1002}
    assert found.by("peer_transmit_bytes_total", "node_id") == {
        "node-0": 2000,
        "node-1": 2001,
        "node-2": 2002,
    }
    assert found.by("peer_latest_handshake_timestamp_seconds", "node_id") == {
        f"node-{number}": 999_990 for number in range(3)
    }
    assert found.by("peer_online", "node_id") == {"node-0": 1, "node-1": 1, "node-2": 0}
    labels = {name for series, pairs in found.series if "_peer_" in series for name, _ in pairs}
    assert labels == {"hub", "node_id"}
    assert set(found.by("peer_online", "hub")) == {"wg0"}


def test_series_of_peers_are_there_on_request_alone(world: World) -> None:
    metrics = PrometheusMetrics(hub="wg0")
    watch(metrics, world, FakeHealth([peer(1)]))
    assert "node-1" not in Scrape.of(metrics).text


def test_no_piece_has_more_than_500_peers(metrics: PrometheusMetrics, world: World) -> None:
    """Between two pieces the event loop answers other requests."""
    health = FakeHealth([peer(number) for number in range(1200)])
    read = 0

    class Counting(FakeHealth):
        def peers(self) -> Iterator[PeerHealth]:
            nonlocal read
            for one in health.seen:
                read += 1
                yield one

    watch(metrics, world, Counting(health.seen))
    most, last = 0, 0
    for piece in metrics.render():
        most, last = max(most, read - last), read
        assert piece.count(b"\n") <= 501
    assert (read, most) == (1200, 500)


def test_backup_has_a_time_once_there_is_one(metrics: PrometheusMetrics, world: World) -> None:
    watch(metrics, world, FakeHealth())
    assert Scrape.of(metrics).value("backup_last_success_timestamp_seconds") is None
    watch(metrics, world, FakeHealth(), last_backup_at=lambda: 1234.5)
    assert Scrape.of(metrics).value("backup_last_success_timestamp_seconds") == 1234.5


def test_failed_batch_counts_its_stages_too(metrics: PrometheusMetrics, world: World) -> None:
    world.start()
    hub = world.hub
    assert isinstance(hub, FakeHub)
    hub.vanish()
    with pytest.raises(HubUpdateError):
        world.provision("node-1")
    found = Scrape.of(metrics)
    assert found.value("stage_duration_seconds_count", stage="prepare") == 1
    assert found.value("stage_duration_seconds_count", stage="commit") == 0


def test_promtool_has_nothing_to_say_about_every_metric_at_once(
    metrics: PrometheusMetrics, world: World
) -> None:
    loop = Loop("hub", 1.0, lambda: None)
    loop._call()
    watch(metrics, world, FakeHealth([peer(number) for number in range(3)]), [loop])
    metrics.request_answered("GET", "/x/{node_id}", 200, 0.1)
    metrics.authentication_failed("unknown")
    assert promtool(Scrape.of(metrics).text) == ("", 0)


def test_look_that_fails_is_counted(metrics: PrometheusMetrics, world: World) -> None:
    world.start()
    hub = world.hub
    assert isinstance(hub, FakeHub)
    hub.vanish()
    with pytest.raises(HubUpdateError):
        world.observer.look()
    assert Scrape.of(metrics).value("look_failures_total") == 1


def test_health_of_the_service_is_what_the_metrics_need(metrics: PrometheusMetrics, world: World) -> None:
    watch(metrics, world, world.health)
    world.start()
    world.provision("node-1")
    world.observer.look()
    found = Scrape.of(metrics)
    assert found.by("peers", "state") == {"never": 1, "online": 0, "suspect": 0, "offline": 0}
    assert found.value("handshake_age_seconds_count") == 0
    assert "node-1" not in found.text
