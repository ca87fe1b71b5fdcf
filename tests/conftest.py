"""Everything that touches a network happens in namespaces that pytest makes for itself and takes with it."""

import itertools
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.harness.core import World, Worlds
from tests.harness.failing_wg import FailingWg
from tests.harness.fakes import FakeHub
from tests.harness.hosts import LocalHost
from tests.harness.namespaces import Guard, enter_new_namespaces
from tests.harness.postgres import fresh_database, postgres_cluster
from tests.harness.requirements import do_without, require
from tests.harness.service import ServiceProcess
from tests.harness.torture import TORTURE
from tests.harness.wireguard import HubInterface

# Its fixtures.
pytest_plugins = ["tests.harness.raw_http"]

_NOT_ISOLATED: Final = pytest.StashKey[str]()
_GUARD: Final = pytest.StashKey[Guard]()
_HUB_NUMBERS: Final = itertools.count()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what `make torture` uses."""
    group = parser.getgroup("torture")
    group.addoption(
        "--torture",
        type=float,
        metavar="MINUTES",
        help="run the tests that are marked `torture` and no others, all together for about this long",
    )
    group.addoption("--seed", type=int, default=random.SystemRandom().getrandbits(32), help="of `chance`")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """Have pytest-cov alone measure a worker: coverage's own start of subprocesses would do so once more."""
    os.environ.pop("COVERAGE_PROCESS_CONFIG", None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --torture choose the tests that have a longer form; without it, all that have a short one."""
    minutes: float | None = config.option.torture
    chosen: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        marker = item.get_closest_marker("torture")
        if minutes is None:
            wanted = marker is None or not marker.kwargs.get("only", False)
        else:
            wanted = marker is not None
        (chosen if wanted else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen
    if minutes is not None:
        workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
        TORTURE.divide(minutes * 60, len(chosen), workers)


def pytest_runtest_setup() -> None:
    """Begin no test of `make torture` after its time."""
    if TORTURE.is_on and not TORTURE.begin_test():
        pytest.skip("the time is over")


def pytest_configure(config: pytest.Config) -> None:
    """Move pytest into namespaces of its own, where that is possible."""
    TORTURE.is_on = config.option.torture is not None
    if os.geteuid() != 0:
        config.stash[_NOT_ISOLATED] = "needs root, for network namespaces"
        return
    try:
        enter_new_namespaces()
        config.stash[_GUARD] = Guard.of_this_process()
    except OSError as exc:
        config.stash[_NOT_ISOLATED] = f"needs network namespaces, which can't be made here: {exc}"


def pytest_unconfigure(config: pytest.Config) -> None:
    """End what the tests have left running, and say so."""
    guard = config.stash.get(_GUARD, None)
    if guard is not None and (left := guard.close()):
        sys.stderr.write(f"left running by the tests, and killed now: {', '.join(left)}\n")


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say whether the network tests can run, and how to have the same random numbers again."""
    reason = config.stash.get(_NOT_ISOLATED, None)
    return [
        f"network: {reason or 'namespaces of its own'}",
        f"seed: {config.option.seed} (--seed repeats it)",
    ]


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """Return random numbers that depend on the test and on --seed alone."""
    return random.Random(f"{request.config.option.seed} {request.node.nodeid}")  # noqa: S311 - not a secret


@pytest.fixture
def make_world(tmp_path: Path) -> Iterator[Worlds]:
    """Give the test what starts services without real parts, on one file and one interface."""
    worlds = Worlds(tmp_path)
    try:
        yield worlds
    finally:
        worlds.close()


@pytest.fixture
def world(make_world: Worlds) -> World:
    """Start such a service."""
    return make_world()


@pytest.fixture
def fake_hub(make_world: Worlds) -> FakeHub:
    """Return the interface of that service."""
    return make_world.hub


@pytest.fixture(scope="session")
def needs_namespaces(pytestconfig: pytest.Config) -> None:
    """Skip unless pytest is in namespaces of its own, so that nothing can touch the host."""
    reason = pytestconfig.stash.get(_NOT_ISOLATED, None)
    if reason is not None:
        do_without(reason)
    require("ip", "nsenter")


@pytest.fixture(scope="session")
def needs_wireguard(needs_namespaces: None) -> None:
    """Skip unless real WireGuard interfaces can be made."""
    require("wg", "wireguard-go")
    if not Path("/dev/net/tun").exists():
        do_without("needs /dev/net/tun, for wireguard-go")


@pytest.fixture
def hub_interface(needs_wireguard: None, tmp_path: Path) -> Iterator[HubInterface]:
    """Give the test an interface of its own, with the hub's key and port but no peers, and its wg0.conf."""
    number = next(_HUB_NUMBERS)
    # A port for each: the next test's may be there before the kernel has let go of this one's.
    with HubInterface(LocalHost(), f"wghub{number}", tmp_path, listen_port=40000 + number) as hub:
        hub.start()
        yield hub


@pytest.fixture
def start_service(tmp_path: Path) -> Iterator[Callable[..., ServiceProcess]]:
    """Give the test a function that starts the service; it takes ServiceProcess's other arguments."""
    running: list[ServiceProcess] = []

    def start(settings: dict[str, Any], **options: Any) -> ServiceProcess:
        directory = tmp_path / f"service{len(running)}"
        directory.mkdir()
        service = ServiceProcess(directory, settings, **options)
        running.append(service)
        service.start()
        return service

    try:
        yield start
    finally:
        for service in reversed(running):
            service.close()


@pytest.fixture
def wg(tmp_path: Path) -> FailingWg:
    """Give the test a `wg` that fails when told to; its `directory` goes first in PATH."""
    return FailingWg(tmp_path / "bin")


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """Run a PostgreSQL cluster for the session; the URL is of its `postgres` database."""
    with postgres_cluster() as url:
        yield url


@pytest.fixture
def postgres_database(postgres_url: str) -> str:
    """Give the test an empty PostgreSQL database of its own, by URL."""
    return fresh_database(postgres_url)
