"""Brings wg0.conf and the interface up to the records, and puts both back when that fails."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address
from threading import Lock
from typing import Final

from backend.errors import HubUpdateError
from backend.models.access.audit import AuditAction
from backend.models.operator_commands import bring_up
from backend.models.wireguard.keys import WireGuardKey
from backend.services.hand_made_peers import HandMadePeers
from backend.services.ports import Action, Change, Hub, Peer
from backend.services.wireguard_config_manager import ManagedPeer, WireGuardConfigManager

log = logging.getLogger(__name__)

# How long a health check waits for a batch that is being applied before it says that something is wrong.
_CHECK_PATIENCE_SECONDS: Final = 2.0
# How often the interface is looked at when nobody has a reason to: somebody may have used `wg` by hand.
_VERIFY_INTERVAL_SECONDS: Final = 10.0


def managed(peer: Peer) -> ManagedPeer:
    """Return a peer as the file knows it: without keepalive, for it's the node behind NAT that must send."""
    return ManagedPeer(peer.node_id, peer.wireguard_public_key, peer.address)


def _told(end: Callable[[], None]) -> bool:
    try:
        end()
    except HubUpdateError as exc:
        return _not_told(exc)
    return True


def _not_told(exc: HubUpdateError) -> bool:
    log.warning("change_failed", extra={"reason": str(exc), "next": "syncconf"})
    return False


_NONE: Final[Mapping[WireGuardKey, IPv4Address]] = {}


@dataclass(frozen=True, slots=True)
class _Seen:
    """An interface, and what of the file apart from our peers it was told."""

    incarnation: int | None
    foreign: bytes = field(repr=False)


class HubMirror:
    """Keeps file and interface equal to the peers that it was told of.

    What it was told of is what the records hold: it may lag behind them, it never leads.
    """

    def __init__(
        self,
        config: WireGuardConfigManager,
        hub: Hub,
        hand_made: HandMadePeers,
        notice: Callable[[AuditAction, str | None], None] = lambda _action, _reason: None,
    ) -> None:
        """Do nothing yet. `notice` is told what ought to be on record."""
        self._notice = notice
        self._config = config
        self._hub = hub
        self._hand_made = hand_made
        # The operator's part of the file as it was last looked at.
        self._noted_foreign: bytes | None = None
        # Guards _peers and orders everything that is done to file and interface. Held across their I/O.
        self._lock = Lock()
        self._peers: dict[str, ManagedPeer] = {}
        # The interface that is known to equal _peers and the rest of the file, or None while there is none.
        self._confirmed: _Seen | None = None
        # When the interface was last compared with all the peers; None when it has been changed since.
        self._verified_at: float | None = None
        self._problem: str | None = "the hub has not been reconciled yet"

    @property
    def live(self) -> bool:
        """False where only the file is kept."""
        return self._hub.live

    def assume(self, peers: Iterable[Peer]) -> None:
        """Take these peers as the truth from here on."""
        with self._lock:
            self._peers = {peer.node_id: managed(peer) for peer in peers}
            self._confirmed = None

    def reconcile(self) -> str | None:
        """Make file and interface equal to the peers, whatever they hold now; return the problem, or None."""
        with self._lock:
            try:
                self._confirmed = None
                self._update()
            except HubUpdateError as exc:
                self._note_problem(str(exc))
                return str(exc)
            self._note_problem(None)
            return None

    def apply(self, changes: Iterable[Change]) -> str | None:
        """Bring changes to file and interface, all of them or none; return why it failed, or None.

        It may be called again with changes that are there already, and with none at all.
        """
        with self._lock:
            peers, before = self._peers, tuple(self._peers.values())
            added: dict[WireGuardKey, IPv4Address] = {}
            removed: dict[WireGuardKey, IPv4Address] = {}
            for change in changes:
                peer = change.peer
                if change.action is Action.ADD:
                    peers[peer.node_id] = managed(peer)
                    added[peer.wireguard_public_key] = peer.address
                else:
                    peers.pop(peer.node_id, None)
                    removed[peer.wireguard_public_key] = peer.address
            try:
                # Asked before the file is touched, or it would be written twice for nothing.
                self._require_interface()
                self._update(added, removed)
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

    @property
    def problem(self) -> str | None:
        """Why file and interface are not known to equal the peers, or None."""
        return self._problem

    def heal(self) -> bool:
        """Reconcile if file or interface are not what they should be; return whether it was done well."""
        if self._problem is None and self._is_in_step():
            return False
        return self.reconcile() is None

    def _is_in_step(self) -> bool:
        with self._lock:
            try:
                self._config.refresh()
                if self._config.managed_peers != tuple(self._peers.values()):
                    self._notice(AuditAction.CONFIG_EDITED, "our own blocks")
                    return False
                if not self._hub.live:
                    return True
                present = _Seen(self._hub.incarnation(), self._config.foreign_stripped)
                if self._confirmed != present:
                    return False
                verified = self._verified_at
                if verified is None or time.monotonic() - verified >= _VERIFY_INTERVAL_SECONDS:
                    self._verify()
            except HubUpdateError:
                return False
            return True

    def check(self) -> None:
        """Raise HubUpdateError unless a change could be applied now."""
        if not self._lock.acquire(timeout=_CHECK_PATIENCE_SECONDS):
            raise HubUpdateError(self._problem or "an update of the hub takes unusually long")
        try:
            self._config.refresh()
            self._config.check_room()
            self._require_interface()
            if self._problem is not None:
                raise HubUpdateError(self._problem)
        finally:
            self._lock.release()

    def _update(
        self,
        added: Mapping[WireGuardKey, IPv4Address] = _NONE,
        removed: Mapping[WireGuardKey, IPv4Address] = _NONE,
    ) -> None:
        """Write the file and bring the interface up to it, by what is new since the last time if that's told.

        That costs what the change costs. As soon as nothing else is to do, heal() compares the interface
        with all the peers, and tells it everything where they differ.
        """
        peers = self._peers.values()
        changed = self._change(added, removed)
        try:
            self._config.write(peers)
        finally:
            told = changed()
        self._note_foreign()
        self._require_interface()
        if not self._hub.live:
            return
        present = _Seen(self._hub.incarnation(), self._config.foreign_stripped)
        if told and self._confirmed == present:
            return
        self._confirmed = None
        self._hub.sync(self._config.render_stripped(peers))
        self._verify()
        self._confirmed = present

    def _change(
        self, added: Mapping[WireGuardKey, IPv4Address], removed: Mapping[WireGuardKey, IPv4Address]
    ) -> Callable[[], bool]:
        """Begin to tell the interface what is new, if that is all it needs; what is returned waits for it.

        It goes on while the file is written, which takes as long. What that returns is whether the interface
        needs nothing more.
        """
        if self._confirmed is None or self._hand_made.share(removed):
            return lambda: False
        if not (added or removed):
            return lambda: True
        self._verified_at = None
        try:
            end = self._hub.change(added, removed.keys())
        except HubUpdateError as exc:
            return partial(_not_told, exc)
        return partial(_told, end)

    def _verify(self) -> None:
        """Look at the interface itself: `wg` answers 0 to several things that it doesn't do."""
        actual = self._hub.peers()
        for peer in self._peers.values():
            if actual.get(peer.public_key) != frozenset({f"{peer.address}/32"}):
                raise HubUpdateError(f"the interface did not take peer {peer.label} with {peer.address}")
        known: set[str] = {peer.public_key for peer in self._peers.values()}
        known.update(peer.public_key for peer in self._config.foreign_peers)
        surplus = actual.keys() - known
        if surplus:
            raise HubUpdateError(f"the interface kept {len(surplus)} peer(s) that are not in the file")
        self._verified_at = time.monotonic()

    def _put_back(self, before: Sequence[ManagedPeer]) -> None:
        self._peers = {peer.label: peer for peer in before}
        try:
            self._confirmed = None
            self._update()
        except HubUpdateError as exc:
            # Not lost: heal() goes on trying, and nothing is acknowledged before it has succeeded.
            self._note_problem(str(exc))
        else:
            self._note_problem(None)

    def _require_interface(self) -> None:
        if self._hub.live and self._hub.incarnation() is None:
            name = self._config.interface
            raise HubUpdateError(f"interface {name} does not exist; bring it up with {bring_up(name)}")

    def _note_foreign(self) -> None:
        foreign = self._config.foreign
        if foreign != self._noted_foreign:
            if self._noted_foreign is not None:
                self._notice(AuditAction.CONFIG_EDITED, None)
            self._noted_foreign = foreign
            self._hand_made.note(self._config.foreign_peers, self._config.hub_public_key)

    def _note_problem(self, problem: str | None) -> None:
        if problem != self._problem:
            if problem is None:
                log.info(
                    "hub_in_step", extra={"interface": self._config.interface, "peers": len(self._peers)}
                )
            else:
                self._notice(AuditAction.HUB_FAILED, problem)
                log.error("hub_out_of_step", extra={"interface": self._config.interface, "reason": problem})
        self._problem = problem
