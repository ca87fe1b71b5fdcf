"""Doubles with behaviour, for unit tests; each satisfies the Protocol that the real thing does."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime

from backend.errors import HubUpdateError, OvertakenError, RecordsUnavailableError
from backend.models.access.answers import Answer
from backend.models.access.audit import AuditEvent, AuditQuery, AuditRecord
from backend.models.access.credentials import Credential
from backend.models.access.limit_kind import LimitKind
from backend.models.wireguard.interface_state import InterfacePeer, InterfaceState
from backend.models.wireguard.keys import WireGuardPrivateKey
from backend.models.wireguard.peer import Peer
from backend.services.hub.drift import Drift
from backend.services.ports import (
    AccessStore,
    Batch,
    Hub,
    Journal,
    NextBatch,
    RateLimiter,
    RecordedState,
)
from tests.harness.memory_journal import MemoryJournal


class FakeHub:
    """An interface in memory. It can vanish, come back empty, and refuse to be told anything."""

    live = True

    def __init__(self) -> None:
        self.table: dict[str, frozenset[str]] = {}
        self.broken: str | None = None
        # How often it will fail before it works again.
        self.failures = 0
        # Takes the next configuration, and reports failure all the same, as a `wg` that is killed may.
        self.takes_it_but_fails = False
        self.syncs = 0
        self.changes = 0
        self._index = 1
        self._up = True
        # The public half of the key that it was given last, or that it has from another program.
        self.key: str | None = None
        self.port = 0

    def vanish(self) -> None:
        """Delete the interface."""
        self._up, self.table, self.key = False, {}, None

    def come_back(self) -> None:
        """Make the interface anew, without peers."""
        self._up, self.table, self._index = True, {}, self._index + 1

    def change(self, added: Sequence[Peer], removed: Sequence[Peer]) -> Callable[[], None]:
        self.changes += 1
        self._fail_if_it_must()

        def end() -> None:
            for peer in removed:
                self.table.pop(peer.wireguard_public_key, None)
            for peer in added:
                self._give(peer.wireguard_public_key, frozenset(map(str, peer.allowed_ips)))
            if self.takes_it_but_fails:
                raise HubUpdateError("killed")

        return end

    def sync(self, stripped: bytes) -> None:
        self.syncs += 1
        self._fail_if_it_must()
        self.table = {}
        key = ""
        for line in stripped.decode("latin-1").split("\n"):
            name, _, value = (part.strip() for part in line.partition("="))
            if name.lower() == "publickey":
                key = value
                self._give(key, frozenset())
            elif name.lower() == "allowedips":
                self._give(key, self.table[key] | frozenset(value.replace(" ", "").split(",")))
            elif name.lower() == "listenport":
                self.port = int(value)
        self.key = _public_key(stripped)
        if self.takes_it_but_fails:
            raise HubUpdateError("killed")

    def _give(self, key: str, allowed: frozenset[str]) -> None:
        """Give a peer its AllowedIPs, and take them from whichever peer had them, as an interface does."""
        self.table = {other: theirs - allowed for other, theirs in self.table.items()}
        self.table[key] = allowed

    def _fail_if_it_must(self) -> None:
        if self.failures:
            self.failures -= 1
            raise HubUpdateError("not this time")
        if self.broken is not None or not self._up:
            raise HubUpdateError(self.broken or "no such device")

    def close(self) -> None:
        pass

    def clear(self, drift: Drift) -> None:
        self._fail_if_it_must()

    def state(self) -> InterfaceState:
        if not self._up:
            raise HubUpdateError("no such device")
        peers = {key: InterfacePeer(allowed) for key, allowed in self.table.items()}
        return InterfaceState(self.key, self.port, 0, peers)

    def link_problem(self) -> str | None:
        return None

    def ifindex(self) -> int | None:
        return self._index if self._up else None


def _public_key(stripped: bytes) -> str | None:
    found = re.search(rb"(?m)^PrivateKey=(.*)$", stripped)
    return None if found is None else WireGuardPrivateKey.parse(found[1].decode()).public_key()


class FlakyJournal(MemoryJournal):
    """Records that stop answering at a chosen moment, and answer again when `failing_at` is cleared."""

    def __init__(self) -> None:
        super().__init__()
        # "check", "load", "intend" (nothing written), "intended" (written), "applied" (done), "revoke".
        self.failing_at: set[str] = set()

    def _fail(self, moment: str) -> None:
        if moment in self.failing_at:
            raise RecordsUnavailableError(f"no answer at {moment}")

    def overtake(self) -> None:
        """Write to the records as another process would."""
        self._generation += 5

    def check(self) -> None:
        self._fail("check")

    def load(self) -> RecordedState:
        self._fail("load")
        return super().load()

    def intend(self, batch: Batch) -> None:
        self._fail("intend")
        if batch.generation != self._generation + 1:
            raise OvertakenError
        super().intend(batch)
        self._fail("intended")

    def apply(self, batch: Batch) -> str | None:
        failure = super().apply(batch)
        self._fail("applied")
        return failure

    def revoke(self, batch: Batch) -> None:
        self._fail("revoke")
        super().revoke(batch)


class GatedJournal(MemoryJournal):
    """Records that wait at a gate before each batch, so that a test can look at what is under way."""

    def __init__(self, gate: Callable[[Batch], object]) -> None:
        super().__init__()
        self._gate = gate

    def run(self, next_batch: NextBatch) -> None:
        def gated() -> Batch | None:
            batch = next_batch()
            if batch is not None:
                self._gate(batch)
            return batch

        super().run(gated)


class FakeAccessStore:
    """Credentials and an audit log in memory."""

    def __init__(self) -> None:
        self.version = 0
        self.credentials: dict[str, Credential] = {}
        self.events: list[AuditEvent] = []
        self.answers: dict[tuple[str, str], Answer] = {}
        self.used: dict[str, datetime] = {}
        self.away = False

    def _answer(self) -> None:
        if self.away:
            raise RecordsUnavailableError("away")

    def load_credentials(self) -> tuple[int, list[Credential]]:
        self._answer()
        return self.version, list(self.credentials.values())

    def credentials_version(self) -> int:
        self._answer()
        return self.version

    def keep_credential(self, credential: Credential, event: AuditEvent) -> None:
        self._answer()
        self.credentials[credential.id] = credential
        self.version += 1
        self.events.append(event)

    def revoke_credential(self, credential_id: str, event: AuditEvent) -> Credential | None:
        self._answer()
        known = self.credentials.get(credential_id)
        if known is not None:
            known = self.credentials[credential_id] = replace(known, revoked_at=event.at)
            self.version += 1
            self.events.append(event)
        return known

    def write(self, events: Sequence[AuditEvent], used: Mapping[str, datetime]) -> None:
        self._answer()
        self.events += events
        self.used |= used

    def audit_page(self, query: AuditQuery) -> list[AuditRecord]:
        return []

    def prune_audit(self, before: datetime, limit: int, event: AuditEvent) -> int:
        self._answer()
        return 0

    def find_answer(self, scope: str, key_hash: str) -> Answer | None:
        return self.answers.get((scope, key_hash))

    def tidy(self) -> None:
        self._answer()


class NoLimits:
    """Lets everybody come as often as they like."""

    async def hit(self, kind: LimitKind, who: str) -> int | None:
        return None

    async def close(self) -> None:
        pass


__: tuple[type[AccessStore], type[RateLimiter]] = (FakeAccessStore, NoLimits)
_: tuple[type[Hub], type[Journal], type[Journal]] = (FakeHub, FlakyJournal, GatedJournal)
