"""Makes wg0.conf and the interface equal to the records, and puts both back where that fails."""

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from typing import Final

from backend.errors import HubUpdateError, RecordsUnavailableError
from backend.models.access.audit import AuditAction
from backend.models.wireguard.interface import InterfaceState
from backend.models.wireguard.peer import Change, Peer
from backend.services.hub.config_text import PeerBlock
from backend.services.hub.drift import DriftKind
from backend.services.hub.interface_observer import InterfaceObserver
from backend.services.hub.interface_sync import InterfaceSync
from backend.services.hub.operator_peers import OperatorPeers
from backend.services.hub.removal_guard import HubPeer, RemovalGuard, find_peers
from backend.services.ports import Hub
from backend.services.wireguard_config_manager import StagedConfig, WireGuardConfigManager

log = logging.getLogger(__name__)

# How long a health check waits for a batch that is being applied before it says that something is wrong.
_CHECK_PATIENCE_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class PreparedChanges:
    """Changes whose new file is written beside the old one. `apply`, or `staged.discard`, has to follow."""

    changes: Sequence[Change]
    # The blocks that the file has then, by node_id.
    blocks: dict[str, PeerBlock]
    staged: StagedConfig


class Reconciler:
    """Keeps file and interface equal to the desired peers, which are the peers of the records.

    File and interface may lag behind the records; they never lead.
    """

    def __init__(  # noqa: PLR0913 - the parts that it brings together
        self,
        config: WireGuardConfigManager,
        hub: Hub,
        operator_peers: OperatorPeers,
        observer: InterfaceObserver,
        *,
        notice: Callable[[AuditAction, str | None], None] = lambda _action, _reason: None,
        guard: RemovalGuard | None = None,
    ) -> None:
        """Read nothing yet. `notice` writes a row of the audit log."""
        self._notice = notice
        self._metrics = observer.metrics
        self._config = config
        self._operator_peers = operator_peers
        self._interface = InterfaceSync(config, hub, operator_peers, observer)
        self._guard = guard or RemovalGuard(lambda keys: keys)
        # Syncs a new file while the records are written.
        self._executor = ThreadPoolExecutor(1, "hub-file")
        # Why endpoints could not be given back the last time, or None.
        self._restore_problem: str | None = None
        # The operator's part of the file as it was last read.
        self._noted_text: bytes | None = None
        # The kinds of drift that were found and not mended yet.
        self._drifted: set[DriftKind] = set()
        # Guards _desired and orders everything that is done to file and interface. Held across their I/O.
        self._lock = Lock()
        self._desired: dict[str, PeerBlock] = {}
        # Why file and interface are not known to equal the desired peers, or None. Read by any thread.
        self.problem: str | None = "the hub has not been reconciled yet"

    @property
    def paused(self) -> bool:
        """Whether an operator has to decide before anything is changed."""
        return self._guard.paused

    def close(self) -> None:
        """Stop the thread that syncs files."""
        self._executor.shutdown()

    def set_desired(self, peers: Iterable[Peer]) -> None:
        """Take these peers as the desired ones from here on."""
        with self._lock:
            self._desired = {peer.node_id: PeerBlock.of(peer) for peer in peers}
            self._interface.require_full_sync()
            # The operator's addresses have to be known before the first request, even if reconciling fails.
            self._note_operators_part()

    def reconcile(self) -> str | None:
        """Make file and interface equal to the desired peers, whatever they hold; return a problem, or None.

        Many peers that the records have never known stop it.
        """
        with self._lock:
            try:
                self._reconcile()
            except (HubUpdateError, RecordsUnavailableError) as exc:
                self._note_problem(str(exc))
                return str(exc)
            self._note_problem(None)
            self._metrics.drift_mended(self._drifted)
            self._drifted = set()
            return None

    def find_peers(self, *, in_file: bool = False) -> list[HubPeer]:
        """Return our peers in the file, and on the interface unless only `in_file`; raise HubUpdateError."""
        with self._lock:
            self._config.refresh()
            return self._find_peers(None if in_file else self._interface.inspect())

    def prepare(self, changes: Sequence[Change], *, cautious: bool = False) -> PreparedChanges:
        """Write the new file, with these changes, beside the old one. Nothing is replaced yet.

        It is synced while the records are written. Raises HubUpdateError where it can't be written, and if
        `cautious` also where the file could not be replaced now.
        """
        if cautious:
            self._config.check_replaceable()
        blocks = dict(self._desired)
        for change in changes:
            if change.after is None:
                blocks.pop(change.peer.node_id, None)
            else:
                blocks[change.after.node_id] = PeerBlock.of(change.after)
        return PreparedChanges(changes, blocks, self._config.stage(blocks.values(), self._executor))

    def apply(self, prepared: PreparedChanges) -> str | None:
        """Bring changes to file and interface, all of them or none; return why it failed, or None.

        The file is replaced first, so a failure of the disk never reaches the interface.
        """
        with self._lock:
            try:
                # Checked before the file is replaced: without an interface it would have to be put back.
                self._interface.require()
                replaced = self._config.put_in_place(prepared.staged)
            except HubUpdateError as exc:
                prepared.staged.discard()
                return str(exc)
            before, self._desired = self._desired, prepared.blocks
            try:
                self._apply_to_interface(prepared.changes, replaced=replaced)
            except HubUpdateError as exc:
                self._put_back(before)
                return str(exc)
            self._note_problem(None)
            return None

    def refresh(self) -> None:
        """Read the file if it was changed since; raise ConfigFileError if it can't be used."""
        with self._lock:
            self._config.refresh()
            self._note_operators_part()

    def remove_leftovers(self) -> None:
        """Delete temporary files that an earlier failure left. Only while nothing is prepared."""
        with suppress(HubUpdateError):
            self._config.remove_stale_temporaries()

    def require_interface(self) -> None:
        """Raise HubUpdateError unless there is an interface to tell."""
        with self._lock:
            self._interface.require()

    def reconcile_if_needed(self, *, idle: bool = True) -> bool:
        """Reconcile after a failure, drift or an edit; return whether that was needed and succeeded."""
        if self.problem is None and self._is_reconciled(idle=idle):
            return False
        return self.reconcile() is None

    def restore_endpoints(self) -> None:
        """Give peers their endpoints back where the interface has lost them; see InterfaceSync."""
        if self.problem is not None:
            return
        with self._lock:
            try:
                restored = self._interface.restore_endpoints()
            except HubUpdateError as exc:
                # Tried again each second, and logged once.
                if str(exc) != self._restore_problem:
                    log.warning("endpoints_not_restored", extra={"reason": str(exc)})
                self._restore_problem = str(exc)
                return
        self._restore_problem = None
        if restored:
            log.info("endpoints_restored", extra={"peers": restored})

    def check(self) -> None:
        """Raise HubUpdateError unless a change could be applied now, and a peer be reached."""
        if not self._lock.acquire(timeout=_CHECK_PATIENCE_SECONDS):
            raise HubUpdateError(self.problem or "an update of the hub takes unusually long")
        try:
            self._config.refresh()
            self._config.check_replaceable()
            self._interface.require()
            if self.problem is not None:
                raise HubUpdateError(self.problem)
            self._interface.check()
        finally:
            self._lock.release()

    def _is_reconciled(self, *, idle: bool) -> bool:
        with self._lock:
            try:
                self._config.refresh()
                if self._config.parsed.blocks != tuple(self._desired.values()):
                    self._notice(AuditAction.CONFIG_EDITED, "our own blocks")
                    self._note_drift({DriftKind.FILE})
                    return False
                drift = self._interface.find_drift(idle=idle)
            except HubUpdateError:
                return False
            if drift:
                log.warning(
                    "interface_drifted", extra={"interface": self._config.interface, "found": str(drift)}
                )
                self._notice(AuditAction.DRIFT_FOUND, str(drift))
                self._note_drift(drift.kinds)
            return drift is not None and not drift

    def _note_drift(self, kinds: set[DriftKind]) -> None:
        self._metrics.drift_found(kinds)
        self._drifted |= kinds

    def _reconcile(self) -> None:
        self._interface.require_full_sync()
        self._config.refresh()
        actual, unseen = None, None
        try:
            actual = self._interface.inspect()
        except HubUpdateError as exc:
            unseen = exc
        desired = {block.public_key for block in self._desired.values()}
        unknown = self._guard.check(self._find_peers(actual), desired)
        if unknown:
            log.warning("unknown_peers_removed", extra={"peers": unknown})
        replaced = self._config.put_in_place(self._config.stage(self._desired.values()))
        if unseen is not None:
            # Raised after the file was written, because the hub boots from it.
            raise unseen
        self._apply_to_interface((), replaced=replaced, inspected=actual is not None)

    def _find_peers(self, actual: InterfaceState | None) -> list[HubPeer]:
        operators_keys = {peer.public_key for peer in self._config.parsed.operator_peers}
        return find_peers(self._config.parsed.blocks, actual, operators_keys)

    def _apply_to_interface(
        self, changes: Sequence[Change], *, replaced: bool, inspected: bool = False
    ) -> None:
        """Make the new file durable and the interface equal to it; raise HubUpdateError.

        `wg set` tells the interface these changes alone, so its cost doesn't grow with the number of peers.
        `reconcile_if_needed` compares the whole interface with the whole file from time to time.
        """
        added = [change.after for change in changes if change.before is None and change.after is not None]
        removed = [change.before for change in changes if change.after is None and change.before is not None]
        end = self._interface.start(added, removed)
        try:
            if replaced:
                self._config.sync_directory()
        finally:
            told = end()
        self._note_operators_part()
        self._interface.finish(told=told, inspected=inspected)

    def _put_back(self, before: dict[str, PeerBlock]) -> None:
        self._desired = before
        self._interface.require_full_sync()
        try:
            self._apply_to_interface(
                (), replaced=self._config.put_in_place(self._config.stage(before.values()))
            )
        except HubUpdateError as exc:
            # Not lost: reconcile_if_needed() goes on trying, and no change ends well before it has succeeded.
            self._note_problem(str(exc))
        else:
            self._note_problem(None)

    def _note_operators_part(self) -> None:
        text = self._config.parsed.operator_text
        if text != self._noted_text:
            if self._noted_text is not None:
                self._notice(AuditAction.CONFIG_EDITED, None)
            self._noted_text = text
            self._operator_peers.note(self._config.parsed.operator_peers, self._config.parsed.hub_public_key)

    def _note_problem(self, problem: str | None) -> None:
        if problem != self.problem:
            if problem is None:
                log.info(
                    "hub_in_step", extra={"interface": self._config.interface, "peers": len(self._desired)}
                )
            else:
                self._notice(AuditAction.HUB_PAUSED if self.paused else AuditAction.HUB_FAILED, problem)
                log.error("hub_out_of_step", extra={"interface": self._config.interface, "reason": problem})
        self.problem = problem
