"""Builds the parts of the service, and starts and stops them in one visible order."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime
from functools import partial

from backend.adapters.backups.automatic import AutomaticBackups
from backend.adapters.backups.directory import BackupDirectory
from backend.adapters.backups.maker import BackupMaker
from backend.adapters.durable_workflow import DurableWorkflow
from backend.adapters.host.locks import ConfigGuard, lock_interface
from backend.adapters.host.private_files import admin_header
from backend.adapters.metrics.prometheus import PrometheusMetrics
from backend.adapters.metrics.state import State
from backend.adapters.rate_limits import RateLimits
from backend.adapters.records.access_store import SqlAccessStore
from backend.adapters.records.database import IN_MEMORY, Database
from backend.adapters.records.unit_of_work import SqlRecords
from backend.adapters.wireguard.host_link import WIREGUARD_GO_PEERS, most_peers
from backend.adapters.wireguard.wg import FileOnly, WgInterface
from backend.errors import ConfigFileError, HubUpdateError, StartRefusedError
from backend.loops import Loops, list_access_loops, list_backup_loops, list_health_loops, list_hub_loops
from backend.models.access.audit import AuditAction
from backend.models.access.callers import SERVICE
from backend.models.access.credentials import Credential, KeyRequest, Role
from backend.models.setting_values import AuthMode, ReloadMode
from backend.models.trusted_paths import require_trusted, require_trusted_file
from backend.services.access.access_control import AccessControl
from backend.services.access.audit_writer import AuditWriter
from backend.services.access.authenticator import Authenticator
from backend.services.access.challenges import ProofVerifier, WireGuardChallenges
from backend.services.access.credential_cache import CredentialCache
from backend.services.access.credential_service import CredentialService
from backend.services.access.token_uses import TokenUses
from backend.services.configurations import Configurations
from backend.services.hub.agent import Agent
from backend.services.hub.backups import Retention
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
from backend.services.wireguard_config_manager import WireGuardConfigManager, require_address
from backend.services.wireguard_provisioning_service import WireGuardProvisioningService
from backend.settings import Settings, unknown_settings

log = logging.getLogger(__name__)


@contextmanager
def running_service(  # noqa: PLR0915 - one list of all parts
    settings: Settings,
) -> Iterator[WireGuardProvisioningService]:
    """Start the service that the settings describe, and stop it at the end; raise StartRefusedError.

    The one list of all parts: started in this order, stopped in reverse. Over 40 lines, so that it is one.
    """
    with ExitStack() as stopping:
        stopping.callback(log.info, "service_stopped")
        # Checked before any file is made in these places.
        require_trusted(settings.state_directory, "STATE_DIRECTORY")
        require_trusted_file(settings.wireguard_config_path, "WIREGUARD_CONFIG_PATH")
        require_trusted(settings.backup_directory, "WIREGUARD_BACKUP_DIRECTORY")
        _warn_of_unknown_settings()

        hub = stopping.enter_context(closing(make_hub(settings)))
        guard = stopping.enter_context(ConfigGuard(settings.wireguard_config_path))
        if hub.live:
            stopping.enter_context(lock_interface(settings.interface))
        prometheus = _prometheus(settings)
        metrics: Metrics = prometheus or NO_METRICS
        config = _config(settings, hub, guard)
        pool = make_pool(settings)
        operator_peers = OperatorPeers(pool, _peer_limit(settings, pool))

        database = stopping.enter_context(_database(settings, metrics))
        records, store = SqlRecords(database), SqlAccessStore(database)
        records.name_hub(settings.interface)
        workflow = None
        if settings.enable_dbos:
            workflow = stopping.enter_context(closing(DurableWorkflow(database, settings.interface)))

        uses = TokenUses()
        cache = CredentialCache(store, uses)
        audit = stopping.enter_context(closing(AuditWriter(store)))
        local, secret = KeyRequest(role=Role.ADMIN).make(SERVICE.name, datetime.now(UTC))
        access = AccessControl(
            _authenticator(settings, cache, uses, audit, metrics, local),
            CredentialService(store, cache),
            audit,
            proofs=ProofVerifier(WireGuardChallenges()) if settings.wireguard_require_proof else None,
            proxies=settings.wireguard_trusted_proxies,
        )
        stopping.callback(access.limited.report)

        removals = RemovalGuard(records.removed_keys)
        directory = PeerDirectory(pool, operator_peers)
        health = _health(settings, directory, config, audit, metrics)
        observer = stopping.enter_context(closing(InterfaceObserver(hub, health, metrics)))
        reconciler = stopping.enter_context(
            closing(Reconciler(config, hub, operator_peers, observer, notice=audit.notice, guard=removals))
        )
        history = HubHistory(records, reconciler, removals, HubMark(config.path))
        writer = Writer(records, removals)
        run = _at_once if workflow is None else workflow.run
        agent = Agent(writer, reconciler, directory, operator_peers, history, run, metrics)
        readiness = Readiness(
            [
                ("an earlier change", agent.check),
                ("the database", records.check_writable),
                ("the hub's config or interface", reconciler.check),
                ("the pool", directory.require_room),
            ],
            live=hub.live,
            notices=lambda: (*access.notices, *history.notices),
        )
        service = WireGuardProvisioningService(
            pool=pool,
            operator_peers=operator_peers,
            directory=directory,
            writer=writer,
            configurations=Configurations(
                settings.wireguard_ip_pool,
                settings.wireguard_hub_endpoint,
                settings.wireguard_hub_ip,
                operator_peers,
            ),
            access=access,
            token_uses=uses,
            answers=store,
            readiness=readiness,
            health=HubHealth(settings.interface, health, observer, live=hub.live),
            metrics=metrics,
        )
        cache.refresh()
        keeper = EndpointKeeper(records, health)
        keeper.load()
        stopping.callback(keeper.close)
        # Registered before the start, which may fail halfway.
        stopping.callback(agent.stop)
        backups = _automatic_backups(settings, database, config, writer)
        agent.start((lambda: None) if workflow is None else workflow.launch)
        loops = Loops(
            [
                *list_hub_loops(agent, records, workflow),
                *list_health_loops(
                    observer, keeper, agent, settings.wireguard_health_interval if hub.live else 0
                ),
                *list_access_loops(access, cache, store, settings.audit_keep),
                *list_backup_loops(backups),
            ]
        )
        if prometheus is not None:
            prometheus.watch(
                State(
                    pool=pool,
                    writer=writer,
                    reconciler=reconciler,
                    cache=cache,
                    uses=uses,
                    loops=loops.rows,
                    health=health,
                    last_backup_at=(lambda: None) if backups is None else backups.last_backup_at,
                )
            )
        stopping.callback(loops.stop)
        loops.start()
        if access.authenticator.required:
            stopping.enter_context(admin_header(settings.state_directory, secret))
        _log_start(settings, service)
        yield service


def _config(settings: Settings, hub: Hub, guard: ConfigGuard) -> WireGuardConfigManager:
    """Read the hub's config, and refuse to start on one that can't be used."""
    config = WireGuardConfigManager(
        settings.wireguard_config_path,
        hub.sync,
        stated_key=settings.wireguard_hub_public_key,
        require_trusted=guard.require_trusted,
    )
    config.remove_stale_temporaries()
    try:
        config.refresh()
        require_address(config.path, config.parsed, settings.wireguard_hub_ip)
    except ConfigFileError as exc:
        raise StartRefusedError(str(exc)) from exc
    return config


def _health(
    settings: Settings,
    directory: PeerDirectory,
    config: WireGuardConfigManager,
    audit: AuditWriter,
    metrics: Metrics,
) -> HealthMonitor:
    return HealthMonitor(
        directory,
        lambda: config.parsed.hub_public_key,
        suspect_after=settings.wireguard_suspect_after,
        offline_after=settings.wireguard_offline_after,
        on_flapping=partial(_note_flapping, audit, metrics),
        on_first_handshake=metrics.first_handshake,
    )


def _note_flapping(audit: AuditWriter, metrics: Metrics, node_id: str) -> None:
    metrics.endpoint_flapped()
    log.warning("endpoint_flapping", extra={"node_id": node_id})
    audit.notice(AuditAction.ENDPOINT_FLAPPING, "two nodes may have the same key", node_id)


def _warn_of_unknown_settings() -> None:
    for name, nearest in unknown_settings().items():
        log.warning("unknown_setting", extra={"setting": name} | ({"nearest": nearest} if nearest else {}))


def make_hub(settings: Settings) -> Hub:
    """Return the interface; raise StartRefusedError where `wg` isn't installed."""
    if settings.wireguard_reload is ReloadMode.OFF:
        return FileOnly()
    try:
        return WgInterface(settings.interface, settings.wireguard_hub_ip)
    except HubUpdateError as exc:
        raise StartRefusedError(f"{exc}, or set WIREGUARD_RELOAD=off for the file alone") from exc


def _prometheus(settings: Settings) -> PrometheusMetrics | None:
    if not settings.wireguard_metrics:
        return None
    return PrometheusMetrics(hub=settings.interface, per_peer=settings.wireguard_metrics_per_peer)


def _automatic_backups(
    settings: Settings, database: Database, config: WireGuardConfigManager, writer: Writer
) -> AutomaticBackups | None:
    """Return what makes backups; None with records in memory, or where WIREGUARD_BACKUP_KEEP is 0."""
    keep = settings.wireguard_backup_keep
    if not database.durable or keep == 0:
        return None
    directory = BackupDirectory(settings.backup_directory, settings.state_directory)
    return AutomaticBackups(
        BackupMaker(directory, database, settings.wireguard_config_path, settings.interface),
        lambda: config.parsed.hub_public_key,
        lambda: writer.generation,
        Retention(keep, settings.wireguard_backup_keep_days),
    )


def _authenticator(  # noqa: PLR0913, PLR0917 - its parts
    settings: Settings,
    cache: CredentialCache,
    uses: TokenUses,
    audit: AuditWriter,
    metrics: Metrics,
    local: Credential,
) -> Authenticator:
    return Authenticator(
        cache,
        uses,
        audit,
        RateLimits(settings.rate_limits, settings.wireguard_rate_limit_storage),
        local=local,
        required=settings.wireguard_auth is AuthMode.REQUIRED,
        metrics=metrics,
    )


def _at_once(work: Callable[[], None]) -> None:
    """Run the agent's work without a workflow, for records in memory."""
    work()


def make_pool(settings: Settings) -> IPPoolManager:
    """Return the pool with the hub's own address reserved."""
    return IPPoolManager(settings.wireguard_ip_pool, [str(settings.wireguard_hub_ip)])


def _log_start(settings: Settings, service: WireGuardProvisioningService) -> None:
    for notice in service.access.notices:
        log.warning("authentication_off", extra={"consequence": notice})
    log.info(
        "service_started",
        extra={"interface": settings.interface, "reload": str(settings.wireguard_reload)},
    )
    if not service.readiness.live:
        log.warning("reload_off", extra={"consequence": "wg0.conf is kept, no interface is told"})


def _peer_limit(settings: Settings, pool: IPPoolManager) -> PeerLimit:
    if settings.wireguard_reload is ReloadMode.OFF:
        return PeerLimit()
    name = settings.interface
    most = most_peers(name)
    if pool.available_count() > most:
        log.warning(
            "pool_larger_than_interface",
            extra={
                "pool": pool.network,
                "interface": name,
                "consequence": f"when there are {most} peers, the next one gets a 503",
            },
        )
    return PeerLimit(name, partial(most_peers, name), fewest=WIREGUARD_GO_PEERS)


@contextmanager
def _database(settings: Settings, metrics: Metrics) -> Iterator[Database]:
    if not settings.enable_dbos:
        log.warning("records_in_memory", extra={"consequence": "a restart forgets all but the file"})
    url = settings.database_url if settings.enable_dbos else IN_MEMORY
    with closing(Database(url, copies=settings.state_directory, metrics=metrics)) as database:
        database.migrate()
        yield database
