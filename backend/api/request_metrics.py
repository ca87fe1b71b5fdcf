"""Counts each request over HTTP, and the outcome of each provision and each deletion of a peer."""

import time
from collections.abc import Mapping
from typing import Any, Final

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from backend.api.embedding import metrics_of
from backend.errors import (
    AccessError,
    DuplicatePeerError,
    IdempotencyKeyError,
    InvalidCredentialsError,
    IPPoolExhaustedError,
    OutcomeUnknownError,
    PeerNotFoundError,
    ProofError,
    ProvisioningError,
)
from backend.models.access.audit import AuditAction
from backend.services.ports import Outcome

METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_OTHER_METHOD: Final = "other"
_UNMATCHED: Final = "unmatched"

# The outcome of a request by the error that it raised. An error without a row has its nearest base class's.
OUTCOMES: Final[dict[type[BaseException], Outcome]] = {
    DuplicatePeerError: "duplicate",
    IPPoolExhaustedError: "pool_exhausted",
    PeerNotFoundError: "not_found",
    AccessError: "refused",
    IdempotencyKeyError: "refused",
    InvalidCredentialsError: "refused",
    ProofError: "refused",
    RequestValidationError: "refused",
    HTTPException: "refused",
    OutcomeUnknownError: "unknown",
    ProvisioningError: "unavailable",
    Exception: "unknown",
}


def count_request(
    request: Request,
    status: int,
    began: float,
    route: APIRoute | None = None,
    failure: type[Exception] | None = None,
) -> None:
    """Count an answered request, in a few microseconds.

    `began` is by time.perf_counter(); `route` is None for a path or a method without one. `failure` is the
    class of the error that was answered.
    """
    metrics = metrics_of(request)
    method = request.method if request.method in METHODS else _OTHER_METHOD
    template = _UNMATCHED if route is None else _template(route, request.scope)
    metrics.request_answered(method, template, status, time.perf_counter() - began)
    action = getattr(getattr(route, "endpoint", None), "audit_action", None)
    if action is AuditAction.PROVISION:
        metrics.provision_ended("provisioned" if failure is None else _outcome(failure))
    elif action is AuditAction.DEPROVISION:
        metrics.deprovision_ended("deprovisioned" if failure is None else _outcome(failure))


def _outcome(failure: type[Exception]) -> Outcome:
    return next(OUTCOMES[kind] for kind in failure.__mro__ if kind in OUTCOMES)


def _template(route: APIRoute, scope: Mapping[str, Any]) -> str:
    """Return the route's path with the prefixes that its router was included with."""
    # FastAPI has a place for it in its own part of the scope, and no function that returns it.
    included = scope.get("fastapi", {}).get("effective_route_context")
    path: str = route.path if included is None else included.path
    return path
