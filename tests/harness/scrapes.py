"""What Prometheus would read."""

import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from backend.adapters.metrics.prometheus import PrometheusMetrics
from backend.adapters.metrics.state import Health, State
from backend.loops import Loop
from backend.models.wireguard.health import HealthState, PeerHealth
from backend.services.ports import Metrics
from tests.harness.core import World
from tests.harness.requirements import find_tool, require

Series = tuple[str, frozenset[tuple[str, str]]]


class Scrape:
    """The series of one scrape."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.series: dict[Series, float] = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    @classmethod
    def of(cls, metrics: Metrics) -> "Scrape":
        """Read all metrics."""
        return cls(b"".join(metrics.render()).decode())

    def value(self, name: str, **labels: str) -> float | None:
        """Return the value of one series, None where there is none."""
        return self.series.get((f"wireguard_{name}", frozenset(labels.items())))

    def by(self, name: str, label: str) -> dict[str, float]:
        """Return the values of a metric by one of its labels."""
        return {
            dict(labels)[label]: value
            for (found, labels), value in self.series.items()
            if found == f"wireguard_{name}"
        }

    def label_values(self) -> Iterable[str]:
        """Return the value of each label of each series."""
        return {value for _, labels in self.series for _, value in labels}


@dataclass
class FakeHealth:
    """A hub that has seen these peers."""

    seen: list[PeerHealth] = field(default_factory=list)
    looked_at: float | None = 1_000_000.0

    @property
    def flapping(self) -> int:
        return sum(peer.endpoint_flapping for peer in self.seen)

    def states(self) -> list[HealthState]:
        return [peer.state for peer in self.seen]

    def handshake_ages(self) -> list[float]:
        return [peer.handshake_age for peer in self.seen if peer.handshake_age is not None]

    def peers(self) -> Iterator[PeerHealth]:
        return iter(self.seen)


def watch(
    metrics: PrometheusMetrics,
    world: World,
    health: Health,
    loops: Sequence[Loop] = (),
    last_backup_at: Callable[[], float | None] = lambda: None,
) -> None:
    """Have the metrics read the state of this world at each scrape."""
    metrics.watch(
        State(
            pool=world.pool,
            writer=world.writer,
            reconciler=world.reconciler,
            cache=world.access.cache,
            uses=world.access.uses,
            loops=loops,
            health=health,
            last_backup_at=last_backup_at,
        )
    )


def promtool(text: str) -> tuple[str, int]:
    """Return what `promtool check metrics` says about a scrape, and its status."""
    require("promtool")
    command = [str(find_tool("promtool")), "check", "metrics"]
    checked = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    return checked.stdout + checked.stderr, checked.returncode
