"""`make bench`: the service against the limit, in one run, as ratios.

    python -m tests.benchmarks [--quick] [--json]

Everything runs in namespaces of its own: a wireguard-go hub, the service as a real process over a real
socket, a no-op FastAPI app on the same server, and a load generator in a process of its own. What is
compared is measured in turns, so that a machine that is slow for a while is slow for both.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.load import Job
from tests.benchmarks.parts import PEERS, Bench, Floor, adding, load, noop_server
from tests.harness.hosts import LocalHost
from tests.harness.namespaces import Guard, enter_new_namespaces
from tests.harness.requests import provision_body
from tests.harness.service import ServiceProcess
from tests.harness.wireguard import Interface

# The no-op's latency on the machine for which the goal of GET /peers was set, milliseconds.
_REFERENCE_NOOP_MS: Final = 0.09


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    sizes: tuple[int, ...]
    turns: int
    load_sizes: tuple[int, ...]
    load_turns: int
    batch: int
    repeats: int
    quick: bool = False


FULL: Final = Scale((100, 1000, 5000, 10000), 60, (1000, 5000), 5, 1500, 3)
QUICK: Final = Scale((100, 1000, 10000), 20, (1000,), 2, 800, 1, quick=True)


@dataclass
class Goal:
    """One line of the verdict."""

    goal: str
    measured: float
    limit: float
    at_most: bool = True
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether it is met."""
        return self.measured <= self.limit if self.at_most else self.measured >= self.limit


def timed(act: Callable[[], object]) -> float:
    """Return how long it took, in milliseconds."""
    start = time.perf_counter()
    act()
    return (time.perf_counter() - start) * 1000


def median(values: list[float]) -> float:
    return statistics.median(values)


def sequential(bench: Bench, floor: Floor, noop: int, turns: int) -> dict[str, float]:
    """Measure one request at a time, and what it is compared with, in turns; medians in milliseconds."""
    noop_job = {"method": "POST", "path": "/noop", "body": provision_body("node-1")}
    values: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        values.setdefault(name, []).append(value)

    chunk = 5
    for turn in range(turns // chunk):
        names = bench.new_names(chunk)
        added = bench.send(adding(names), clients=1)
        deleted = bench.send([{"method": "DELETE", "path": f"{PEERS}/{name}"} for name in names], clients=1)
        assert added is not None
        assert deleted is not None
        # The first request of a connection pays for the connection.
        for latency in added.latencies_ms[1:]:
            note("add", latency)
        for latency in deleted.latencies_ms[1:]:
            note("delete", latency)
        for latency in load(Job(noop, [noop_job] * chunk, clients=1)).latencies_ms[1:]:
            note("noop", latency)
        for _ in range(chunk):
            note("floor", timed(floor.one_peer))
            note("commit", timed(floor.commit))
            note("file", timed(floor.replace_file))
            note("wg set", timed(floor.wg_set))
            note("wg remove", timed(floor.wg_remove))
        if turn % 2 == 0:
            note("syncconf", timed(floor.syncconf))
        # The service looks at the interface again after a burst; that is not what this is about.
        time.sleep(0.02)
    return {name: median(found) for name, found in values.items()}


def shared(bench: Bench, noop: int, scale: Scale) -> dict[str, float]:
    """Measure 64 clients at once, against the no-op with the same body, in turns; answers a second."""
    rates: dict[str, list[float]] = {}
    body = provision_body("node-1")
    noop_job = Job(noop, [{"method": "POST", "path": "/noop", "body": body}], repeat_seconds=1.5)
    for _ in range(scale.load_turns):
        names = bench.new_names(scale.batch)
        result = bench.send(adding(names))
        assert result is not None
        rates.setdefault("add", []).append(result.rate)
        idle = load(noop_job)
        rates.setdefault("noop", []).append(idle.rate)
        rates.setdefault("generator", []).append(idle.cpu)
        result = bench.send([{"method": "DELETE", "path": f"{PEERS}/{name}"} for name in names])
        assert result is not None
        rates.setdefault("delete", []).append(result.rate)
    return {name: median(found) for name, found in rates.items()}


def storm(bench: Bench, noop: int, scale: Scale) -> dict[str, float]:
    """Measure known nodes that come again, reads, and the whole list while others go on."""
    known = bench.new_names(1000)
    requests = adding(known)
    bench.send(requests)
    bench.names += known
    noop_job = Job(
        noop, [{"method": "POST", "path": "/noop", "body": provision_body("node-1")}], repeat_seconds=1.5
    )
    again = Job(bench.service.port, bench.shown(requests), repeat_seconds=1.5)
    one = Job(
        bench.service.port,
        bench.shown([{"method": "GET", "path": f"{PEERS}/{name}"} for name in known]),
        repeat_seconds=1.5,
    )
    values: dict[str, list[float]] = {}
    for _ in range(scale.load_turns):
        for name, job in (("noop", noop_job), ("again", again), ("one", one)):
            result = load(job)
            values.setdefault(name, []).append(result.rate)
    (listing,) = bench.shown([{"method": "GET", "path": PEERS}])
    alone = load(Job(bench.service.port, [listing] * 20, clients=1))
    quiet = load(Job(noop, [{**noop_job.requests[0]}] * 200, clients=1))
    # A reader of small things, while somebody asks for the whole list again and again.
    both = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.load"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert both.stdin is not None
    both.stdin.write(json.dumps(asdict(Job(bench.service.port, [listing], clients=1, repeat_seconds=3))))
    both.stdin.close()
    time.sleep(0.5)
    meanwhile = load(
        Job(bench.service.port, [{"method": "GET", "path": "/healthz"}], clients=1, repeat_seconds=1.5)
    )
    both.wait()
    return {name: median(found) for name, found in values.items()} | {
        "list ms": median(alone.latencies_ms),
        "noop ms": median(quiet.latencies_ms),
        "meanwhile p99 ms": statistics.quantiles(meanwhile.latencies_ms, n=100)[98],
    }


def door(directory: Path, scale: Scale) -> dict[str, float]:
    """Measure 64 clients who show a token, each on record, against a service without a door; a second."""
    rates: dict[str, list[float]] = {"token": [], "doorless": []}
    with contextlib.ExitStack() as stack:
        benches = {}
        for number, (name, module) in enumerate(
            (("token", "backend"), ("doorless", "tests.benchmarks.doorless"))
        ):
            bench = Bench(directory / name, module, f"wg{name}", 38003 + number)
            stack.callback(bench.close)
            bench.fill(scale.load_sizes[0])
            benches[name] = bench
        benches["token"].show(
            "token",
            "create",
            "--max-uses",
            "1000000",
            "--node-id-pattern",
            "bench-*",
            "--source-cidr",
            "127.0.0.0/8",
        )
        for _ in range(scale.load_turns * 3):
            for name, bench in benches.items():
                result = bench.send(adding(bench.new_names(scale.batch)))
                assert result is not None
                rates[name].append(result.rate)
    return {name: median(found) for name, found in rates.items()}


def start(bench: Bench, directory: Path, repeats: int) -> dict[str, float]:
    """Measure from exec to ready, against the interpreter's imports and one cold `wg syncconf`; ms."""
    values: dict[str, list[float]] = {}
    stripped = subprocess.run(
        ["wg-quick", "strip", bench.hub.config_path], capture_output=True, check=True
    ).stdout
    path = directory / "cold.conf"
    path.write_bytes(stripped.replace(b"ListenPort = 38000", b"ListenPort = 38002"))
    imports = "import dbos, fastapi, uvicorn, uvloop, httptools, alembic.command, pydantic_settings, typer"
    for _ in range(repeats):
        bench.service.terminate()
        bench.hub.down()
        bench.hub.start()
        values.setdefault("start", []).append(timed(bench.service.start))
        values.setdefault("imports", []).append(
            timed(lambda: subprocess.run([sys.executable, "-c", imports], check=True))
        )
        with Interface(LocalHost(), "wgcold", directory) as cold:
            cold.up()
            values.setdefault("cold syncconf", []).append(
                timed(lambda: subprocess.run(["wg", "syncconf", "wgcold", path], check=True))
            )
    return {name: median(found) for name, found in values.items()}


# What lies between two boundaries of tests.benchmarks.timeline, in the order of one request.
_STRETCHES: Final = {
    "submitted": "HTTP in, body checked, address reserved",
    "taken": "the committer's thread wakes",
    "prepared": "file and interface looked at, batch made, the new wg0.conf written",
    "committed": "records: statements, commit, fsync; the new wg0.conf synced meanwhile",
    "replaced": "wg0.conf waited for and replaced",
    "started": "wg given the change, and the next one started",
    "written": "directory synced, while wg works",
    "changed": "wg waited for",
    "settled": "settled",
    "answering": "the event loop wakes",
    "answered": "answer rendered and sent",
}


def breakdown(directory: Path, size: int, requests: int) -> dict[str, float]:
    """Measure where the time of one request goes; means in milliseconds, which add up to `one request`.

    The slowest tenth of the requests is left out: a machine that was elsewhere says nothing of ours.
    """
    bench = Bench(directory, module="tests.benchmarks.timeline")
    try:
        bench.fill(size)
        result = bench.send(adding(bench.new_names(requests)), clients=1)
    finally:
        bench.close()
    assert result is not None
    passed: list[tuple[float, str]] = json.loads((directory / "timeline.json").read_text())
    starts = [number for number, (_, what) in enumerate(passed) if what == "received"][-requests:]
    found = []
    for start, end, latency in zip(starts, [*starts[1:], len(passed)], result.latencies_ms, strict=True):
        stretches, last = {}, passed[start][0]
        for moment, what in passed[start + 1 : end]:
            if what in _STRETCHES:
                stretches[_STRETCHES[what]] = (moment - last) * 1000
                last = moment
        # The connection's first request pays for the connection.
        if start != starts[0] and len(stretches) == len(_STRETCHES):
            sockets = latency - sum(stretches.values())
            found.append({**stretches, "sockets and client": sockets, "one request": latency})
    found.sort(key=lambda stretches: stretches["one request"])
    kept = found[: max(1, len(found) * 9 // 10)]
    return {name: statistics.fmean(one[name] for one in kept) for name in kept[0]}


def resident_kib(service: ServiceProcess) -> int:
    """Return the service's resident set."""
    for line in Path(f"/proc/{service.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise RuntimeError("no VmRSS in /proc")


def measure(scale: Scale, say: Callable[[str], object]) -> tuple[dict[str, Any], list[Goal]]:
    """Measure everything; return the figures and the verdict."""
    figures: dict[str, Any] = {"sequential": {}, "shared": {}, "breakdown": {}}
    goals: list[Goal] = []
    with (
        tempfile.TemporaryDirectory(prefix="bench-", dir=os.environ.get("BENCH_DIRECTORY")) as name,
        noop_server() as noop,
    ):
        directory = Path(name)
        bench, floor = Bench(directory), Floor(directory / "floor")
        try:
            for size in scale.sizes:
                bench.fill(size)
                floor.fill(size)
                if size == scale.sizes[0]:
                    figures["resident KiB"] = {size: resident_kib(bench.service)}
                say(f"sequential at {size} peers")
                figures["sequential"][size] = sequential(bench, floor, noop, scale.turns)
                if size in scale.load_sizes:
                    say(f"64 clients at {size} peers")
                    figures["shared"][size] = shared(bench, noop, scale)
                if size == max(scale.load_sizes):
                    say(f"storm at {size} peers")
                    figures["storm"] = storm(bench, noop, scale)
            say("start")
            bench.fill(scale.sizes[-1])
            figures["start"] = start(bench, directory, scale.repeats)
            figures["resident KiB"][scale.sizes[-1]] = resident_kib(bench.service)
            bench.service.restart()
        finally:
            bench.close()
            floor.close()
        say("with a token, and without a door")
        figures["door"] = door(directory, scale)
        say("where the time goes")
        for size in (scale.sizes[0], scale.sizes[-1]) if not scale.quick else scale.sizes[:1]:
            figures["breakdown"][size] = breakdown(directory / f"breakdown-{size}", size, scale.turns * 2)
    goals += verdict(figures, scale)
    return figures, goals


def verdict(figures: dict[str, Any], scale: Scale) -> list[Goal]:
    """Compare the figures with the goals."""
    sequential_, first, last = figures["sequential"], scale.sizes[0], scale.sizes[-1]
    storm_, start_ = figures["storm"], figures["start"]
    resident = figures["resident KiB"]
    goals = [
        Goal(f"1 flat: p50 at {last} / at {first}", sequential_[last]["add"] / sequential_[first]["add"], 1.5)
    ]
    goals += [
        Goal(f"2 near: add / floor at {size}", found["add"] / found["floor"], 3.0)
        for size, found in sequential_.items()
    ]
    for size, found in figures["shared"].items():
        note = "the generator was the limit" if found["generator"] > 0.95 else ""
        goals.append(
            Goal(
                f"3 shared: add / no-op at {size}",
                found["add"] / found["noop"],
                0.2,
                at_most=False,
                note=note,
            )
        )
    goals += [
        Goal("4 storm: known nodes / no-op", storm_["again"] / storm_["noop"], 0.5, at_most=False),
        Goal("4 storm: one peer / no-op", storm_["one"] / storm_["noop"], 0.5, at_most=False),
        Goal("4 storm: whole list, ms", storm_["list ms"], 6 * storm_["noop ms"] / _REFERENCE_NOOP_MS),
    ]
    goals += [
        Goal(f"5 delete / add at {size}", found["delete"] / found["add"], 1.25)
        for size, found in sequential_.items()
    ]
    limit = 1.5 * start_["cold syncconf"] + start_["imports"]
    goals.append(Goal(f"6 start at {last}, ms", start_["start"], limit))
    per_peer = (resident[last] - resident[first]) / (last - first)
    goals.append(Goal("6 memory, KiB a peer", per_peer, 2.0))
    with_token, without = figures["door"]["token"], figures["door"]["doorless"]
    goals.append(Goal("7 door: with a token / without a door", with_token / without, 0.9, at_most=False))
    return goals


def table(figures: dict[str, Any], goals: list[Goal]) -> str:
    """Return the figures and the verdict for a person."""
    lines = ["", "sequential, p50 in ms"]
    columns = ["add", "delete", "floor", "commit", "file", "wg set", "wg remove", "syncconf", "noop"]
    lines.append(" ".join(f"{title:>9}" for title in ["peers", *columns]))
    for size, found in figures["sequential"].items():
        lines.append(" ".join([f"{size:>9}", *(f"{found[column]:>9.2f}" for column in columns)]))
    lines += ["", "64 clients, answers a second"]
    for size, found in figures["shared"].items():
        rates = "  ".join(f"{name} {found[name]:.0f}" for name in ("add", "delete", "noop"))
        lines.append(f"{size:>9}  {rates}  (generator's CPU {found['generator']:.2f})")
    for part in ("storm", "door", "start", "resident KiB"):
        lines += ["", part, "  ".join(f"{name}: {value:.1f}" for name, value in figures[part].items())]
    for size, found in figures["breakdown"].items():
        lines += ["", f"one request at {size} peers, ms"]
        lines += [f"{value:>9.2f}  {name}" for name, value in found.items()]
    lines.append("")
    for goal in goals:
        sign = "<=" if goal.at_most else ">="
        word = "pass" if goal.passed else "FALLS SHORT"
        lines.append(f"{goal.goal:<36} {goal.measured:>9.2f} {sign} {goal.limit:<9.2f} {word} {goal.note}")
    return "\n".join(lines)


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="in under two minutes")
    parser.add_argument("--json", action="store_true", help="for machines")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        sys.stderr.write("the bench makes network namespaces and interfaces: run it as root\n")
        return 1
    enter_new_namespaces()
    guard = Guard.of_this_process()
    try:
        figures, goals = measure(
            QUICK if arguments.quick else FULL, lambda text: sys.stderr.write(f"... {text}\n")
        )
    finally:
        guard.close()
    if arguments.json:
        verdicts = [asdict(goal) | {"passed": goal.passed} for goal in goals]
        sys.stdout.write(json.dumps({"figures": figures, "goals": verdicts}, indent=2) + "\n")
    else:
        sys.stdout.write(table(figures, goals) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
