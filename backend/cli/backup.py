"""`python -m backend backup`: backups of the records and the hub's config."""

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from backend.cli.common import group, settings_of_hub
from backend.errors import BackupError

# Everything heavier is imported by the command that needs it, so that `--help` answers at once.
if TYPE_CHECKING:
    from backend.adapters.backups.maker import BackupMaker
    from backend.adapters.backups.restorer import Restoration
    from backend.models.backups import Manifest

_STREAM: Final = Path("-")

backup = group("backup", "Backups of the records and the hub's config.")

Archive = Annotated[
    Path,
    typer.Argument(metavar="ARCHIVE", help="A path, a name that `list` prints, or - for standard input."),
]


@backup.command("create")
def create(
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write to this new file, or to standard output for -; by default to a file in "
            "WIREGUARD_BACKUP_DIRECTORY.",
        ),
    ] = None,
) -> None:
    """Make and verify a backup. The service may run.

    Prints the archive's path.
    """
    from backend.command_parts import open_backups
    from backend.models.backups import Origin

    # None where the process was started without one.
    if output == _STREAM and sys.stdout is None:
        raise BackupError("--output: there is no output to write to")
    if output == _STREAM and sys.stdout.isatty():
        raise BackupError("--output: a backup is no text; pipe it into a program or a file")
    with open_backups(settings_of_hub()) as maker:
        if output is None:
            made = maker.make(Origin.COMMAND)
            typer.echo(made.path)
            if made.manifest is not None:
                typer.echo(_said(made.manifest, made.size), err=True)
            return
        _create_at(maker, output)


@backup.command("list")
def list_backups() -> None:
    """Print the backups in WIREGUARD_BACKUP_DIRECTORY.

    The newest comes first. Of one that can't be read, the reason is printed.
    """
    from backend.adapters.backups.maker import explained
    from backend.command_parts import backup_directory

    directory = backup_directory(settings_of_hub())
    with explained(directory.path):
        for found in directory.backups():
            manifest = found.manifest
            said = f"can't be read: {found.problem}" if manifest is None else _said(manifest, found.size)
            typer.echo(f"{found.path.name}  {said}")


@backup.command("verify")
def verify(archive: Archive) -> None:
    """Check that a backup can be restored.

    Restores it into a scratch directory, compares it with its manifest, and changes nothing else.
    """
    from backend.adapters.backups.maker import explained, opened
    from backend.adapters.backups.maker import verify as verify_archive
    from backend.command_parts import backup_directory

    directory = backup_directory(settings_of_hub())
    with (
        explained(archive),
        # Before the lock, which the program at the other end of a pipe may hold.
        opened(directory.find(archive), directory.state) as file,
        directory.locked_scratch() as scratch,
    ):
        verified = verify_archive(file, scratch)
        typer.echo(f"whole: {_said(verified.manifest, file.seek(0, 2))}")


@backup.command("restore")
def restore(
    archive: Archive,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Restore without asking.")] = False,
    config: Annotated[
        bool, typer.Option("--config", help="Also replace the hub's config with the backup's.")
    ] = False,
) -> None:
    """Replace the records with a backup's. Stop the service first.

    Prints what would change, and asks. The present state is saved as another backup before it is replaced.
    """
    from backend.adapters.backups.maker import explained
    from backend.command_parts import open_restoration

    settings = settings_of_hub()
    with (
        explained(settings.state_directory),
        open_restoration(settings, archive, replace_config=config) as restoration,
    ):
        _show(restoration)
        if not yes:
            _ask()
        for path in restoration.carry_out():
            typer.echo(f"saved:    {path}")
        state = restoration.verified.state
        typer.echo(f"restored: generation {state.generation}, {len(state.peers)} peers")
        _warn()


def _show(restoration: "Restoration") -> None:
    """Print what a restore changes."""
    from backend.models.wireguard.peer import cidr

    typer.echo(f"backup:   {_said(restoration.verified.manifest)}")
    now = restoration.present
    if now is not None:
        typer.echo(f"records:  generation {now.generation}, {len(now.peers)} peers")
    else:
        typer.echo(f"records:  {restoration.problem or 'there are none'}")
    typer.echo(f"config:   {restoration.config}")
    peers = restoration.peers
    for word, group_of_peers in (("comes", peers.added), ("goes", peers.removed), ("changes", peers.changed)):
        for peer in group_of_peers:
            typer.echo(
                f"{word + ':':9} {peer.node_id} {peer.wireguard_public_key} "
                f"{','.join(map(cidr, peer.allowed_ips))}"
            )


def _ask() -> None:
    if sys.stdin is None or not sys.stdin.isatty():
        raise BackupError("nothing was restored: there is no terminal to ask at; --yes restores it")
    if not typer.confirm("Restore it?"):
        raise BackupError("nothing was restored")


def _warn() -> None:
    from backend.models.operator_commands import command

    typer.echo(
        "note: credentials that were revoked since the backup work again, and tokens have the uses left that "
        "they had then: revoke them once more\n"
        "note: at its next start the service compares these records with the hub. Where they are older, it "
        f"pauses and removes no peer until you decide: {command('reconcile --show')}",
        err=True,
    )


def _create_at(maker: "BackupMaker", output: Path) -> None:
    from backend.adapters.backups.maker import explained
    from backend.adapters.records.replacement import write_new

    if output != _STREAM and (output.exists() or output.is_symlink()):
        raise BackupError(f"--output: {output} is there already; name a new file")
    with maker.making() as (file, manifest), explained(output):
        if output == _STREAM:
            shutil.copyfileobj(file, sys.stdout.buffer)
            sys.stdout.buffer.flush()
        else:
            write_new(file, output)
        typer.echo(_said(manifest, file.tell()), err=True)


def _said(manifest: "Manifest", size: int | None = None) -> str:
    """Describe a backup."""
    from backend.models.fields import escaped

    # An archive may come from anywhere.
    interface = escaped(manifest.interface)
    said = (
        f"{manifest.made_at:%Y-%m-%d %H:%M:%S} UTC, {interface}, generation {manifest.generation}, "
        f"{manifest.peers} peers"
    )
    return said if size is None else f"{said}, {size} bytes"
