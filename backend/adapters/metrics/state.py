"""What is read when Prometheus asks: the pool, the queue, the hub, its peers, credentials and loops."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from typing import Final, Protocol

from prometheus_client.metrics_core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from backend.models.access.credentials import Credential, CredentialKind, CredentialState
from backend.models.wireguard.health import HealthState, PeerHealth
from backend.services.access.credential_cache import CredentialCache
from backend.services.access.token_uses import TokenUses
from backend.services.hub.reconciler import Reconciler
from backend.services.hub.writer import Writer
from backend.services.ip_pool_manager import IPPoolManager
from backend.services.pieces import in_pieces

# Upper bounds in seconds. A session in use makes a handshake every 120 s, and none lasts longer than 180 s.
AGES: Final = (30, 60, 90, 120, 150, 180, 240, 300, 600, 1800, 3600, 4 * 3600, 24 * 3600)


class Health(Protocol):
    """What the hub has seen of our peers."""

    @property
    def flapping(self) -> int:
        """How many keys have an endpoint that goes back and forth."""

    @property
    def looked_at(self) -> float | None:
        """When the interface was last looked at with success, by time.time()."""

    def states(self) -> Iterable[HealthState]:
        """Return the state of each peer."""

    def handshake_ages(self) -> Iterable[float]:
        """Return the seconds since the last handshake of each peer that ever made one."""

    def peers(self) -> Iterator[PeerHealth]:
        """Return each peer as the last look showed it. The peers may change between two steps."""


class LoopRow(Protocol):
    """A row of loops.py."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def interval_seconds(self) -> float:
        """Its interval."""

    @property
    def succeeded_at(self) -> float | None:
        """When it last succeeded, by time.time()."""

    @property
    def duration_seconds(self) -> float | None:
        """How long it took then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """The parts whose state is shown. Each read is short, and takes no lock that is held across I/O."""

    pool: IPPoolManager
    writer: Writer
    reconciler: Reconciler
    cache: CredentialCache
    uses: TokenUses
    loops: Sequence[LoopRow]
    health: Health
    last_backup_at: Callable[[], float | None] = lambda: None

    def families(self) -> Iterator[Metric | None]:
        """Read everything. None is a moment at which other work may go on."""
        yield from self._read_pool()
        yield from self._read_hub()
        yield from self._read_loops()
        yield from self._read_peers()
        yield from self._read_credentials()
        taken_at = self.last_backup_at()
        yield _gauge(
            "wireguard_backup_last_success_timestamp_seconds",
            "When the last verified backup was made.",
            taken_at,
        )

    def _read_pool(self) -> Iterator[Metric]:
        stats = self.pool.get_pool_stats()
        yield _gauge("wireguard_pool_capacity", "Usable addresses of the pool.", stats["total_addresses"])
        by_state = {state: stats[f"{state}_addresses"] for state in ("allocated", "reserved", "available")}
        yield _gauges("wireguard_pool_addresses", "Usable addresses by state.", "state", by_state)

    def _read_hub(self) -> Iterator[Metric]:
        writer, reconciler = self.writer, self.reconciler
        yield _gauge("wireguard_queue_changes", "Changes that wait for the agent.", writer.queued)
        yield _gauge("wireguard_generation", "The newest generation of the desired state.", writer.generation)
        yield _gauge(
            "wireguard_observed_generation",
            "The last generation that the hub is known to have.",
            writer.observed,
        )
        yield _gauge("wireguard_hub_paused", "1 while an operator has to decide.", int(reconciler.paused))
        yield _gauge(
            "wireguard_hub_reconciled",
            "1 while file and interface are known to equal the records.",
            int(reconciler.problem is None),
        )

    def _read_loops(self) -> Iterator[Metric]:
        yield _gauges(
            "wireguard_loop_interval_seconds",
            "Time between two runs of a loop.",
            "loop",
            {row.name: row.interval_seconds for row in self.loops},
        )
        yield _gauges(
            "wireguard_loop_last_success_timestamp_seconds",
            "When a loop last succeeded, in Unix time.",
            "loop",
            {row.name: row.succeeded_at for row in self.loops},
        )
        yield _gauges(
            "wireguard_loop_last_duration_seconds",
            "How long a loop took when it last succeeded.",
            "loop",
            {row.name: row.duration_seconds for row in self.loops},
        )

    def _read_peers(self) -> Iterator[Metric | None]:
        states: Counter[HealthState] = Counter()
        for found in in_pieces(self.health.states()):
            states.update(found)
            yield None
        by_state = {state.value: states[state] for state in HealthState}
        yield _gauges("wireguard_peers", "Peers by what the hub has seen of them.", "state", by_state)
        yield _gauge(
            "wireguard_peers_endpoint_flapping",
            "Peers whose endpoint goes back and forth, as when two nodes have one key.",
            self.health.flapping,
        )
        counts, total = [0] * (len(AGES) + 1), 0.0
        for piece in in_pieces(self.health.handshake_ages()):
            for age in piece:
                counts[bisect_left(AGES, age)] += 1
            total += sum(piece)
            yield None
        bounds = [*map(floatToGoString, AGES), "+Inf"]
        family = HistogramMetricFamily(
            "wireguard_handshake_age_seconds",
            "Time since the last handshake of each peer that ever made one, at the last look.",
            labels=(),
        )
        family.add_metric((), list(zip(bounds, map(float, accumulate(counts)), strict=True)), total)
        yield family

    def _read_credentials(self) -> Iterator[Metric | None]:
        now = datetime.now(UTC)
        counts: Counter[tuple[CredentialKind, CredentialState]] = Counter()
        for piece in in_pieces(self.cache.all()):
            counts.update((credential.kind, self._state_of(credential, now)) for credential in piece)
            yield None
        family = GaugeMetricFamily(
            "wireguard_credentials", "Recorded credentials by kind and state.", labels=("kind", "state")
        )
        for kind in CredentialKind:
            for state in CredentialState:
                # A key has no number of uses.
                if kind is CredentialKind.TOKEN or state is not CredentialState.USED_UP:
                    family.add_metric((kind, state), counts[kind, state])
        yield family

    def _state_of(self, credential: Credential, now: datetime) -> CredentialState:
        state = credential.state(now)
        # The row in memory may be from before the last uses.
        used_up = state is CredentialState.ACTIVE and self.uses.used_up(credential)
        return CredentialState.USED_UP if used_up else state


def _gauge(name: str, text: str, value: float | None) -> Metric:
    family = GaugeMetricFamily(name, text)
    if value is not None:
        family.add_metric((), value)
    return family


def _gauges(name: str, text: str, label: str, values: Mapping[str, float | None]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=(label,))
    for value_of, value in values.items():
        if value is not None:
            family.add_metric((value_of,), value)
    return family
