"""The endpoints of access control: tokens, keys and the audit log."""

import asyncio
from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Query

from backend.api.audit import audited
from backend.api.errors import problem
from backend.api.security import REFUSALS, Access, Admin, Reader, SecuredRoute
from backend.models.access.audit import AuditAction, AuditEntry, AuditPage, AuditQuery
from backend.models.access.credentials import (
    CredentialKind,
    KeyInfo,
    KeyRequest,
    MadeKey,
    MadeToken,
    TokenInfo,
    TokenRequest,
)

router = APIRouter(prefix="/wireguard", tags=["access"], route_class=SecuredRoute, responses=REFUSALS)


_NOT_FOUND = problem("No such credential.", "token 3f1c0e5a9b7d2468 not found")


@router.post("/tokens", summary="Make an enrolment token", status_code=201)
@audited(AuditAction.TOKEN_MADE)
async def make_token(body: TokenRequest, caller: Admin, access: Access) -> MadeToken:
    """Make a token that lets nodes in. Its secret is in this answer and nowhere else."""
    token, secret = await asyncio.to_thread(access.credentials.make, body, caller)
    return MadeToken.of(token, datetime.now(UTC), secret=secret.reveal())


@router.get("/tokens", summary="List the enrolment tokens")
async def list_tokens(_: Admin, access: Access) -> list[TokenInfo]:
    """Return every token, revoked and expired ones too, without their secrets."""
    tokens = await asyncio.to_thread(access.credentials.of_kind, CredentialKind.TOKEN)
    now = datetime.now(UTC)
    return [TokenInfo.of(token, now) for token in tokens]


@router.delete("/tokens/{credential_id}", summary="Revoke an enrolment token", responses={404: _NOT_FOUND})
@audited(AuditAction.TOKEN_REVOKED)
async def revoke_token(credential_id: str, caller: Admin, access: Access) -> TokenInfo:
    """End a token at once. The nodes that it let in stay."""
    token = await asyncio.to_thread(access.credentials.revoke, CredentialKind.TOKEN, credential_id, caller)
    return TokenInfo.of(token, datetime.now(UTC))


@router.post("/keys", summary="Make an operator's key", status_code=201)
@audited(AuditAction.KEY_MADE)
async def make_key(body: KeyRequest, caller: Admin, access: Access) -> MadeKey:
    """Make a key for an operator. Its secret is in this answer and nowhere else."""
    key, secret = await asyncio.to_thread(access.credentials.make, body, caller)
    return MadeKey.of(key, datetime.now(UTC), secret=secret.reveal())


@router.get("/keys", summary="List the operators' keys")
async def list_keys(_: Admin, access: Access) -> list[KeyInfo]:
    """Return every key, revoked and expired ones too, without their secrets."""
    keys = await asyncio.to_thread(access.credentials.of_kind, CredentialKind.KEY)
    now = datetime.now(UTC)
    return [KeyInfo.of(key, now) for key in keys]


@router.delete("/keys/{credential_id}", summary="Revoke an operator's key", responses={404: _NOT_FOUND})
@audited(AuditAction.KEY_REVOKED)
async def revoke_key(credential_id: str, caller: Admin, access: Access) -> KeyInfo:
    """End a key at once, be it the caller's own."""
    key = await asyncio.to_thread(access.credentials.revoke, CredentialKind.KEY, credential_id, caller)
    return KeyInfo.of(key, datetime.now(UTC))


@router.get("/audit", summary="Read the audit log")
async def read_audit(query: Annotated[AuditQuery, Query()], _: Reader, access: Access) -> AuditPage:
    """Return entries of the audit log, the newest first."""
    records = await asyncio.to_thread(access.audit.page, query)
    full = len(records) == query.limit
    return AuditPage(
        entries=[AuditEntry.of(record) for record in records],
        next=records[-1].sequence if full and records[-1].sequence > 1 else None,
    )
