"""The service of the working tree beside the service of another commit: `make bench ARGS="--against COMMIT"`.

Both run at once, each with an interface of its own, on the same Python and packages. Only one of them has
work at a time, in the order ABBA. The bench speaks HTTP to them and reads `admin.header`, so the commit may
be any at which the service had these two.
"""

import io
import os
import shutil
import statistics
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from tests.benchmarks.load import Job, Result, generate
from tests.benchmarks.parts import Bench, adding
from tests.harness.command_line import ROOT
from tests.harness.requests import PEERS

_Value = TypeVar("_Value")

_PEERS: Final = 1000
_CLIENTS: Final = 64
_LOOK_SECONDS: Final = 0.03
# Of one core, while a service has no requests.
_IDLE_SHARE: Final = 0.1
_PATIENCE_SECONDS: Final = 3.0


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    In each pair both services have several turns: starts, chunks of requests one after the other, and loads
    of requests by 64 clients.
    """

    starts: int
    chunks: int
    chunk: int
    loads: int
    load: int
    pairs: int = 7


FULL: Final = Scale(starts=2, chunks=8, chunk=25, loads=4, load=800)
QUICK: Final = Scale(starts=1, chunks=4, chunk=20, loads=2, load=400)


@dataclass
class Ratio:
    """One figure, measured in pairs; its ratios are the working tree's by the commit's."""

    name: str
    limit: float
    at_most: bool = True
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)

    @property
    def of_each_pair(self) -> list[float]:
        """The ratios."""
        return [after / before for before, after in zip(self.before, self.after, strict=True)]

    @property
    def passed(self) -> bool:
        """Whether the median keeps to the limit."""
        median = statistics.median(self.of_each_pair)
        return median <= self.limit if self.at_most else median >= self.limit

    def add_pair(
        self, turns: tuple[list[_Value], list[_Value]], figure: Callable[[list[_Value]], float]
    ) -> None:
        """Make one figure of all the turns that each side had."""
        before, after = turns
        self.before.append(figure(before))
        self.after.append(figure(after))

    def summary(self) -> dict[str, Any]:
        """Return it for machines."""
        ratios = self.of_each_pair
        return {
            "name": self.name,
            "before": statistics.median(self.before),
            "after": statistics.median(self.after),
            "median": statistics.median(ratios),
            "min": min(ratios),
            "max": max(ratios),
            "limit": self.limit,
            "at_most": self.at_most,
            "passed": self.passed,
        }


@dataclass
class Provisions:
    """What some provisions in a row took. `cpu_ms` is the service's for each."""

    result: Result
    cpu_ms: float


class Side:
    """One of the two services, with its hub."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def cpu_seconds(self) -> float:
        """Return the CPU time that the service has used: utime and stime of proc_pid_stat(5).

        Read from its CPU clock, clock_getcpuclockid(3), because that one counts in nanoseconds.
        """
        return time.clock_gettime((~self.bench.service.pid << 3) | 2)

    def provision(self, count: int, clients: int) -> Provisions:
        """Provision new nodes, and remove them again."""
        names = self.bench.new_names(count)
        requests = self.bench.shown(adding(names))
        before = self.cpu_seconds()
        result = self._send(requests, clients)
        used = self.cpu_seconds() - before
        removing = [{"method": "DELETE", "path": f"{PEERS}/{name}"} for name in names]
        self._send(self.bench.shown(removing), _CLIENTS)
        return Provisions(result, used / count * 1000)

    def start(self) -> float:
        """Stop the service, empty the interface as a boot does, and return how long a start takes, in ms."""
        self.bench.service.terminate()
        self.bench.hub.down()
        self.bench.hub.start()
        begin = time.perf_counter()
        self.bench.service.start()
        return (time.perf_counter() - begin) * 1000

    def _send(self, requests: list[dict[str, Any]], clients: int) -> Result:
        result = generate(Job(self.bench.service.port, requests, clients=min(clients, len(requests))))
        if set(result.statuses) != {"200"}:
            raise RuntimeError(f"unexpected answers: {result.statuses}")
        return result


def in_turns(
    sides: tuple[Side, Side], pair: int, count: int, act: Callable[[Side], _Value]
) -> tuple[list[_Value], list[_Value]]:
    """Have each side act so many times, in the order ABBA; return what came of it on each side.

    Every second pair begins with the other side.
    """
    found: tuple[list[_Value], list[_Value]] = ([], [])
    for turn in range(pair, pair + count):
        for number in (0, 1) if turn % 2 == 0 else (1, 0):
            wait_until_idle(sides)
            found[number].append(act(sides[number]))
    return found


def wait_until_idle(sides: tuple[Side, Side]) -> None:
    """Let the services finish what follows a burst, such as a comparison of the whole interface."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    used = sum(side.cpu_seconds() for side in sides)
    while time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
        last, used = used, sum(side.cpu_seconds() for side in sides)
        if used - last < _IDLE_SHARE * _LOOK_SECONDS:
            return


def extract_trees(commit: str, directory: Path) -> tuple[Path, Path]:
    """Put the backend of the commit and that of the working tree side by side; raise CalledProcessError."""
    before, after = directory / "tree-before", directory / "tree-after"
    archive = subprocess.run(
        ["git", "archive", "--format=tar", commit, "backend"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(before, filter="data")
    shutil.copytree(ROOT / "backend", after / "backend", ignore=shutil.ignore_patterns("__pycache__"))
    return before, after


@contextmanager
def running(commit: str) -> Iterator[tuple[Side, Side]]:
    """Run both services, neither of which has any peers; raise CalledProcessError for an unknown commit."""
    with (
        tempfile.TemporaryDirectory(prefix="bench-", dir=os.environ.get("BENCH_DIRECTORY")) as name,
        ExitStack() as stack,
    ):
        directory = Path(name)
        benches = []
        for number, tree in enumerate(extract_trees(commit, directory)):
            bench = Bench(directory / f"side{number}", "backend", f"wgside{number}", 38005 + number, tree)
            stack.callback(bench.close)
            benches.append(bench)
        yield Side(benches[0]), Side(benches[1])


def latency_ms(chunks: list[Provisions]) -> float:
    """Return the median, without the first request of each connection, which pays for the connection."""
    return statistics.median(latency for chunk in chunks for latency in chunk.result.latencies_ms[1:])


def cpu_ms(chunks: list[Provisions]) -> float:
    """Return the service's CPU time for one provision."""
    return statistics.fmean(chunk.cpu_ms for chunk in chunks)


def rate(loads: list[Provisions]) -> float:
    """Return the provisions a second."""
    return sum(load.result.answers for load in loads) / sum(load.result.seconds for load in loads)


def measure(commit: str, scale: Scale, say: Callable[[str], object]) -> list[Ratio]:
    """Measure both services; raise CalledProcessError for an unknown commit."""
    empty = Ratio("start with no peers, ms", 1.05)
    full = Ratio(f"start with {_PEERS} peers, ms", 1.05)
    latency = Ratio("sequential provision, p50 in ms", 1.05)
    cpu = Ratio("its CPU time in the service, ms", 1.05)
    throughput = Ratio(f"{_CLIENTS} clients, provisions a second", 0.95, at_most=False)
    shared_cpu = Ratio("CPU time of each in the service, ms", 1.05)
    say("first starts")
    with running(commit) as sides:
        for pair in range(scale.pairs):
            say(f"pair {pair + 1} of {scale.pairs} with no peers")
            empty.add_pair(in_turns(sides, pair, scale.starts, Side.start), statistics.fmean)
        for side in sides:
            side.bench.fill(_PEERS)
        for pair in range(scale.pairs):
            say(f"pair {pair + 1} of {scale.pairs} with {_PEERS} peers")
            # New processes for each pair: the same program is some per cent faster in one than in another.
            full.add_pair(in_turns(sides, pair, scale.starts, Side.start), statistics.fmean)
            # Not measured: what a service does for its first requests alone.
            in_turns(sides, pair, 1, lambda side: side.provision(scale.load, _CLIENTS))
            chunks = in_turns(sides, pair, scale.chunks, lambda side: side.provision(scale.chunk, 1))
            latency.add_pair(chunks, latency_ms)
            cpu.add_pair(chunks, cpu_ms)
            loads = in_turns(sides, pair, scale.loads, lambda side: side.provision(scale.load, _CLIENTS))
            throughput.add_pair(loads, rate)
            shared_cpu.add_pair(loads, cpu_ms)
    return [throughput, shared_cpu, latency, cpu, full, empty]


def table(commit: str, ratios: list[Ratio]) -> str:
    """Return the ratios for a person."""
    lines = [
        f"the working tree against {commit}: {len(ratios[0].before)} pairs at {_PEERS} peers, tree / commit",
        f"{'':<36}{'commit':>10}{'tree':>10}   {'median':>7}{'min':>7}{'max':>7}",
    ]
    for ratio in ratios:
        found = ratio.summary()
        lines.append(
            f"{ratio.name:<36}{found['before']:>10.2f}{found['after']:>10.2f}   "
            f"{found['median']:>7.3f}{found['min']:>7.3f}{found['max']:>7.3f} "
            f"{'<=' if ratio.at_most else '>='} {ratio.limit:.2f}  {'PASS' if ratio.passed else 'FAIL'}"
        )
    return "\n".join(lines)
