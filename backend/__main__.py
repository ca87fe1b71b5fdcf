"""The command line: `python -m backend --help`. Each file of cli/ has a group of commands."""

import os
from typing import Annotated

import typer

from backend import __version__
from backend.adapters.host.process_memory import keep_private
from backend.cli.access import key, token
from backend.cli.audit import audit
from backend.cli.backup import backup
from backend.cli.common import Commands
from backend.cli.hub import hub
from backend.cli.reconcile import reconcile
from backend.cli.serve import run, serve

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    # Typer's own tracebacks can show local variables, and there are keys among them.
    pretty_exceptions_enable=False,
    help="Gives swarm nodes what they need to join a WireGuard hub.",
)
for command in (serve, run, reconcile):
    app.command()(command)
for commands in (hub, token, key, audit, backup):
    app.add_typer(commands)


def _print_version(asked: bool) -> None:  # noqa: FBT001 - typer passes it by position
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    *,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Whatever is made from here on is for its owner's eyes only, and so is this process's memory."""
    os.umask(0o077)
    keep_private()


if __name__ == "__main__":
    app(prog_name="python -m backend")
