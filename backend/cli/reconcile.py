"""`python -m backend reconcile`: an operator's decision about peers that the records don't know."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Final

import typer

from backend.cli.common import event, settings_of_hub
from backend.errors import StartRefusedError

# Everything heavier is imported where it's needed, so that `--help` answers at once.
if TYPE_CHECKING:
    from backend.command_parts import HubDecisions
    from backend.models.access.audit import AuditEvent
    from backend.models.wireguard.records import Decision
    from backend.services.hub.review import HubReview

# How long to wait for a service that runs to take a decision up: it looks once a second.
_PATIENCE_SECONDS: Final = 5.0

Show = Annotated[bool, typer.Option("--show", help="Print what differs, and change nothing.")]
Adopt = Annotated[bool, typer.Option("--adopt", help="Take the hub's unknown peers into the records.")]
Force = Annotated[bool, typer.Option("--force", help="Take the unknown peers off the hub.")]
Acknowledge = Annotated[bool, typer.Option("--acknowledge", help="Take the notices out of /readyz.")]


def reconcile(
    *, show: Show = False, adopt: Adopt = False, force: Force = False, acknowledge: Acknowledge = False
) -> None:
    """Compare the records with the hub, and decide about peers that the records don't know."""
    if sum((show, adopt, force, acknowledge)) != 1:
        raise StartRefusedError("choose one of --show, --adopt, --force and --acknowledge")
    from backend.command_parts import open_hub_decisions
    from backend.models.access.audit import AuditAction
    from backend.models.wireguard.records import Decision

    with open_hub_decisions(settings_of_hub()) as decisions:
        if acknowledge:
            count = decisions.records.acknowledge(event(AuditAction.NOTICE_ACKNOWLEDGED))
            typer.echo(f"{count} notice(s) acknowledged" if count else "there is no notice")
        elif show:
            _show(decisions.review())
        else:
            action = AuditAction.PEERS_ADOPTED if adopt else AuditAction.PEERS_REMOVED
            _decide(decisions, Decision.ADOPT if adopt else Decision.FORCE, event(action))


def _show(review: "HubReview") -> None:
    from backend.models.wireguard.peer import cidr

    typer.echo(f"records: generation {review.generation}, {review.recorded} peers")
    typer.echo(f"hub:     generation {review.reached}, {review.present} peers of ours")
    for notice in review.notices:
        typer.echo(f"notice:  {notice}")
    if review.unseen is not None:
        typer.echo(f"note: only the config was looked at: {review.unseen}", err=True)
    refused = set(review.adoption.refused)
    for peer in review.unknown:
        where = "in the config" if peer.label is not None else "on the interface alone"
        problem = "; can't be adopted: its address is not one, or another peer's" if peer in refused else ""
        allowed = ",".join(peer.allowed_ips) or "(none)"
        typer.echo(f"unknown: {peer.label or '-'} {peer.public_key} {allowed} {where}{problem}")
    for recorded in review.missing:
        typer.echo(
            f"missing: {recorded.node_id} {recorded.wireguard_public_key} "
            f"{','.join(map(cidr, recorded.allowed_ips))} in the records alone; it comes to the hub"
        )
    typer.echo(f"verdict: {review.verdict}")


def _decide(decisions: "HubDecisions", decision: "Decision", decided: "AuditEvent") -> None:
    from backend.services.hub.removal_guard import fingerprint

    review = decisions.review()
    if review.paused is None:
        raise StartRefusedError(f"nothing was decided: {review.verdict}")
    decisions.records.decide(decision, fingerprint(review.unknown), decided)
    if not _becomes_true(lambda: decisions.records.status().decision is None):
        typer.echo("written down; the service carries it out as soon as it can, or at its next start")
        return
    # A service that isn't paused dismisses a decision: it hasn't seen the unknown peers yet.
    if not _becomes_true(lambda: decisions.review().paused is None):
        raise StartRefusedError(
            "the service dismissed the decision: it was not paused yet (it compares the whole interface "
            "every ten seconds), or the unknown peers are others by now; look at --show, and decide again"
        )
    typer.echo(f"carried out; the records have {decisions.review().recorded} peers")


def _becomes_true(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
