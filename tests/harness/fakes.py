"""Doubles with behaviour, for unit tests; each satisfies the Protocol that the real thing does."""

import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from threading import Event

import sqlalchemy as sa

from backend.adapters.records.database import IN_MEMORY, Database
from backend.adapters.records.tables import hubs, peers
from backend.adapters.records.unit_of_work import SqlRecords
from backend.errors import HubUpdateError, RecordsUnavailableError
from backend.models.access.audit import AuditEvent, AuditQuery, AuditRecord
from backend.models.access.credentials import Credential
from backend.models.access.idempotency import Answer
from backend.models.access.sources import LimitKind
from backend.models.wireguard.health import LostEndpoint
from backend.models.wireguard.interface import InterfacePeer, InterfaceState
from backend.models.wireguard.keys import WireGuardPrivateKey
from backend.models.wireguard.peer import Change, Peer, PeerState
from backend.models.wireguard.records import RecordedState
from backend.services.hub.drift import Drift
from backend.services.ports import AccessStore, Hub, RateLimiter, Records
from tests.harness.patience import WAIT


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
        # What `restore` has given back, and what each look shows of a peer beside its AllowedIPs.
        self.restored: list[LostEndpoint] = []
        self.seen: dict[str, InterfacePeer] = {}

    def vanish(self) -> None:
        """Delete the interface."""
        self._up, self.table, self.key, self.seen = False, {}, None, {}

    def come_back(self) -> None:
        """Make the interface anew, without peers."""
        self._up, self.table, self._index, self.seen = True, {}, self._index + 1, {}

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

    def restore(self, peers: Sequence[LostEndpoint]) -> None:
        self._fail_if_it_must()
        self.restored += peers
        for peer in peers:
            seen = self.seen.get(peer.public_key, InterfacePeer(()))
            self.seen[peer.public_key] = replace(seen, endpoint=peer.endpoint)

    def state(self) -> InterfaceState:
        if not self._up:
            raise HubUpdateError("no such device")
        peers = {
            key: replace(self.seen.get(key, InterfacePeer(())), allowed_ips=tuple(sorted(allowed)))
            for key, allowed in self.table.items()
        }
        return InterfaceState(self.key, self.port, 0, peers)

    def link_problem(self) -> str | None:
        return None

    def ifindex(self) -> int | None:
        return self._index if self._up else None


def _public_key(stripped: bytes) -> str | None:
    found = re.search(rb"(?m)^PrivateKey=(.*)$", stripped)
    return None if found is None else WireGuardPrivateKey.parse(found[1].decode()).public_key()


class _ForgetfulDatabase(Database):
    """A database in memory that can lose the answer to a commit."""

    def __init__(self) -> None:
        super().__init__(IN_MEMORY)
        # Python says so of a connection that nothing has closed; it closes with the last test that uses it.
        weakref.finalize(self, self.engine.dispose)
        self.migrate()
        self.loses_answer = False

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be around a transaction, as far as its COMMIT."""
        with super().writing():
            yield
        if self.loses_answer:
            raise RecordsUnavailableError("no answer at committed")


class FlakyRecords(SqlRecords):
    """Records in memory that stop answering at chosen moments, and answer again when these are cleared.

    `is_durable` has them say that they outlive the process, as those in a file or on a server do.
    """

    def __init__(self, *, is_durable: bool = False) -> None:
        self.database = _ForgetfulDatabase()
        super().__init__(self.database)
        # "check", "load", "commit" (nothing is written), "committed" (all is), "compensate", "note_observed".
        self.failing_at: set[str] = set()
        # Called before each commit with its changes.
        self.before_commit: Callable[[Sequence[Change]], object] = lambda _: None
        # How many changes each commit had.
        self.batches: list[int] = []
        self.durable = is_durable

    def _fail(self, moment: str) -> None:
        if moment in self.failing_at:
            raise RecordsUnavailableError(f"no answer at {moment}")

    def overtake(self) -> None:
        """Write to the records as another process would."""
        with self.database.engine.begin() as connection:
            connection.execute(sa.update(hubs).values(generation=hubs.c.generation + 5))

    def states(self) -> dict[str, PeerState]:
        """Return the state of each peer's row by node_id."""
        with self.database.engine.connect() as connection:
            rows = connection.execute(sa.select(peers.c.node_id, peers.c.state)).all()
        return {node_id: PeerState(state) for node_id, state in rows}

    def check(self) -> None:
        self._fail("check")
        super().check()

    def load(self, *, wait_for_commit: bool = False) -> RecordedState:
        self._fail("load")
        return super().load(wait_for_commit=wait_for_commit)

    def commit(self, generation: int, observed: int, changes: Sequence[Change]) -> None:
        self.batches.append(len(changes))
        self.before_commit(changes)
        self._fail("commit")
        self.database.loses_answer = "committed" in self.failing_at
        try:
            super().commit(generation, observed, changes)
        finally:
            self.database.loses_answer = False

    def compensate(self, generation: int, changes: Sequence[Change], reason: str) -> None:
        self._fail("compensate")
        super().compensate(generation, changes, reason)

    def note_observed(self, generation: int) -> None:
        self._fail("note_observed")
        super().note_observed(generation)


class GatedRecords(FlakyRecords):
    """Records that wait at a gate before each commit, so that a test can look at what is under way."""

    def __init__(self, *, is_open: bool = False) -> None:
        super().__init__()
        self._gate = Event()
        self._reached = Event()
        self.before_commit = self._wait
        if is_open:
            self.open()

    def open(self) -> None:
        """Let commits pass from here on."""
        self._gate.set()

    def shut(self) -> None:
        """Have commits wait from here on."""
        self._reached.clear()
        self._gate.clear()

    def wait_for_commit(self) -> None:
        """Wait until a commit is at the gate, or has passed it."""
        if not self._reached.wait(WAIT):
            raise AssertionError("no commit has come")

    def _wait(self, _: Sequence[Change]) -> None:
        self._reached.set()
        if not self._gate.wait(WAIT):
            raise AssertionError("the gate was never opened")


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
    """Rate limits that allow everything."""

    async def hit(self, kind: LimitKind, who: str) -> int | None:
        return None

    async def close(self) -> None:
        pass


__: tuple[type[AccessStore], type[RateLimiter]] = (FakeAccessStore, NoLimits)
_: tuple[type[Hub], type[Records], type[Records]] = (FakeHub, FlakyRecords, GatedRecords)
