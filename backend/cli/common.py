"""Helpers of several commands. Imports nothing heavy, so that `--help` answers at once."""

import os
import pwd
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from backend.errors import ProvisioningError, StartRefusedError

if TYPE_CHECKING:
    from backend.adapters.records.access_store import SqlAccessStore
    from backend.models.access.audit import AuditAction, AuditEvent
    from backend.settings import Settings


class Commands(TyperGroup):
    """Ends the process with the sentence of a command's error, status 1 and no traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (StartRefusedError, ProvisioningError) as exc:
            from backend.models.fields import escaped, redacted

            # Some messages name what stands in a file from elsewhere, which a terminal might obey.
            lines = map(escaped, redacted(str(exc)).split("\n"))
            typer.echo("error: " + "\n".join(lines), err=True)
            raise typer.Exit(1) from None


def group(name: str, description: str) -> typer.Typer:
    """Make a group of commands, `python -m backend NAME ...`."""
    return typer.Typer(name=name, help=description, no_args_is_help=True, rich_markup_mode=None)


def settings_of_hub() -> "Settings":
    """Return the settings, for the hub that `make run` made where they name no other."""
    from backend.cli.quickstart import beside_run
    from backend.settings import load_settings

    return beside_run(load_settings())


def open_store() -> "AbstractContextManager[SqlAccessStore]":
    """Open credentials and audit log, whether the service runs or not."""
    from backend.command_parts import open_access
    from backend.settings import load_settings

    return open_access(load_settings())


def event(action: "AuditAction", subject: str | None = None) -> "AuditEvent":
    """Return the audit log's row for what the user of this process does now."""
    from backend.models.access.audit import AuditEvent, AuditOutcome

    return AuditEvent(datetime.now(UTC), action, AuditOutcome.ACCEPTED, actor(), subject)


def actor() -> str:
    """Return the audit log's name for the user of this process."""
    # Never LOGNAME, which any user may set to any name.
    user = os.geteuid()
    try:
        return f"cli:{pwd.getpwuid(user).pw_name}"
    except KeyError:
        return f"cli:{user}"
