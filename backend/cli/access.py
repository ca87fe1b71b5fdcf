"""`python -m backend token|key`: credentials, straight from the records.

They ask for no credential: a user that may write the records could write one into them, and the first one
has to come from somewhere.
"""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from backend.cli.common import actor, event, group, open_store
from backend.errors import CredentialNotFoundError, StartRefusedError

# Everything heavier is imported by the command that needs it, so that `--help` answers at once.
if TYPE_CHECKING:
    from backend.adapters.records.access_store import SqlAccessStore
    from backend.models.access.credentials import Credential

token = group("token", "Enrolment tokens, for nodes.")
key = group("key", "Operators' keys.")

Id = Annotated[str, typer.Argument(help="The 16 digits behind ocw_.")]
Note = Annotated[str, typer.Option(help="What you want to remember of it.")]
Output = Annotated[
    Path | None,
    typer.Option(help="A new file, for its owner alone, that takes the secret in place of the terminal."),
]


@token.command("create")
def create_token(
    max_uses: Annotated[int, typer.Option(help="How many nodes it lets in.")] = 1,
    expires_in: Annotated[int, typer.Option(help="Seconds.")] = 3600,
    node_id_pattern: Annotated[
        str | None, typer.Option(help="Only for such names, like swarm-node-*.")
    ] = None,
    source_cidr: Annotated[str | None, typer.Option(help="Only from there, like 192.0.2.0/24.")] = None,
    note: Note = "",
    output: Output = None,
) -> None:
    """Make a token and print it; it is shown this once."""
    given = {
        "max_uses": max_uses,
        "expires_in": expires_in,
        "node_id_pattern": node_id_pattern,
        "source_cidr": source_cidr,
        "note": note,
    }
    _make("token", given, output)


@key.command("create")
def create_key(
    role: Annotated[str, typer.Option(help="read, operate or admin; each covers the ones before it.")],
    expires_in: Annotated[int | None, typer.Option(help="Seconds; without it, never.")] = None,
    note: Note = "",
    output: Output = None,
) -> None:
    """Make a key and print it; it is shown this once."""
    _make("key", {"role": role, "expires_in": expires_in, "note": note}, output)


def _make(kind: str, given: Mapping[str, object], output: Path | None) -> None:
    from pydantic import ValidationError

    from backend.adapters.host.private_files import new_file
    from backend.models.access.audit import AuditAction
    from backend.models.access.credentials import KeyRequest, TokenRequest

    model = TokenRequest if kind == "token" else KeyRequest
    try:
        # As JSON, of which the models read networks and roles.
        credential, secret = model.model_validate_json(json.dumps(given)).make(actor(), datetime.now(UTC))
    except ValidationError as exc:
        problem = exc.errors()[0]
        option = str(problem["loc"][0]).replace("_", "-")
        raise StartRefusedError(f"--{option}: {problem['msg']}") from None
    with open_store() as store, nullcontext() if output is None else new_file(output) as file:
        if file is not None:
            # First: a secret that could not be written down would be lost.
            file.write(secret.reveal())
            file.flush()
        store.keep_credential(credential, event(AuditAction(f"{kind}_made"), credential.id))
    typer.echo(secret.reveal() if output is None else f"{kind} {credential.id} is in {output}")


def _listed(store: "SqlAccessStore", kind: str) -> "list[Credential]":
    return [credential for credential in store.load_credentials()[1] if credential.kind == kind]


def _add_commands(commands: typer.Typer, kind: str, revoke_help: str) -> None:
    """Add what is the same for both kinds, behind `create`."""

    @commands.command("list", help=f"Print every {kind} as a line of JSON, without its secret.")
    def list_all() -> None:
        from backend.models.access.credentials import KeyInfo, TokenInfo

        info = TokenInfo if kind == "token" else KeyInfo
        with open_store() as store:
            now = datetime.now(UTC)
            for credential in _listed(store, kind):
                typer.echo(info.of(credential, now).model_dump_json())

    @commands.command("revoke", help=revoke_help)
    def revoke(credential_id: Id) -> None:
        from backend.models.access.audit import AuditAction

        with open_store() as store:
            if credential_id not in {credential.id for credential in _listed(store, kind)}:
                raise CredentialNotFoundError(f"{kind} {credential_id}")
            store.revoke_credential(credential_id, event(AuditAction(f"{kind}_revoked"), credential_id))
        typer.echo(f"{kind} {credential_id} is revoked")


_add_commands(token, "token", "End a token at once; the nodes that it let in stay.")
_add_commands(key, "key", "End a key; the service follows within a second.")
