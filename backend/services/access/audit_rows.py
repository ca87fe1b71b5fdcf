"""Merges events of the audit log into few rows, and lets no source fill the disk with them.

Events with the same action, reason, real credential and source become one row; text that a caller chose
makes no difference. Within its budget a source gets a row for each of these at each write. Beyond it the rows
wait, and count further events, until the budget has another row. So no event is dropped, and memory is
bounded.
"""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Final

from backend.models.access.audit import AuditAction, AuditEvent, AuditOutcome
from backend.models.access.callers import CallerKind
from backend.models.access.sources import network_of

# How many rows a source may add at once, and the seconds until it may add another: 17,280 a day.
_SOURCE_ROWS: Final = 1000
_SOURCE_SECONDS: Final = 5.0
# The same for all sources together: 172,800 a day.
_ALL_ROWS: Final = 10_000
_ALL_SECONDS: Final = 0.5
# The budgets that are remembered, each some 200 bytes. For further sources the common budget still holds.
_MOST_SOURCES: Final = 10_000

_WITHOUT_CREDENTIAL: Final = frozenset({CallerKind.UNAUTHENTICATED.value, CallerKind.ANYONE.value})
_UNIX_SOCKET: Final = "unix"
_MANY: Final = "many"


class _Tier(Enum):
    """Rows that have budgets of their own."""

    # The service noticed it by itself: no caller can bring it about at will, so there is no budget.
    NOTICE = auto()
    # About a real credential that was shown, or whose secret was tried.
    CREDENTIAL = auto()
    ANONYMOUS = auto()


# Rows that wait at the same time. Beyond that, new rows don't differ by their source any more.
_MOST_WAITING: Final = {_Tier.NOTICE: 100, _Tier.CREDENTIAL: 1000, _Tier.ANONYMOUS: 200}


@dataclass(frozen=True, slots=True)
class _Kind:
    """The properties that the events of one row share."""

    tier: _Tier
    action: AuditAction
    outcome: AuditOutcome
    reason: str | None
    actor: str
    network: str
    # A credential's ID. A notice's subject.
    subject: str | None


@dataclass(slots=True)
class _Budget:
    """A token bucket: `most` rows at once, and another row every `seconds`."""

    most: int
    seconds: float
    left: float
    refilled_at: float

    def has_one(self, now: float) -> bool:
        self.left = min(self.most, self.left + (now - self.refilled_at) / self.seconds)
        self.refilled_at = now
        return self.left >= 1


class AuditRows:
    """Rows that wait to be written. For one thread at a time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: dict[_Kind, AuditEvent] = {}
        self._number: Counter[_Tier] = Counter()
        now = clock()
        # One for each tier, so that a flood of anonymous requests leaves room for rows about credentials.
        self._all = {tier: _Budget(_ALL_ROWS, _ALL_SECONDS, _ALL_ROWS, now) for tier in _Tier}
        self._by_source: OrderedDict[tuple[_Tier, str], _Budget] = OrderedDict()

    def add(self, event: AuditEvent, credential: str | None = None) -> None:
        """Add an event. `credential` is the ID of a real one that it is about, other than its actor's."""
        self._merge(_kind(event, credential), event)

    def take(self, *, all_of_them: bool = False) -> list[tuple[_Kind, AuditEvent]]:
        """Remove and return the rows that may be written now, in the order in which they were added.

        Rows that could not be written go to `put_back`.
        """
        now = self._clock()
        taken = [
            (kind, event) for kind, event in self._waiting.items() if all_of_them or self._spend(kind, now)
        ]
        for kind, _ in taken:
            del self._waiting[kind]
            self._number[kind.tier] -= 1
        return taken

    def put_back(self, rows: Iterable[tuple[_Kind, AuditEvent]]) -> None:
        """Keep rows that `take` has returned and that were not written."""
        for kind, event in rows:
            for budget in (self._all[kind.tier], self._budget(kind, self._clock())):
                budget.left += 1
            later = self._waiting.get(kind)
            if later is None:
                self._merge(kind, event)
            else:
                self._waiting[kind] = _merged(kind, event, later)

    def _merge(self, kind: _Kind, event: AuditEvent) -> None:
        if kind not in self._waiting:
            kind, event = self._bounded(kind, event)
        known = self._waiting.get(kind)
        if known is None:
            self._number[kind.tier] += 1
        self._waiting[kind] = event if known is None else _merged(kind, known, event)

    def _bounded(self, kind: _Kind, event: AuditEvent) -> tuple[_Kind, AuditEvent]:
        """Return the row without its source where too many wait, so that more of them are merged."""
        number, most = self._number[kind.tier], _MOST_WAITING[kind.tier]
        if number < most:
            return kind, event
        # Rows about a credential keep its ID, up to twice as many.
        by_credential = kind.tier is _Tier.CREDENTIAL and number < 2 * most
        actor = kind.actor if by_credential else kind.actor.partition(":")[0]
        subject = kind.subject if by_credential else None
        return (
            replace(kind, actor=actor, network=_MANY, subject=subject),
            replace(event, actor=actor, source=None, subject=subject, request_id=None),
        )

    def _spend(self, kind: _Kind, now: float) -> bool:
        if kind.tier is _Tier.NOTICE:
            return True
        budgets = (self._all[kind.tier], self._budget(kind, now))
        if not all(budget.has_one(now) for budget in budgets):
            return False
        for budget in budgets:
            budget.left -= 1
        return True

    def _budget(self, kind: _Kind, now: float) -> _Budget:
        name = (kind.tier, kind.network)
        budget = self._by_source.get(name)
        if budget is None:
            budget = self._by_source[name] = _Budget(_SOURCE_ROWS, _SOURCE_SECONDS, _SOURCE_ROWS, now)
            if len(self._by_source) > _MOST_SOURCES:
                self._by_source.popitem(last=False)
        else:
            self._by_source.move_to_end(name)
        return budget


def _kind(event: AuditEvent, credential: str | None) -> _Kind:
    if event.outcome is not AuditOutcome.REFUSED:
        tier, subject = _Tier.NOTICE, event.subject
    else:
        real = credential is not None or event.actor not in _WITHOUT_CREDENTIAL
        tier, subject = _Tier.CREDENTIAL if real else _Tier.ANONYMOUS, credential
    network = _UNIX_SOCKET if event.source is None else network_of(event.source)
    return _Kind(tier, event.action, event.outcome, event.reason, event.actor, network, subject)


def _merged(kind: _Kind, first: AuditEvent, later: AuditEvent) -> AuditEvent:
    """Return one row for two events, at the time of the first, with the properties that they share."""
    source = first.source
    if source != later.source:
        source = None if kind.network in {_MANY, _UNIX_SOCKET} else kind.network
    return replace(
        first,
        subject=first.subject if first.subject == later.subject else None,
        source=source,
        request_id=None,
        count=first.count + later.count,
    )
