"""The service with everything around it that a unit test may look at: file, interface and records."""

from collections.abc import Callable
from concurrent.futures import Future
from datetime import UTC, datetime
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Final

from backend.adapters.records.access_store import SqlAccessStore
from backend.errors import ProvisioningError
from backend.loops import Loop, Loops
from backend.models.access.audit import AuditAction, AuditOutcome
from backend.models.access.callers import SERVICE, Caller, CallerKind
from backend.models.access.credentials import TokenRequest
from backend.models.access.idempotency import IdempotencyKey
from backend.models.wireguard.interface import InterfaceName
from backend.models.wireguard.keys import WireGuardPrivateKey
from backend.models.wireguard.peer import Change, ChangeUnderWayError, Peer
from backend.models.wireguard.provisioning import PeerConfiguration, ProvisioningRequest
from backend.services.configurations import Configurations
from backend.services.hub.agent import Agent, Run
from backend.services.hub.endpoint_keeper import EndpointKeeper
from backend.services.hub.health import HealthMonitor
from backend.services.hub.history import HubHistory
from backend.services.hub.hub_health import HubHealth
from backend.services.hub.interface_observer import InterfaceObserver
from backend.services.hub.mark import HubMark
from backend.services.hub.operator_peers import OperatorPeers, PeerLimit
from backend.services.hub.reconciler import Reconciler
from backend.services.hub.removal_guard import RemovalGuard
from backend.services.hub.writer import Writer
from backend.services.ip_pool_manager import IPPoolManager
from backend.services.no_metrics import NO_METRICS
from backend.services.peer_directory import PeerDirectory
from backend.services.ports import Hub, Metrics
from backend.services.readiness import Readiness
from backend.services.wireguard_config_manager import WireGuardConfigManager
from backend.services.wireguard_provisioning_service import WireGuardProvisioningService
from tests.harness.access import Access
from tests.harness.fakes import FakeHub, FlakyRecords
from tests.harness.patience import WAIT
from tests.harness.requests import provision_body

# How often the agent looks at the hub: seconds. With NEVER it does so where a test calls `look`.
OFTEN: Final = 0.02
NEVER: Final = 3600.0


def request(node_id: str, key: str | None = None, **over: object) -> ProvisioningRequest:
    """Return a valid request, with the fields in `over` put over it."""
    return ProvisioningRequest.model_validate(provision_body(node_id, key, **over))


def at_once(work: Callable[[], None]) -> None:
    """Run the agent's work without a workflow."""
    work()


class World:
    """One service with a wg0.conf in `directory`, an interface and records."""

    def __init__(  # noqa: PLR0913 - what tests choose
        self,
        directory: Path,
        records: FlakyRecords | None = None,
        hub: Hub | None = None,
        *,
        network: str = "10.0.0.0/24",
        limit: PeerLimit | None = None,
        look_every: float = OFTEN,
        run: Run = at_once,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        """Start nothing yet."""
        self.path = directory / "wg0.conf"
        if not self.path.exists():
            self.path.touch(mode=0o600)
            private_key = WireGuardPrivateKey.generate().reveal()
            self.path.write_text(f"[Interface]\nPrivateKey = {private_key}\nListenPort = 51820\n")
        self.records = records or FlakyRecords()
        self.hub: Hub = hub or FakeHub()
        self.store = SqlAccessStore(self.records.database)
        self.access = Access(self.store, metrics=metrics)
        self.pool = IPPoolManager(network, ["10.0.0.1"])
        self.operator_peers = OperatorPeers(self.pool, limit)
        self.config = WireGuardConfigManager(self.path)
        guard = RemovalGuard(self.records.removed_keys)
        self.directory = PeerDirectory(self.pool, self.operator_peers)
        self.health = HealthMonitor(self.directory, lambda: self.config.parsed.hub_public_key)
        self.observer = InterfaceObserver(self.hub, self.health, metrics)
        self.keeper = EndpointKeeper(self.records, self.health)
        self.reconciler = Reconciler(self.config, self.hub, self.operator_peers, self.observer, guard=guard)
        self.writer = Writer(self.records, guard)
        history = HubHistory(self.records, self.reconciler, guard, HubMark(self.config.path))
        self.agent = Agent(
            self.writer, self.reconciler, self.directory, self.operator_peers, history, run, metrics
        )
        self.configurations = Configurations(
            self.pool.network, "hub.example.com:51820", IPv4Address("10.0.0.1"), self.operator_peers
        )
        self.service = WireGuardProvisioningService(
            pool=self.pool,
            operator_peers=self.operator_peers,
            directory=self.directory,
            writer=self.writer,
            configurations=self.configurations,
            access=self.access.control,
            token_uses=self.access.uses,
            answers=self.store,
            readiness=Readiness(
                [
                    ("an earlier change", self.agent.check),
                    ("the database", self.records.check_writable),
                    ("the hub's config or interface", self.reconciler.check),
                    ("the pool", self.directory.require_room),
                ],
                live=self.hub.live,
            ),
            health=HubHealth(InterfaceName.parse("wg0"), self.health, self.observer, live=self.hub.live),
            metrics=metrics,
        )
        self._loops = Loops([Loop("hub", look_every, self.agent.maintain)])
        self._stopped = False

    def start(self) -> None:
        """Bring the hub up to the records, and begin to take changes."""
        self.keeper.load()
        self.agent.start()
        self._loops.start()

    def stop(self) -> None:
        """Stop, and leave the records open for a look, or for another world."""
        if not self._stopped:
            self._stopped = True
            self._loops.stop()
            self.agent.stop()
            self.keeper.close()
            self.reconciler.close()
            self.observer.close()

    def provision(self, node_id: str, key: str | None = None, **over: object) -> PeerConfiguration:
        """Provision a peer and wait for it."""
        return self.service.provision_peer(request(node_id, key, **over), WAIT)

    def deprovision(self, node_id: str) -> None:
        """Remove a peer and wait until the hub has forgotten it."""
        self.service.deprovision_peer(node_id, WAIT)

    def submit(
        self, body: ProvisioningRequest, caller: Caller = SERVICE, key: IdempotencyKey | None = None
    ) -> "Future[Peer]":
        """Begin to provision, and return the outcome, as an endpoint waits for it."""
        return self._begin(partial(self.service.provision, body, caller, key), self.service.answer)

    def submit_removal(self, node_id: str) -> "Future[Peer]":
        """Begin to remove a peer, and return the outcome, as an endpoint waits for it."""
        return self._begin(partial(self.service.deprovision, node_id), lambda _: None)

    def token(self, max_uses: int = 9) -> Caller:
        """Return a caller with a new enrolment token."""
        credential, _ = TokenRequest(max_uses=max_uses).make("test", datetime.now(UTC))
        made = SERVICE.event(datetime.now(UTC), AuditAction.TOKEN_MADE, AuditOutcome.ACCEPTED)
        self.store.keep_credential(credential, made)
        return Caller(CallerKind.TOKEN, credential)

    def look(self) -> None:
        """Have the agent look at the hub once, as it does each second."""
        self.agent.maintain()

    def check(self) -> None:
        """Raise what stands in the way of a provision now, as readiness finds it."""
        self.service.readiness.ask().result(WAIT)

    @property
    def text(self) -> str:
        """The file's."""
        return self.path.read_text()

    @property
    def hub_key(self) -> str:
        """The hub's public key."""
        return self.service.hub_key

    @property
    def version(self) -> tuple[int, int, int]:
        """Another one whenever the file was replaced or written."""
        status = self.path.stat()
        return status.st_ino, status.st_mtime_ns, status.st_ctime_ns

    def append(self, key: str, allowed_ips: str) -> None:
        """Add an operator's peer to the file."""
        with self.path.open("a") as file:
            file.write(f"\n[Peer]\n# mine\nPublicKey = {key}\nAllowedIPs = {allowed_ips}\n")

    def _begin(self, decide: Callable[[], Change], finish: Callable[[Change], object]) -> "Future[Peer]":
        """Decide now, and again whenever another change of the peer has ended first."""
        outcome: Future[Peer] = Future()

        def again(_: object = None) -> None:
            try:
                change = decide()
            except ChangeUnderWayError as exc:
                exc.change.applied.add_done_callback(again)
            except ProvisioningError as exc:
                outcome.set_exception(exc)
            else:
                change.applied.add_done_callback(partial(end, change))

        def end(change: Change, applied: "Future[None]") -> None:
            try:
                applied.result(0)
                finish(change)
            except ProvisioningError as exc:
                outcome.set_exception(exc)
            else:
                outcome.set_result(change.peer)

        again()
        return outcome


class Worlds:
    """Starts services on one directory, and on one interface where a test names no other."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.hub = FakeHub()
        self._worlds: list[World] = []

    def __call__(
        self, records: FlakyRecords | None = None, *, hub: Hub | None = None, **options: Any
    ) -> World:
        """Start one, with World's options; an earlier one is stopped first."""
        for earlier in self._worlds:
            earlier.stop()
        world = World(self.directory, records, hub or self.hub, **options)
        self._worlds.append(world)
        world.start()
        return world

    def close(self) -> None:
        """Stop all of them, and let go of their records."""
        for world in self._worlds:
            world.stop()
            world.records.database.close()


class Ends:
    """Counts how often each change ends."""

    def __init__(self) -> None:
        self._ends: dict[int, int] = {}

    def count(self, made: Change) -> None:
        """Count this change's ends."""
        number = len(self._ends)
        self._ends[number] = 0

        def end(_: object) -> None:
            self._ends[number] += 1

        made.applied.add_done_callback(end)

    def all_once(self) -> bool:
        """Say whether each has ended, and once."""
        return set(self._ends.values()) <= {1}
