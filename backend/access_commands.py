"""`python -m backend token|key|audit`: credentials and audit log, straight from the records.

Whoever may read and write the records may do all of this, so no credential is asked for: that is how the
first one is made.
"""

import getpass
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from backend.errors import CredentialNotFoundError, ProvisioningError, StartRefusedError
from backend.models.access.audit import AuditAction, AuditEntry, AuditEvent, AuditOutcome, AuditQuery
from backend.models.access.credentials import (
    Credential,
    CredentialKind,
    KeyInfo,
    KeyRequest,
    Role,
    TokenInfo,
    TokenRequest,
)

if TYPE_CHECKING:
    from backend.adapters.access_store import SqlAccessStore

token = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Enrolment tokens, for nodes.")
key = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Operators' keys.")
audit = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The audit log.")

Id = Annotated[str, typer.Argument(help="The 16 digits behind ocw_.")]
Note = Annotated[str, typer.Option(help="What you want to remember of it.")]

_MADE: Final = {CredentialKind.TOKEN: AuditAction.TOKEN_MADE, CredentialKind.KEY: AuditAction.KEY_MADE}
_REVOKED: Final = {
    CredentialKind.TOKEN: AuditAction.TOKEN_REVOKED,
    CredentialKind.KEY: AuditAction.KEY_REVOKED,
}


@token.command("create")
def create_token(
    max_uses: Annotated[int, typer.Option(help="How many nodes it lets in.")] = 1,
    expires_in: Annotated[int, typer.Option(help="Seconds.")] = 3600,
    node_id_pattern: Annotated[
        str | None, typer.Option(help="Only for such names, like swarm-node-*.")
    ] = None,
    source_cidr: Annotated[str | None, typer.Option(help="Only from there, like 192.0.2.0/24.")] = None,
    ephemeral: Annotated[
        bool, typer.Option("--ephemeral", help="Its nodes are here for a while only.")
    ] = False,
    note: Note = "",
) -> None:
    """Make a token and print it; it is shown this once."""
    with one_sentence(), _store() as store:
        given: dict[str, object] = {
            "max_uses": max_uses,
            "expires_in": expires_in,
            "node_id_pattern": node_id_pattern,
            "source_cidr": source_cidr,
            "ephemeral": ephemeral,
            "note": note,
        }
        _make(store, _checked(TokenRequest, given))


@token.command("list")
def list_tokens() -> None:
    """Print every token as a line of JSON, without its secret."""
    with one_sentence(), _store() as store:
        now = datetime.now(UTC)
        for credential in _listed(store, CredentialKind.TOKEN):
            typer.echo(TokenInfo.of(credential, now).model_dump_json())


@token.command("revoke")
def revoke_token(credential_id: Id) -> None:
    """Let nobody in with a token any more; the nodes that it let in stay."""
    with one_sentence(), _store() as store:
        _revoke(store, CredentialKind.TOKEN, credential_id)


@key.command("create")
def create_key(
    role: Annotated[Role, typer.Option(help="What it is for; each covers the ones before it.")],
    expires_in: Annotated[int | None, typer.Option(help="Seconds; without it, never.")] = None,
    note: Note = "",
) -> None:
    """Make a key and print it; it is shown this once."""
    with one_sentence(), _store() as store:
        _make(store, _checked(KeyRequest, {"role": role, "expires_in": expires_in, "note": note}))


@key.command("list")
def list_keys() -> None:
    """Print every key as a line of JSON, without its secret."""
    with one_sentence(), _store() as store:
        now = datetime.now(UTC)
        for credential in _listed(store, CredentialKind.KEY):
            typer.echo(KeyInfo.of(credential, now).model_dump_json())


@key.command("revoke")
def revoke_key(credential_id: Id) -> None:
    """Let nobody in with a key any more; the service follows within a second."""
    with one_sentence(), _store() as store:
        _revoke(store, CredentialKind.KEY, credential_id)


@audit.command("list")
def list_audit(
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many, the newest.")] = 100,
    action: Annotated[AuditAction | None, typer.Option(help="Only such acts.")] = None,
    actor: Annotated[str | None, typer.Option(help="Only by whom, like key:3f1c0e5a9b7d2468.")] = None,
    subject: Annotated[str | None, typer.Option(help="Only of that node or credential.")] = None,
) -> None:
    """Print the newest entries as lines of JSON, the oldest of them first."""
    with one_sentence(), _store() as store:
        for record in reversed(store.audit_page(AuditQuery(limit, None, action, actor, subject))):
            typer.echo(AuditEntry.of(record).model_dump_json())


@audit.command("verify")
def verify_audit() -> None:
    """Check that nobody has changed, dropped or moved an entry; the status is 1 if somebody has."""
    with one_sentence(), _store() as store:
        wrong, (sequence, head) = store.verify_audit()
        if wrong is not None:
            typer.echo(f"broken: {wrong}", err=True)
            raise typer.Exit(1)
        typer.echo(f"whole: {sequence} entries")
        # Kept elsewhere, it finds out who has written the whole log anew.
        typer.echo(f"head: {head}")


@contextmanager
def one_sentence() -> Iterator[None]:
    """End the process with what an error says and how to mend it, and without a traceback."""
    try:
        yield
    except (StartRefusedError, ProvisioningError) as exc:
        typer.echo(f"error: {exc}", err=True)
        raise typer.Exit(1) from None


@contextmanager
def _store() -> "Iterator[SqlAccessStore]":
    from backend.main import open_access
    from backend.settings import load_settings

    with open_access(load_settings()) as store:
        yield store


def _checked(model: Any, given: dict[str, object]) -> Any:
    from pydantic import ValidationError

    try:
        # As JSON, of which the models read networks and roles.
        return model.model_validate_json(json.dumps(given))
    except ValidationError as exc:
        problem = exc.errors()[0]
        option = str(problem["loc"][0]).replace("_", "-")
        raise StartRefusedError(f"--{option}: {problem['msg']}") from None


def _make(store: "SqlAccessStore", request: TokenRequest | KeyRequest) -> None:
    now = datetime.now(UTC)
    credential, secret = request.make(_actor(), now)
    store.keep_credential(credential, _event(_MADE[credential.kind], credential.id, now))
    typer.echo(secret.reveal())


def _listed(store: "SqlAccessStore", kind: CredentialKind) -> list[Credential]:
    return [credential for credential in store.load_credentials()[1] if credential.kind is kind]


def _revoke(store: "SqlAccessStore", kind: CredentialKind, credential_id: str) -> None:
    if credential_id not in {credential.id for credential in _listed(store, kind)}:
        raise CredentialNotFoundError(f"{kind.value} {credential_id}")
    store.revoke_credential(credential_id, _event(_REVOKED[kind], credential_id, datetime.now(UTC)))
    typer.echo(f"{kind.value} {credential_id} is revoked")


def _event(action: AuditAction, subject: str, at: datetime) -> AuditEvent:
    return AuditEvent(at, action, AuditOutcome.ACCEPTED, _actor(), subject)


def _actor() -> str:
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):
        return "cli:?"
