"""The instruments for events, and the text that Prometheus is given. A service has a registry of its own."""

import platform
from collections.abc import Callable, Iterable, Iterator
from typing import Final, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric

from backend import __version__
from backend.adapters.metrics.peers import render_peers
from backend.adapters.metrics.state import State
from backend.services.hub.drift import DriftKind
from backend.services.ports import DatabaseOperation, Outcome, Stage

# Upper bounds, in seconds unless the name says otherwise.
_REQUEST: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 45)
_BATCH_CHANGES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_STAGE: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_DATABASE: Final = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
_FIRST_HANDSHAKE: Final = (0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600, 4 * 3600, 24 * 3600)

# The outcomes that each of the two counters has.
_PROVISIONED: Final[tuple[Outcome, ...]] = (
    *("provisioned", "duplicate", "pool_exhausted"),
    *("refused", "unavailable", "unknown"),
)
_DEPROVISIONED: Final[tuple[Outcome, ...]] = (
    *("deprovisioned", "not_found"),
    *("refused", "unavailable", "unknown"),
)


class _Instruments:
    """All instruments for events. What is read at the time of a scrape is in state.py and peers.py."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, text, labels, registry=registry, buckets=buckets)

        self.requests = counter(
            "wireguard_http_requests_total",
            "Requests over HTTP; the route is its template, unmatched where there is none.",
            *("method", "route", "status"),
        )
        self.request_seconds = histogram(
            "wireguard_http_request_duration_seconds",
            "Time from a request's head to its answer.",
            _REQUEST,
            *("method", "route"),
        )
        self.provisions = counter(
            "wireguard_provisions_total", "Requests to provision, by how they ended.", "outcome"
        )
        self.deprovisions = counter(
            "wireguard_deprovisions_total", "Requests to deprovision, by how they ended.", "outcome"
        )
        self.failed_authentications = counter(
            "wireguard_failed_authentications_total",
            "Attempts to authenticate that failed, by the audit log's word for the reason.",
            "reason",
        )
        self.batch_changes = histogram("wireguard_batch_changes", "Changes in a batch.", _BATCH_CHANGES)
        self.stage_seconds = histogram(
            "wireguard_stage_duration_seconds", "Time of each stage of a batch.", _STAGE, "stage"
        )
        self.database_seconds = histogram(
            "wireguard_database_duration_seconds",
            "Time of each transaction of the records.",
            _DATABASE,
            "operation",
        )
        self.drift_found = counter(
            "wireguard_drift_found_total",
            "Comparisons that found a difference from the records, by its kind.",
            "kind",
        )
        self.drift_mended = counter(
            "wireguard_drift_mended_total",
            "Reconciliations that mended such a difference, by its kind.",
            "kind",
        )
        self.reloads = counter("wireguard_reloads_total", "Runs of `wg syncconf` with the whole file.")
        self.reload_failures = counter(
            "wireguard_reload_failures_total", "Runs of `wg syncconf` that failed, or left a difference."
        )
        self.look_failures = counter("wireguard_look_failures_total", "Runs of `wg show dump` that failed.")
        self.first_handshake_seconds = histogram(
            "wireguard_first_handshake_seconds",
            "Time from a peer's provision to its first handshake.",
            _FIRST_HANDSHAKE,
        )
        self.restored_endpoints = counter(
            "wireguard_restored_endpoints_total", "Endpoints given back to an interface that had lost them."
        )
        self.endpoint_flapping = counter(
            "wireguard_endpoint_flapping_total",
            "Times a key was flagged because its endpoint goes back and forth.",
        )
        self.start_time = Gauge(
            "wireguard_start_time_seconds", "When the service started, in Unix time.", registry=registry
        )
        self.build_info = Gauge(
            "wireguard_build_info",
            "The version of the service and of Python; always 1.",
            ("version", "python"),
            registry=registry,
        )


class PrometheusMetrics:
    """Counts events in a registry of its own, never in the library's global one."""

    def __init__(self, *, hub: str, per_peer: bool = False) -> None:
        """`hub` is the interface's name, the label of the series for single peers."""
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        made = self._made = _Instruments(self._registry)
        made.start_time.set_to_current_time()
        made.build_info.labels(__version__, platform.python_version()).set(1)
        self._hub = hub
        self._per_peer = per_peer
        self._state: State | None = None
        # Looking a child up by its labels costs more than counting.
        self._of_request: dict[tuple[str, str, int], tuple[Callable[[], None], Callable[[float], None]]] = {}
        self._of_stage = {name: made.stage_seconds.labels(name) for name in get_args(Stage)}
        self._of_operation = {
            name: made.database_seconds.labels(name) for name in get_args(DatabaseOperation)
        }
        # From 0 on, because Prometheus doesn't see a counter grow whose first value is 1.
        for counter, values in (
            (made.drift_found, DriftKind),
            (made.drift_mended, DriftKind),
            (made.provisions, _PROVISIONED),
            (made.deprovisions, _DEPROVISIONED),
        ):
            for value in values:
                counter.labels(value)

    def watch(self, state: State) -> None:
        """Read this state at each scrape from now on."""
        self._state = state

    def render(self) -> Iterator[bytes]:
        """Return all metrics in the text format 0.0.4, in pieces of at most 500 peers; some are empty."""
        for family in self._registry.collect():
            yield _text(family)
        if self._state is None:
            return
        for read in self._state.families():
            yield b"" if read is None else _text(read)
        if self._per_peer:
            yield from render_peers(self._state.health, self._hub)

    def request_answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request over HTTP."""
        known = self._of_request.get((method, route, status))
        if known is None:
            known = self._of_request[method, route, status] = (
                self._made.requests.labels(method, route, status).inc,
                self._made.request_seconds.labels(method, route).observe,
            )
        count, observe = known
        count()
        observe(seconds)

    def provision_ended(self, outcome: Outcome) -> None:
        """Count a request to provision."""
        self._made.provisions.labels(outcome).inc()

    def deprovision_ended(self, outcome: Outcome) -> None:
        """Count a request to deprovision."""
        self._made.deprovisions.labels(outcome).inc()

    def authentication_failed(self, reason: str) -> None:
        """Count a failed authentication."""
        self._made.failed_authentications.labels(reason).inc()

    def batch_begun(self, changes: int) -> None:
        """Note a batch's size."""
        self._made.batch_changes.observe(changes)

    def stage_ended(self, stage: Stage, seconds: float) -> None:
        """Note how long a stage took."""
        self._of_stage[stage].observe(seconds)

    def database_used(self, operation: DatabaseOperation, seconds: float) -> None:
        """Note how long a transaction took."""
        self._of_operation[operation].observe(seconds)

    def drift_found(self, kinds: Iterable[DriftKind]) -> None:
        """Count one comparison with these kinds of drift."""
        for kind in kinds:
            self._made.drift_found.labels(kind).inc()

    def drift_mended(self, kinds: Iterable[DriftKind]) -> None:
        """Count one reconciliation that mended these kinds of drift."""
        for kind in kinds:
            self._made.drift_mended.labels(kind).inc()

    def reloaded(self, *, succeeded: bool) -> None:
        """Count one `wg syncconf`."""
        self._made.reloads.inc()
        if not succeeded:
            self._made.reload_failures.inc()

    def look_failed(self) -> None:
        """Count one `wg show dump` that failed."""
        self._made.look_failures.inc()

    def first_handshake(self, seconds: float) -> None:
        """Note how long a peer's first handshake took."""
        self._made.first_handshake_seconds.observe(seconds)

    def endpoints_restored(self, count: int) -> None:
        """Count endpoints that were given back."""
        self._made.restored_endpoints.inc(count)

    def endpoint_flapped(self) -> None:
        """Count one key that was flagged."""
        self._made.endpoint_flapping.inc()


class _One:
    """One family, in the shape that the library renders."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterable[Metric]:
        return (self._family,)


def _text(family: Metric) -> bytes:
    # The library also makes a series `_created` for each counter and histogram, which this format has no
    # place for. Its switch for them is global, and another part of the process may want them.
    family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
    return generate_latest(_One(family))
