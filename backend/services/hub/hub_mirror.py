"""Brings wg0.conf and the interface up to the records, and puts both back when that fails."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Final

from backend.errors import HubUpdateError, RecordsUnavailableError
from backend.models.access.audit import AuditAction
from backend.models.operator_commands import bring_up, command, put_key_back
from backend.models.wireguard.interface_state import InterfaceState
from backend.models.wireguard.peer import Peer
from backend.services.hub.config_text import PeerBlock, render
from backend.services.hub.drift import Drift, compare
from backend.services.hub.operator_peers import OperatorPeers
from backend.services.hub.prepared_changes import PreparedChanges
from backend.services.hub.removal_guard import FoundPeers, RemovalGuard
from backend.services.ports import Change, Hub
from backend.services.wireguard_config_manager import WireGuardConfigManager

log = logging.getLogger(__name__)

# How long a health check waits for a batch that is being applied before it says that something is wrong.
_CHECK_PATIENCE_SECONDS: Final = 2.0
# How often the whole interface is compared with the whole file, whatever the load: seconds. With a burst of
# batches, which is not interrupted for it, that is never later than ten.
_VERIFY_INTERVAL_SECONDS: Final = 8.0
# A comparison takes at most this share of the time.
_VERIFY_SHARE: Final = 0.1


def _told(end: Callable[[], None]) -> bool:
    try:
        end()
    except HubUpdateError as exc:
        return _not_told(exc)
    return True


def _not_told(exc: HubUpdateError) -> bool:
    log.warning("change_failed", extra={"reason": str(exc), "next": "syncconf"})
    return False


@dataclass(frozen=True, slots=True)
class _Seen:
    """An interface, and what of the file apart from our peers it was told."""

    ifindex: int | None
    foreign: bytes = field(repr=False)


class HubMirror:
    """Keeps file and interface equal to the peers that it was told of.

    What it was told of is what the records hold: it may lag behind them, it never leads.
    """

    def __init__(
        self,
        config: WireGuardConfigManager,
        hub: Hub,
        hand_made: OperatorPeers,
        *,
        notice: Callable[[AuditAction, str | None], None] = lambda _action, _reason: None,
        guard: RemovalGuard | None = None,
    ) -> None:
        """Do nothing yet. `notice` is told what ought to be on record."""
        self._notice = notice
        self._config = config
        self._hub = hub
        self._hand_made = hand_made
        self._guard = guard or RemovalGuard(lambda keys: keys)
        self._executor = ThreadPoolExecutor(1, "hub-file")
        # The operator's part of the file as it was last looked at.
        self._noted_foreign: bytes | None = None
        # Guards _peers and orders everything that is done to file and interface. Held across their I/O.
        self._lock = Lock()
        self._peers: dict[str, PeerBlock] = {}
        # The interface that is known to equal _peers and the rest of the file, or None while there is none.
        self._confirmed: _Seen | None = None
        # When the interface was last compared with all of the file, how long that took, and whether it was
        # changed since.
        self._verified_at = float("-inf")
        self._verify_seconds = 0.0
        self._changed_since = False
        self._problem: str | None = "the hub has not been reconciled yet"

    @property
    def live(self) -> bool:
        """False where only the file is kept."""
        return self._hub.live

    @property
    def problem(self) -> str | None:
        """Why file and interface are not known to equal the peers, or None."""
        return self._problem

    @property
    def paused(self) -> bool:
        """Whether an operator has to decide before anything is changed."""
        return self._guard.paused

    def close(self) -> None:
        """Stop the thread that writes files."""
        self._executor.shutdown()

    def assume(self, peers: Iterable[Peer]) -> None:
        """Take these peers as the truth from here on."""
        with self._lock:
            self._peers = {peer.node_id: PeerBlock.of(peer) for peer in peers}
            self._confirmed = None
            # Known before the first request, whatever becomes of the reconciliation.
            self._note_foreign()

    def reconcile(self) -> str | None:
        """Make file and interface equal to the peers, whatever they hold now; return the problem, or None.

        Peers that the records have never known stop it where they are many.
        """
        with self._lock:
            try:
                self._reconcile()
            except (HubUpdateError, RecordsUnavailableError) as exc:
                self._note_problem(str(exc))
                return str(exc)
            self._note_problem(None)
            return None

    def found_in_file(self) -> FoundPeers:
        """Return our peers in the file; raise ConfigFileError."""
        with self._lock:
            self._config.refresh()
            return self._found(None)

    def found(self) -> FoundPeers:
        """Return our peers in the file and on the interface; raise HubUpdateError."""
        with self._lock:
            self._config.refresh()
            return self._found(self._inspect())

    def prepare(self, changes: Sequence[Change]) -> PreparedChanges:
        """Write, beside the file, what it is to be with these changes. Nothing is replaced yet.

        It is made durable while others go on. Raises HubUpdateError where it can't be written.
        """
        return PreparedChanges.begin(
            self._peers, changes, lambda peers: self._config.stage(peers, self._executor)
        )

    def apply(self, prepared: PreparedChanges) -> str | None:
        """Bring changes to file and interface, all of them or none; return why it failed, or None.

        What the disk refuses never reaches the interface.
        """
        with self._lock:
            try:
                # Asked before the file is touched, or it would be written twice for nothing.
                self._require_interface()
                replaced = self._config.put_in_place(prepared.staged)
            except HubUpdateError as exc:
                prepared.discard()
                return str(exc)
            before, self._peers = self._peers, prepared.peers
            try:
                self._finish(prepared.added, prepared.removed, replaced=replaced)
            except HubUpdateError as exc:
                self._put_back(before)
                return str(exc)
            self._note_problem(None)
            return None

    def refresh(self) -> None:
        """Notice what an operator did to the file since; raise ConfigFileError if it can't be used."""
        with self._lock:
            self._config.refresh()
            self._note_foreign()

    def remove_leftovers(self) -> None:
        """Remove temporary files that could not be removed in their time. Only while nothing is prepared."""
        with suppress(HubUpdateError):
            self._config.remove_stale_temporaries()

    def require_interface(self) -> None:
        """Raise HubUpdateError unless there is an interface to tell."""
        with self._lock:
            self._require_interface()

    def check_replaceable(self) -> None:
        """Raise HubUpdateError where the file could not be replaced now."""
        with self._lock:
            self._config.check_replaceable()

    def heal(self, *, idle: bool = True) -> bool:
        """Reconcile if file or interface are not what they should be; return whether it was done well."""
        if self._problem is None and self._is_in_step(idle=idle):
            return False
        return self.reconcile() is None

    def check(self) -> None:
        """Raise HubUpdateError unless a change could be applied now, and a peer be reached."""
        if not self._lock.acquire(timeout=_CHECK_PATIENCE_SECONDS):
            raise HubUpdateError(self._problem or "an update of the hub takes unusually long")
        try:
            self._config.refresh()
            self._config.check_replaceable()
            self._require_interface()
            if self._problem is not None:
                raise HubUpdateError(self._problem)
            if self._hub.live and not self._is_known():
                raise HubUpdateError(
                    f"interface {self._config.interface} is new and gets its peers within a second or two"
                )
            if (problem := self._hub.link_problem()) is not None:
                raise HubUpdateError(problem)
        finally:
            self._lock.release()

    def _is_in_step(self, *, idle: bool) -> bool:
        with self._lock:
            try:
                self._config.refresh()
                if self._config.parsed.blocks != tuple(self._peers.values()):
                    self._notice(AuditAction.CONFIG_EDITED, "our own blocks")
                    return False
                if not self._hub.live:
                    return True
                present = _Seen(self._hub.ifindex(), self._config.parsed.operator_stripped)
                if self._confirmed != present:
                    return False
                if not self._verification_is_due(idle=idle):
                    return True
                drift = self._verify()
            except HubUpdateError:
                return False
            if drift:
                log.warning(
                    "interface_drifted", extra={"interface": self._config.interface, "found": str(drift)}
                )
                self._notice(AuditAction.DRIFT_FOUND, str(drift))
            return not drift

    def _verification_is_due(self, *, idle: bool) -> bool:
        since = time.monotonic() - self._verified_at
        shortest = self._verify_seconds / _VERIFY_SHARE
        if self._changed_since and idle:
            return since >= shortest
        return since >= max(shortest, _VERIFY_INTERVAL_SECONDS)

    def _reconcile(self) -> None:
        self._confirmed = None
        self._config.refresh()
        actual, unseen = None, None
        try:
            actual = self._inspect()
        except HubUpdateError as exc:
            unseen = exc
        unknown = self._guard.check(self._found(actual), {peer.public_key for peer in self._peers.values()})
        if unknown:
            log.warning("unknown_peers_removed", extra={"peers": unknown})
        replaced = self._config.put_in_place(self._config.stage(self._peers.values()))
        if unseen is not None:
            # The file is right all the same: the hub boots from it.
            raise unseen
        self._finish((), (), replaced=replaced, inspected=actual is not None)

    def _found(self, actual: InterfaceState | None) -> FoundPeers:
        operators_keys = {peer.public_key for peer in self._config.parsed.operator_peers}
        return FoundPeers.of(self._config.parsed.blocks, actual, operators_keys)

    def _inspect(self) -> InterfaceState | None:
        """Return what the interface has, None where there is none; raise HubUpdateError for another's."""
        if not self._hub.live or self._hub.ifindex() is None:
            return None
        state = self._hub.state()
        new = state.public_key is None and not state.peers
        key = self._config.parsed.hub_public_key
        if state.public_key != key and not new:
            name = self._config.interface
            raise HubUpdateError(
                f"interface {name} has another private key (its public key is {state.public_key}) than "
                f"{self._config.path} ({key}), so it may belong to another program "
                "and was left alone. If it does, give this hub another name with WIREGUARD_CONFIG_PATH. If "
                f"it is this hub's: {put_key_back(name)}. Where the key was changed on purpose, run "
                f"{command('hub up --replace-key')}"
            )
        return state

    def _finish(
        self,
        added: Sequence[Peer],
        removed: Sequence[Peer],
        *,
        replaced: bool,
        inspected: bool = False,
    ) -> None:
        """Bring the interface up to the file: by `wg set` of these changes, or by `wg syncconf` of the whole.

        `wg set` costs what the change costs. `heal` compares the interface with the whole file now and then,
        and syncs all of it where they differ.
        """
        changed = self._change(added, removed)
        try:
            if replaced:
                self._config.sync_directory()
        finally:
            told = changed()
        self._note_foreign()
        if not self._hub.live:
            return
        ifindex = self._hub.ifindex()
        if ifindex is None:
            raise self._no_interface()
        present = _Seen(ifindex, self._config.parsed.operator_stripped)
        if told and self._confirmed == present:
            return
        self._confirmed = None
        if not inspected:
            self._inspect()
        self._sync()
        self._confirmed = present

    def _change(self, added: Sequence[Peer], removed: Sequence[Peer]) -> Callable[[], bool]:
        """Start `wg set` for these changes, where they are all that the interface lacks.

        It runs while the directory is synced. Returns a function that waits for it, and then returns False
        where a full sync is still needed.
        """
        # One that was made anew meanwhile may be another program's.
        if not self._is_known():
            return lambda: False
        if self._hand_made.share(removed):
            return lambda: False
        if not (added or removed):
            return lambda: True
        self._changed_since = True
        try:
            end = self._hub.change(added, removed)
        except HubUpdateError as exc:
            return partial(_not_told, exc)
        return partial(_told, end)

    def _sync(self) -> None:
        """Tell the interface everything, and look whether it took it; raise HubUpdateError."""
        self._hub.sync(render(self._config.parsed.operator_stripped, self._peers.values()))
        drift = self._verify()
        if drift:
            self._hub.clear(drift)
            drift = self._verify()
        if drift:
            raise HubUpdateError(f"interface {self._config.interface} did not take the config: {drift}")

    def _verify(self) -> Drift:
        """Compare the interface with the file: `wg` answers 0 to several things that it doesn't do."""
        began = time.monotonic()
        actual = self._inspect()
        if actual is None:
            raise self._no_interface()
        drift = compare(actual, self._config.parsed)
        self._verified_at = time.monotonic()
        self._verify_seconds = self._verified_at - began
        self._changed_since = False
        return drift

    def _put_back(self, before: dict[str, PeerBlock]) -> None:
        self._peers = before
        try:
            self._confirmed = None
            replaced = self._config.put_in_place(self._config.stage(before.values()))
            self._finish((), (), replaced=replaced)
        except HubUpdateError as exc:
            # Not lost: heal() goes on trying, and nothing is acknowledged before it has succeeded.
            self._note_problem(str(exc))
        else:
            self._note_problem(None)

    def _is_known(self) -> bool:
        """Say whether the interface is the one that was brought up to the config last."""
        return self._confirmed is not None and self._confirmed.ifindex == self._hub.ifindex()

    def _require_interface(self) -> None:
        if self._hub.live and self._hub.ifindex() is None:
            raise self._no_interface()

    def _no_interface(self) -> HubUpdateError:
        name = self._config.interface
        return HubUpdateError(f"interface {name} does not exist; bring it up with {bring_up(name)}")

    def _note_foreign(self) -> None:
        foreign = self._config.parsed.operator_text
        if foreign != self._noted_foreign:
            if self._noted_foreign is not None:
                self._notice(AuditAction.CONFIG_EDITED, None)
            self._noted_foreign = foreign
            self._hand_made.note(self._config.parsed.operator_peers, self._config.parsed.hub_public_key)

    def _note_problem(self, problem: str | None) -> None:
        if problem != self._problem:
            if problem is None:
                log.info(
                    "hub_in_step", extra={"interface": self._config.interface, "peers": len(self._peers)}
                )
            else:
                self._notice(AuditAction.HUB_PAUSED if self.paused else AuditAction.HUB_FAILED, problem)
                log.error("hub_out_of_step", extra={"interface": self._config.interface, "reason": problem})
        self._problem = problem
