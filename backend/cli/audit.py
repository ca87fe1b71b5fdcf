"""`python -m backend audit`: the audit log, straight from the records."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from backend.cli.common import event, group, open_store, settings_of_hub
from backend.errors import StartRefusedError

# Everything heavier is imported by the command that needs it, so that `--help` answers at once.
if TYPE_CHECKING:
    from backend.models.access.audit import AuditAction

# A step's transaction takes some 0.1 s, for which the service's writes wait.
_ROWS_AT_A_TIME: Final = 10_000
_MOST_DAYS: Final = 99_999

audit = group("audit", "The audit log.")

OlderThan = Annotated[
    int | None, typer.Option("--older-than", min=0, max=_MOST_DAYS, metavar="DAYS", help="In days.")
]
Before = Annotated[
    str | None, typer.Option(metavar="TIME", help="From before then, like 2026-02-19 or 2026-02-19T12:00Z.")
]


@audit.command("list")
def list_audit(
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many, the newest.")] = 100,
    action: Annotated[str | None, typer.Option(help="Only such acts, like provision or key_made.")] = None,
    actor: Annotated[str | None, typer.Option(help="Only by whom, like key:3f1c0e5a9b7d2468.")] = None,
    subject: Annotated[str | None, typer.Option(help="Only of that node or credential.")] = None,
) -> None:
    """Print the newest entries as lines of JSON, the oldest of them first."""
    from backend.models.access.audit import AuditEntry, AuditQuery

    # Unchecked: the command line has a higher limit of its own.
    query = AuditQuery.model_construct(limit=limit, action=_action(action), actor=actor, subject=subject)
    with open_store() as store:
        for record in reversed(store.audit_page(query)):
            typer.echo(AuditEntry.of(record).model_dump_json())


@audit.command("verify")
def verify_audit() -> None:
    """Check that no entry was changed, dropped or moved; the status is 1 if one was."""
    from backend.services.hub.mark import HubMark

    with open_store() as store:
        # Before the log: beside a service that goes on, the later of the two is further on.
        reached = HubMark(settings_of_hub().wireguard_config_path.resolve()).read().audit_sequence
        wrong, (sequence, head), (pruned, _) = store.verify_audit()
        if wrong is not None:
            typer.echo(f"broken: {wrong}", err=True)
            raise typer.Exit(1)
        earlier = f", behind {pruned} that were pruned" if pruned else ""
        typer.echo(f"whole: {sequence - pruned} entries{earlier}")
        # A copy of it kept elsewhere shows whether the whole log was written anew.
        typer.echo(f"head: {head}")
        if reached > sequence:
            typer.echo(
                f"older: the hub has reached row {reached}, so the records are from a backup or another "
                "copy; credentials that were revoked since work again: revoke them once more",
                err=True,
            )
            raise typer.Exit(1)


@audit.command("export")
def export_audit(
    output: Annotated[Path, typer.Option(metavar="FILE", help="A new file, for you alone (0600).")],
    older_than: OlderThan = None,
    before: Before = None,
) -> None:
    """Write entries to a file as lines of JSON, the oldest first: all, or what `prune` would delete."""
    from backend.adapters.host.private_files import new_file
    from backend.models.access.audit import AuditEntry

    until = _moment(older_than, before) or datetime.now(UTC)
    count, last = 0, ""
    with open_store() as store, new_file(output) as file:
        for record in store.audit_until(until):
            file.write(AuditEntry.of(record).model_dump_json() + "\n")
            count, last = count + 1, f", up to {record.sequence}"
    typer.echo(f"exported {count} entries{last}")


@audit.command("prune")
def prune_audit(older_than: OlderThan = None, before: Before = None) -> None:
    """Delete old entries: those that WIREGUARD_AUDIT_KEEP doesn't keep, or others that you name."""
    from backend.models.access.audit import AuditAction
    from backend.settings import load_settings

    until = _moment(older_than, before) or datetime.now(UTC) - load_settings().audit_keep
    if until > datetime.now(UTC):
        raise StartRefusedError("--before: it is in the future")
    pruned = event(AuditAction.AUDIT_PRUNED)
    count = step = 0
    with open_store() as store:
        while step == 0 or count == step * _ROWS_AT_A_TIME:
            count += store.prune_audit(until, _ROWS_AT_A_TIME, pruned)
            step += 1
    typer.echo(f"pruned {count} entries")


def _action(name: str | None) -> "AuditAction | None":
    from backend.models.access.audit import AuditAction

    try:
        return None if name is None else AuditAction(name)
    except ValueError:
        raise StartRefusedError(f"--action: it is one of {', '.join(AuditAction)}") from None


def _moment(older_than: int | None, before: str | None) -> datetime | None:
    if older_than is not None and before is not None:
        raise StartRefusedError("--older-than and --before: give one of the two")
    if older_than is not None:
        return datetime.now(UTC) - timedelta(days=older_than)
    if before is None:
        return None
    try:
        moment = datetime.fromisoformat(before)
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise StartRefusedError("--before: write a time like 2026-02-19 or 2026-02-19T12:00Z") from None
