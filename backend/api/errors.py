"""The only table from errors to HTTP statuses, and the answers that are made by it.

Three kinds of statuses are elsewhere: those for a path or a method without a route (api/routes.py), the 503
of an app whose service does not run (api/embedding.py), and those of requests that the server refuses before
the app sees them: 408, 429, 431 and 503 (adapters/http/http_protocol.py).
"""

from collections.abc import Sequence
from typing import Any, Final

from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from backend.api.strict_json import StrictJSONError
from backend.errors import (
    AccessError,
    AddressTakenError,
    CredentialNotFoundError,
    DuplicatePeerError,
    IdempotencyKeyError,
    InterfaceNotFoundError,
    InvalidCredentialsError,
    IPPoolExhaustedError,
    NoProofAskedError,
    OutcomeUnknownError,
    PeerNotFoundError,
    ProofError,
    ProvisioningError,
    RateLimitedError,
    UnauthenticatedError,
)
from backend.models.fields import redacted

MAX_BODY_BYTES: Final = 64 * 1024
# The most errors of a body that one answer lists.
MAX_ERRORS: Final = 20
_MAX_NAME: Final = 256


class BodyTooLargeError(Exception):
    """The body is larger than MAX_BODY_BYTES."""

    def __str__(self) -> str:
        return f"The body is larger than {MAX_BODY_BYTES // 1024} KiB; send less metadata"


_BEARER: Final = {"WWW-Authenticate": "Bearer"}

# Each error with its status and headers; Retry-After is in seconds. An error that isn't here has the row of
# the nearest class that it is derived from.
ANSWERS: Final[dict[type[Exception], tuple[int, dict[str, str]]]] = {
    UnauthenticatedError: (401, _BEARER),
    ProofError: (401, _BEARER),
    AccessError: (403, {}),
    CredentialNotFoundError: (404, {}),
    InterfaceNotFoundError: (404, {}),
    NoProofAskedError: (404, {}),
    PeerNotFoundError: (404, {}),
    DuplicatePeerError: (409, {}),
    BodyTooLargeError: (413, {}),
    IdempotencyKeyError: (422, {}),
    InvalidCredentialsError: (422, {}),
    RequestValidationError: (422, {}),
    StrictJSONError: (422, {}),
    RateLimitedError: (429, {}),  # its Retry-After is its own
    AddressTakenError: (503, {"Retry-After": "1"}),
    IPPoolExhaustedError: (503, {"Retry-After": "60"}),
    OutcomeUnknownError: (503, {"Retry-After": "10"}),
    ProvisioningError: (503, {"Retry-After": "5"}),
}


class Problem(BaseModel):
    """Why not, in a sentence."""

    detail: str


def problem(description: str, example: str) -> dict[str, Any]:
    """Describe an answer that has a Problem in it."""
    return {
        "model": Problem,
        "description": description,
        "content": {"application/json": {"example": {"detail": example}}},
    }


def answer(error: Exception) -> JSONResponse:
    """Return the HTTP answer to an error that has a row in ANSWERS."""
    status, headers = _row(error)
    if isinstance(error, RateLimitedError):
        headers = {"Retry-After": str(error.retry_after)}
    return JSONResponse({"detail": _detail(error)}, status, headers)


def unreadable(error: BodyTooLargeError | StrictJSONError) -> HTTPException:
    """Return what to raise for a body that can't be read: FastAPI makes a 400 of any other exception."""
    status, headers = _row(error)
    return HTTPException(status, _detail(error), headers)


def _row(error: Exception) -> tuple[int, dict[str, str]]:
    return next(ANSWERS[kind] for kind in type(error).__mro__ if kind in ANSWERS)


def _detail(error: Exception) -> object:
    match error:
        case DuplicatePeerError():
            return {"message": redacted(str(error)), "existing_config": error.existing_config}
        case InvalidCredentialsError():
            return [{"type": "value_error", "loc": ["body", error.field], "msg": error.reason}]
        case IdempotencyKeyError():
            return [{"type": "value_error", "loc": ["header", "Idempotency-Key"], "msg": str(error)}]
        case StrictJSONError():
            return [{"type": "json_invalid", "loc": ["body"], "msg": str(error)}]
        case RequestValidationError():
            # FastAPI's list without the input: what was sent may be a secret, may be nested too deep to be
            # sent back, or no valid Unicode.
            return [
                {"type": e["type"], "loc": _location(e["loc"]), "msg": _message(e)}
                for e in error.errors()[:MAX_ERRORS]
            ]
    return redacted(str(error))


def _message(error: dict[str, Any]) -> str:
    if tuple(error["loc"]) == ("body",) and error["type"] in {"model_attributes_type", "missing"}:
        return "send one JSON object, with the header Content-Type: application/json"
    return _text(error["msg"])


def _location(parts: Sequence[str | int]) -> list[str | int]:
    # A caller's own field may have a name as long as the body.
    return [_text(part[:_MAX_NAME]) if isinstance(part, str) else part for part in parts]


def _text(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
