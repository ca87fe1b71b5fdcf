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
    Path, typer.Argument(metavar="ARCHIVE", help="A path, a name that `list` prints, or - for the input.")
]


@backup.command("create")
def create(
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A new file, or - for the output; by default in the directory."),
    ] = None,
) -> None:
    """Make a backup, whether the service runs or not. It is verified before it gets its name."""
    from backend.command_parts import open_backups
    from backend.models.backups import Origin

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
    """Print the backups of the directory, the newest first, and why one can't be read."""
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
    """Restore a backup into a scratch directory, and change nothing else."""
    from backend.adapters.backups.maker import explained, opened
    from backend.adapters.backups.maker import verify as verify_archive
    from backend.command_parts import backup_directory

    directory = backup_directory(settings_of_hub())
    with (
        explained(archive),
        # Before the turn, which the program at the other end of a pipe may have.
        opened(directory.find(archive), directory.state) as file,
        directory.turn() as scratch,
    ):
        verified = verify_archive(file, scratch)
        typer.echo(f"whole: {_said(verified.manifest, file.seek(0, 2))}")


@backup.command("restore")
def restore(
    archive: Archive,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    config: Annotated[
        bool, typer.Option("--config", help="Replace the hub's config, too, where it differs.")
    ] = False,
) -> None:
    """Put the records of a backup in the place of the present ones. The service must be stopped."""
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
    for word, group_of_peers in (("comes", peers.come), ("goes", peers.go), ("changes", peers.change)):
        for peer in group_of_peers:
            typer.echo(
                f"{word + ':':9} {peer.node_id} {peer.wireguard_public_key} "
                f"{','.join(map(cidr, peer.allowed_ips))}"
            )


def _ask() -> None:
    if not sys.stdin.isatty():
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
    said = (
        f"{manifest.made_at:%Y-%m-%d %H:%M:%S} UTC, {manifest.interface}, generation {manifest.generation}, "
        f"{manifest.peers} peers"
    )
    return said if size is None else f"{said}, {size} bytes"
