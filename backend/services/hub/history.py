"""Detects records that are new or older than the hub, and carries out the operator's decision about them.

New records adopt the peers of the file. Records that are older than the hub pause the service until an
operator decides: the command line writes the decision to the records, and the service carries it out.
"""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_network

from backend.models.access.audit import AuditAction, AuditOutcome
from backend.models.access.callers import SERVICE
from backend.models.operator_commands import command
from backend.models.wireguard.keys import WireGuardKey
from backend.models.wireguard.peer import UNRECORDED_PUBLIC_KEY, Peer, only_address
from backend.models.wireguard.records import Decision, NewGeneration, RecordedState
from backend.services.hub.mark import HubMark, Mark
from backend.services.hub.reconciler import Reconciler
from backend.services.hub.removal_guard import HubPeer, RemovalGuard, fingerprint, stepped_back
from backend.services.ports import Records

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Adoption:
    """Peers that can be taken into the records, and those whose key or address can't be."""

    peers: list[Peer]
    refused: list[HubPeer]


def adopt(found: Iterable[HubPeer], recorded: Sequence[Peer]) -> Adoption:
    """Make records of peers that were found on the hub.

    A peer without a name, or with a name that is taken, gets one that is made from its key. Of two peers with
    the same address the later one gets it, as on the interface.
    """
    names = {peer.node_id for peer in recorded}
    addresses = {peer.address for peer in recorded}
    # As records have it, in whole seconds.
    now = datetime.now(UTC).replace(microsecond=0)
    adoption = Adoption([], [])
    for peer in reversed(list(found)):
        address = only_address([ip_network(text) for text in peer.allowed_ips])
        try:
            key = WireGuardKey.parse_written(peer.public_key)
        except ValueError:
            address = None
        if address is None or address in addresses:
            adoption.refused.append(peer)
            continue
        name = peer.label
        if name is None or name in names:
            name = f"adopted-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        names.add(name)
        addresses.add(address)
        adoption.peers.append(Peer(name, UNRECORDED_PUBLIC_KEY, key, address, now))
    adoption.peers.reverse()
    return adoption


class HubHistory:
    """Compares the records with the mark of this hub. Used by the agent's thread, after its start.

    The start uses it in its own thread, before the agent's thread runs.
    """

    def __init__(self, records: Records, reconciler: Reconciler, guard: RemovalGuard, mark: HubMark) -> None:
        self._records = records
        self._reconciler = reconciler
        self._guard = guard
        self._file = mark
        self._mark = Mark()
        # Whether a decision has, or may have, changed the records since the agent loaded them.
        self._decided = False
        # Messages for the operator that /readyz shows though the service works.
        self.notices: tuple[str, ...] = ()

    def compare(self, state: RecordedState) -> bool:
        """Compare the records with what this hub has reached; return whether that has changed them.

        New records adopt the file's peers. Records that are older than the hub pause the service.
        """
        self._mark = self._file.read()
        new = state.generation == 0 and not state.peers
        adopted = self._adopt_file() if new else False
        if not new:
            self._compare(state)
        self.notices = self._records.status().notices
        return adopted

    def note_reached(self, generation: int) -> None:
        """Note that the hub has reached a generation."""
        self._raise_mark(generation, (self._mark.audit_sequence, self._mark.audit_hash))

    def follow_decision(self, generation: int) -> bool:
        """Carry out an operator's decision, if there is one; return whether that has changed the records.

        Then call `end_pause`. Raises RecordsUnavailableError or HubUpdateError where the decision can't be
        carried out now; the next call tries again.
        """
        status = self._records.status()
        self.notices = status.notices
        if self._guard.paused and status.decision is not None:
            # Still there, so an attempt whose commit got no answer was not committed.
            self._decided = False
            self._carry_out(status.decision, status.basis)
        if self._decided or self._guard.paused:
            return self._decided
        if self._records.durable:
            self._raise_mark(generation, status.audit_head)
        if status.decision is not None:
            # The service isn't paused, so the decision is for an earlier situation.
            self._records.dismiss_decision()
        return False

    def end_pause(self) -> None:
        """End the pause, once the agent has loaded the records that the decision has changed."""
        self._decided = False
        self._guard.resume()

    def _raise_mark(self, generation: int, audit_head: tuple[int, str]) -> None:
        self._mark = Mark(max(generation, self._mark.generation), *audit_head)
        self._file.write(self._mark)

    def _compare(self, state: RecordedState) -> None:
        sequence = self._mark.audit_sequence
        hash_there = self._records.audit_hash(sequence) if sequence else None
        reason = stepped_back(state, self._mark, hash_there)
        if reason is not None:
            self._guard.pause_for(reason)
        if sequence and hash_there is None:
            log.warning(
                "audit_log_stepped_back",
                extra={
                    "reached": sequence,
                    "consequence": "credentials that were revoked since work again; revoke them once more",
                },
            )

    def _adopt_file(self) -> bool:
        adoption = adopt(self._reconciler.find_peers(in_file=True), ())
        count = len(adoption.peers)
        if count == 0 and self._mark.generation == 0:
            return False
        # A generation is written also without peers: it has to be above the one of the mark.
        if count:
            log.warning("peers_adopted", extra={"peers": count, "reason": "the records were new"})
        notice = (
            f"{count} peers were taken from the config into records that were new; check that no records "
            f"were lost, then run {command('reconcile --acknowledge')}"
        )
        self._add_generation(
            AuditAction.PEERS_ADOPTED, f"{count} peers, from the config", adoption, notice if count else None
        )
        return True

    def _carry_out(self, decision: Decision, basis: str | None) -> None:
        recorded = self._records.load()
        keys = {peer.wireguard_public_key for peer in recorded.peers}
        unknown = self._guard.unknown(self._reconciler.find_peers(), keys)
        if basis not in {None, fingerprint(unknown)}:
            reason = "the hub's unknown peers are others than those that were shown"
            log.warning("decision_dismissed", extra={"decision": decision.value, "reason": reason})
            self._records.dismiss_decision()
            return
        if decision is Decision.ADOPT:
            action, adoption = AuditAction.PEERS_ADOPTED, adopt(unknown, recorded.peers)
        else:
            action, adoption = AuditAction.PEERS_REMOVED, Adoption([], unknown)
        reason = f"{len(adoption.peers)} taken into the records, {len(adoption.refused)} off the hub"
        log.warning("decision_carried_out", extra={"decision": decision.value, "result": reason})
        # Set before the write: after a lost answer the records may have changed.
        self._decided = True
        self._add_generation(action, reason, adoption, None, recorded.generation)

    def _add_generation(
        self,
        action: AuditAction,
        reason: str,
        adoption: Adoption,
        notice: str | None,
        generation: int = 0,
    ) -> None:
        """Write the adopted peers under a generation above any that this hub has reached.

        Records in memory take the reached generation itself: durable records that are used again later are
        then not older than the hub unless a change was made meanwhile.
        """
        reached = max(generation, self._mark.generation) + (1 if self._records.durable else 0)
        self._records.adopt(
            NewGeneration(
                generation=reached,
                peers=adoption.peers,
                removed=[(peer.public_key, peer.label or "") for peer in adoption.refused],
                event=SERVICE.event(datetime.now(UTC), action, AuditOutcome.NOTED, reason=reason),
                notice=notice if self._records.durable else None,
            )
        )
        if self._records.durable:
            # From now on records are compared with these.
            self._raise_mark(reached, self._records.status().audit_head)
