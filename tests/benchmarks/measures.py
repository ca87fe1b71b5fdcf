"""The figures of `make bench`: each is measured in turns with what it is compared with."""

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
from tests.benchmarks.parts import Bench, Floor, adding, load, noop_server
from tests.benchmarks.watching import cpu_of_watching, scrapes
from tests.harness.hosts import LocalHost
from tests.harness.requests import PEERS, provision_body
from tests.harness.service import ServiceProcess
from tests.harness.wireguard import Interface


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    sizes: tuple[int, ...]
    turns: int
    load_sizes: tuple[int, ...]
    load_turns: int
    batch: int
    repeats: int
    pairs: int
    quick: bool = False


FULL: Final = Scale((100, 1000, 5000, 10000), 60, (1000, 5000), 5, 1500, 3, 10)
QUICK: Final = Scale((100, 1000, 10000), 20, (1000,), 2, 800, 1, 3, quick=True)


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
    # Small requests, while another client reads the whole list again and again.
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


def access_control(directory: Path, scale: Scale) -> dict[str, float]:
    """Measure 64 clients with a token, with and without access control; answers a second."""
    rates: dict[str, list[float]] = {"token": [], "without": []}
    with contextlib.ExitStack() as stack:
        benches = {}
        for number, (name, module) in enumerate(
            (("token", "backend"), ("without", "tests.benchmarks.unauthenticated"))
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
    "taken": "the agent's thread wakes",
    "prepared": "file and interface looked at, batch made, the new wg0.conf written",
    "committed": "records: statements, commit, fsync; the new wg0.conf synced meanwhile",
    "replaced": "wg0.conf waited for and replaced",
    "started": "wg given the change, and the next one started",
    "written": "directory synced, while wg works",
    "changed": "wg waited for",
    "applied": "noted as applied",
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


def measure(scale: Scale, say: Callable[[str], object]) -> dict[str, Any]:
    """Measure everything."""
    figures: dict[str, Any] = {"sequential": {}, "shared": {}, "breakdown": {}}
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
        say("with and without access control")
        figures["access control"] = access_control(directory, scale)
        say("with and without metrics and health")
        figures["watching"] = cpu_of_watching(directory, scale.load_sizes[0], scale.pairs)
        figures["scrape"] = scrapes(directory / "scrapes", scale.sizes[-1])
        say("where the time goes")
        for size in (scale.sizes[0], scale.sizes[-1]) if not scale.quick else scale.sizes[:1]:
            figures["breakdown"][size] = breakdown(directory / f"breakdown-{size}", size, scale.turns * 2)
    return figures
