"""What `reconcile` tells an operator about the decision that it has written."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from backend.cli import reconcile
from backend.models.access.audit import GENESIS, AuditEvent
from backend.models.wireguard.records import Decision, HubStatus
from backend.services.hub.history import Adoption
from backend.services.hub.review import HubReview
from tests.harness.command_line import invoke

Decide = Callable[["Decisions"], CompletedProcess[str]]


class Decisions:
    """An in-memory stand-in for the records and the hub, with a service that treats a decision as told."""

    def __init__(self, *, dismisses: bool = False, is_stopped: bool = False) -> None:
        self.paused: str | None = "many peers on the hub are in no record"
        self.pending: Decision | None = None
        self._dismisses = dismisses
        self._is_stopped = is_stopped
        self.records = self

    def review(self) -> HubReview:
        return HubReview(
            generation=2,
            recorded=1,
            reached=2,
            present=11,
            unknown=[],
            missing=[],
            adoption=Adoption([], []),
            paused=self.paused,
            new_records=False,
            unseen=None,
            notices=(),
        )

    def decide(self, decision: Decision, _basis: str, _event: AuditEvent) -> None:
        self.pending = decision

    def status(self) -> HubStatus:
        if not self._is_stopped:
            self.pending = None
            self.paused = self.paused if self._dismisses else None
        return HubStatus(self.pending, None, (), (0, GENESIS))


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Decide:
    """Run `reconcile --force` against the given stand-in, without waiting."""
    monkeypatch.setattr(reconcile, "_PATIENCE_SECONDS", 0.0)

    def run(decisions: Decisions) -> CompletedProcess[str]:
        @contextmanager
        def opened(_: object) -> Iterator[Decisions]:
            yield decisions

        monkeypatch.setattr("backend.command_parts.open_hub_decisions", opened)
        return invoke("reconcile", "--force", directory=tmp_path)

    return run


def test_decision_that_the_service_carried_out_is_reported(force: Decide) -> None:
    done = force(Decisions())
    assert (done.returncode, done.stdout) == (0, "carried out; the records have 1 peers\n")


def test_decision_that_the_service_dismissed_is_not_reported_as_carried_out(force: Decide) -> None:
    done = force(Decisions(dismisses=True))
    assert (done.returncode, done.stdout) == (1, "")
    assert "dismissed the decision" in done.stderr


def test_decision_waits_for_a_service_that_is_stopped(force: Decide) -> None:
    decisions = Decisions(is_stopped=True)
    done = force(decisions)
    assert (done.returncode, decisions.pending) == (0, Decision.FORCE)
    assert "at its next start" in done.stdout
