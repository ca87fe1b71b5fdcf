"""Logs refused requests to the audit log, each as the act of its endpoint."""

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from backend.errors import AccessError, ProvisioningError, RateLimitedError, UnauthenticatedError
from backend.models.access.audit import AuditAction, AuditOutcome
from backend.models.access.callers import Caller, CallerKind
from backend.models.fields import redacted
from backend.models.wireguard.provisioning import NODE_ID_PATTERN
from backend.services.access.access_control import AccessControl

_Endpoint = TypeVar("_Endpoint", bound=Callable[..., Any])


def audited(action: AuditAction) -> Callable[[_Endpoint], _Endpoint]:
    """Declare the act that refused requests to an endpoint are logged as.

    Accepted requests are logged in the transaction that writes their change.
    """

    def mark(endpoint: _Endpoint) -> _Endpoint:
        endpoint.audit_action = action  # type: ignore[attr-defined] # any function may have one
        return endpoint

    return mark


def log_refusal(
    access: AccessControl, caller: Caller, action: AuditAction | None, subject: str | None, error: Exception
) -> None:
    """Log a refused request as `action` or as a failed authentication; only count one over a rate limit.

    A row names the real credential whose secret was tried, over a limit too. `subject` is chosen by the
    caller, and logged where it could be a node's name.
    """
    credential = None
    if isinstance(error, RateLimitedError):
        access.limited.count(caller.source)
        if error.credential_id is None:
            return
    if isinstance(error, AccessError) and (action is None or caller.kind is CallerKind.UNAUTHENTICATED):
        action = AuditAction.AUTHENTICATE
    if isinstance(error, UnauthenticatedError | RateLimitedError):
        action, credential = AuditAction.AUTHENTICATE, error.credential_id
    if action is None:
        return
    about = credential or _node(subject)
    event = caller.event(datetime.now(UTC), action, AuditOutcome.REFUSED, about, _reason(error))
    access.audit.note(event, credential)


def _node(subject: str | None) -> str | None:
    if subject is None:
        return None
    name = redacted(subject)
    return name if re.fullmatch(NODE_ID_PATTERN, name) and not name.endswith("\n") else None


def _reason(error: Exception) -> str:
    if isinstance(error, ProvisioningError):
        return error.audit_reason
    if isinstance(error, RequestValidationError):
        return "invalid"
    return f"status_{error.status_code}" if isinstance(error, HTTPException) else "failed"
