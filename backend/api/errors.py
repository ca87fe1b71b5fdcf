"""The one table from the domain's errors to HTTP, and the route class that applies it.

The class also bounds the body, reads JSON strictly, and gives every answer its request ID. It works for a
router that is included in any app: nothing has to be registered there.
"""

from collections.abc import Callable, Coroutine, Sequence
from http import HTTPStatus
from typing import Any, Final

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import Message, Receive, Scope, Send

from backend.api.request_id import identify, mark
from backend.api.strict_json import StrictRequest
from backend.api.unrouted import unrouted
from backend.errors import (
    AccessError,
    AddressTakenError,
    CredentialNotFoundError,
    DuplicatePeerError,
    HubUpdateError,
    IdempotencyKeyError,
    InvalidCredentialsError,
    IPPoolExhaustedError,
    OutcomeUnknownError,
    PeerNotFoundError,
    ProofError,
    ProvisioningError,
    RateLimitedError,
    RecordsUnavailableError,
    UnauthenticatedError,
)
from backend.models.access.secret_text import redacted

# The nearest class in an error's line of descent counts.
STATUS: Final[dict[type[ProvisioningError], int]] = {
    UnauthenticatedError: 401,
    ProofError: 401,
    AccessError: 403,
    CredentialNotFoundError: 404,
    IdempotencyKeyError: 422,
    RateLimitedError: 429,
    DuplicatePeerError: 409,
    PeerNotFoundError: 404,
    InvalidCredentialsError: 422,
    IPPoolExhaustedError: 503,
    AddressTakenError: 503,
    HubUpdateError: 503,
    RecordsUnavailableError: 503,
    ProvisioningError: 503,
}

# Seconds after which it makes sense to ask again, where it does.
RETRY_AFTER: Final[dict[type[ProvisioningError], int]] = {
    IPPoolExhaustedError: 60,
    AddressTakenError: 1,
    OutcomeUnknownError: 10,
    ProvisioningError: 5,
}

MAX_BODY_BYTES: Final = 64 * 1024
# In one answer.
MAX_ERRORS: Final = 20
_MAX_NAME: Final = 256
_MAX_LENGTH_DIGITS: Final = 20


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


def _nearest(table: dict[type[ProvisioningError], int], error: ProvisioningError) -> int:
    return next(table[kind] for kind in type(error).__mro__ if kind in table)


def answer(error: ProvisioningError) -> JSONResponse:
    """Return the HTTP answer to one of the domain's errors."""
    status = _nearest(STATUS, error)
    headers: dict[str, str] = {}
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = str(_nearest(RETRY_AFTER, error))
    elif isinstance(error, RateLimitedError):
        headers["Retry-After"] = str(error.retry_after)
    elif status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    detail: object = redacted(str(error))
    if isinstance(error, DuplicatePeerError):
        detail = {"message": detail, "existing_config": error.existing_config}
    elif isinstance(error, InvalidCredentialsError):
        detail = [{"type": "value_error", "loc": ["body", error.field], "msg": error.reason}]
    elif isinstance(error, IdempotencyKeyError):
        detail = [{"type": "value_error", "loc": ["header", "Idempotency-Key"], "msg": str(error)}]
    return JSONResponse(
        {"detail": detail},
        status_code=status,
        headers=headers,
    )


def invalid(error: RequestValidationError) -> JSONResponse:
    """Return FastAPI's list of errors without the input: the first of them, where there are many.

    What was sent may be a secret, may be nested too deep to be sent back, or no valid Unicode.
    """
    errors = [
        {"type": e["type"], "loc": _location(e["loc"]), "msg": _message(e)}
        for e in error.errors()[:MAX_ERRORS]
    ]
    return JSONResponse({"detail": errors}, status_code=422)


def _message(error: dict[str, Any]) -> str:
    if tuple(error["loc"]) == ("body",) and error["type"] in {"model_attributes_type", "missing"}:
        return "send one JSON object, with the header Content-Type: application/json"
    return _text(error["msg"])


def _location(parts: Sequence[str | int]) -> list[str | int]:
    # A caller's own field may have a name as long as the body.
    return [_text(part[:_MAX_NAME]) if isinstance(part, str) else part for part in parts]


def _text(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class DomainErrorRoute(APIRoute):
    """A route whose endpoint may raise the domain's errors, and so may `authenticate`, before it.

    Every answer carries `X-Request-ID`, the caller's own where it has the right form, and
    `Cache-Control: no-store`. The endpoint finds the ID in `request.state.request_id`.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the handler in the table."""
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            request_id = identify(request.scope)
            try:
                bounded = StrictRequest(request.scope, _bounded(request))
                await self.authenticate(bounded)
                response = await handle(bounded)
            except ProvisioningError as error:
                self.note_refusal(request, error)
                response = answer(await self.count_refusal(request, error))
            except RequestValidationError as error:
                self.note_refusal(request, error)
                response = invalid(error)
            except StarletteHTTPException as error:
                self.note_refusal(request, error)
                # As the app's own handler would, which knows nothing of the headers below.
                response = JSONResponse({"detail": error.detail}, error.status_code, error.headers)
            mark(response.raw_headers, request_id)
            return response

        return guarded

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, one with another method too, in whatever app this is."""
        try:
            await super().handle(scope, receive, send)
        except StarletteHTTPException as error:
            # The handler's own are answered above: no method of this route was meant.
            response = await unrouted(Request(scope), error)
            await response(scope, receive, send)

    async def authenticate(self, request: Request) -> None:
        """Do nothing. A subclass raises here to refuse the request before its body is read."""

    def note_refusal(self, request: Request, error: Exception) -> None:
        """Do nothing. A subclass is told here of each request that was refused."""

    async def count_refusal(self, request: Request, error: ProvisioningError) -> ProvisioningError:  # noqa: ARG002 - overridden
        """Return the error that the request is answered with. A subclass may return another one."""
        return error


def _bounded(request: Request) -> Receive:
    """Count the body while it comes in, so that no more of it than is allowed is ever kept."""
    declared = request.headers.get("content-length", "")
    # Its length first: int() refuses thousands of digits.
    if declared.isdecimal() and (len(declared) > _MAX_LENGTH_DIGITS or int(declared) > MAX_BODY_BYTES):
        raise _too_large()
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > MAX_BODY_BYTES:
            raise _too_large()
        return message

    return receive


def _too_large() -> HTTPException:
    return HTTPException(413, f"The body is larger than {MAX_BODY_BYTES // 1024} KiB; send less metadata")
