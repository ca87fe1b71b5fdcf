"""`python -m backend token|key`: credentials, straight from the records.

Whoever may read and write the records may do all of this, so no credential is asked for: that is how the
first one is made.
"""

import json
import os
import pwd
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from backend.errors import CredentialNotFoundError, ProvisioningError, StartRefusedError

# Everything heavier is imported by the command that needs it, so that `--help` answers at once.
if TYPE_CHECKING:
    from pydantic import BaseModel

    from backend.adapters.records.access_store import SqlAccessStore
    from backend.models.access.audit import AuditAction, AuditEvent
    from backend.models.access.credentials import Credential, CredentialKind, KeyRequest, TokenRequest

_Model = TypeVar("_Model", bound="BaseModel")

token = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Enrolment tokens, for nodes.")
key = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Operators' keys.")

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
    with one_sentence():
        from backend.models.access.audit import AuditAction
        from backend.models.access.credentials import TokenRequest

        given: dict[str, object] = {
            "max_uses": max_uses,
            "expires_in": expires_in,
            "node_id_pattern": node_id_pattern,
            "source_cidr": source_cidr,
            "note": note,
        }
        _make(_checked(TokenRequest, given), AuditAction.TOKEN_MADE, output)


@token.command("list")
def list_tokens() -> None:
    """Print every token as a line of JSON, without its secret."""
    with one_sentence(), open_store() as store:
        from backend.models.access.credentials import CredentialKind, TokenInfo

        now = datetime.now(UTC)
        for credential in _listed(store, CredentialKind.TOKEN):
            typer.echo(TokenInfo.of(credential, now).model_dump_json())


@token.command("revoke")
def revoke_token(credential_id: Id) -> None:
    """Let nobody in with a token any more; the nodes that it let in stay."""
    with one_sentence():
        from backend.models.access.audit import AuditAction
        from backend.models.access.credentials import CredentialKind

        _revoke(CredentialKind.TOKEN, credential_id, AuditAction.TOKEN_REVOKED)


@key.command("create")
def create_key(
    role: Annotated[str, typer.Option(help="read, operate or admin; each covers the ones before it.")],
    expires_in: Annotated[int | None, typer.Option(help="Seconds; without it, never.")] = None,
    note: Note = "",
    output: Output = None,
) -> None:
    """Make a key and print it; it is shown this once."""
    with one_sentence():
        from backend.models.access.audit import AuditAction
        from backend.models.access.credentials import KeyRequest

        given = {"role": role, "expires_in": expires_in, "note": note}
        _make(_checked(KeyRequest, given), AuditAction.KEY_MADE, output)


@key.command("list")
def list_keys() -> None:
    """Print every key as a line of JSON, without its secret."""
    with one_sentence(), open_store() as store:
        from backend.models.access.credentials import CredentialKind, KeyInfo

        now = datetime.now(UTC)
        for credential in _listed(store, CredentialKind.KEY):
            typer.echo(KeyInfo.of(credential, now).model_dump_json())


@key.command("revoke")
def revoke_key(credential_id: Id) -> None:
    """Let nobody in with a key any more; the service follows within a second."""
    with one_sentence():
        from backend.models.access.audit import AuditAction
        from backend.models.access.credentials import CredentialKind

        _revoke(CredentialKind.KEY, credential_id, AuditAction.KEY_REVOKED)


@contextmanager
def one_sentence() -> Iterator[None]:
    """End the process with what an error says and how to mend it, and without a traceback."""
    try:
        yield
    except (StartRefusedError, ProvisioningError) as exc:
        from backend.models.access.secret_text import redacted

        typer.echo(f"error: {redacted(str(exc))}", err=True)
        raise typer.Exit(1) from None


@contextmanager
def open_store() -> "Iterator[SqlAccessStore]":
    """Open the records beside the service, or without it."""
    from backend.composition import open_access
    from backend.settings import load_settings

    with open_access(load_settings()) as store:
        yield store


def _checked(model: type[_Model], given: Mapping[str, object]) -> _Model:
    from pydantic import ValidationError

    try:
        # As JSON, of which the models read networks and roles.
        return model.model_validate_json(json.dumps(given))
    except ValidationError as exc:
        problem = exc.errors()[0]
        option = str(problem["loc"][0]).replace("_", "-")
        raise StartRefusedError(f"--{option}: {problem['msg']}") from None


def _make(request: "TokenRequest | KeyRequest", action: "AuditAction", output: Path | None) -> None:
    from backend.adapters.host.new_file import new_file

    now = datetime.now(UTC)
    credential, secret = request.make(actor(), now)
    with open_store() as store, nullcontext() if output is None else new_file(output) as file:
        if file is not None:
            # First: a secret that could not be written down would be lost.
            file.write(secret.reveal())
            file.flush()
        store.keep_credential(credential, _event(action, credential.id, now))
    if output is None:
        typer.echo(secret.reveal())
    else:
        typer.echo(f"{credential.kind.value} {credential.id} is in {output}")


def _listed(store: "SqlAccessStore", kind: "CredentialKind") -> "list[Credential]":
    return [credential for credential in store.load_credentials()[1] if credential.kind is kind]


def _revoke(kind: "CredentialKind", credential_id: str, action: "AuditAction") -> None:
    with open_store() as store:
        if credential_id not in {credential.id for credential in _listed(store, kind)}:
            raise CredentialNotFoundError(f"{kind.value} {credential_id}")
        store.revoke_credential(credential_id, _event(action, credential_id, datetime.now(UTC)))
    typer.echo(f"{kind.value} {credential_id} is revoked")


def _event(action: "AuditAction", subject: str, at: datetime) -> "AuditEvent":
    from backend.models.access.audit import AuditEvent, AuditOutcome

    return AuditEvent(at, action, AuditOutcome.ACCEPTED, actor(), subject)


def actor() -> str:
    """Return what the audit log calls the user of this command."""
    # Whose process it is: what the environment says of that (LOGNAME) anybody may choose.
    user = os.geteuid()
    try:
        return f"cli:{pwd.getpwuid(user).pw_name}"
    except KeyError:
        return f"cli:{user}"
