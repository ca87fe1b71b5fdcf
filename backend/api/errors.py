"""The one table from the domain's errors to HTTP, and the route class that applies it and bounds the body.

It works for a router that is included in any app: nothing has to be registered there.
"""

from collections.abc import Callable, Coroutine, Sequence
from http import HTTPStatus
from typing import Any, Final

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import Message, Receive

from backend.errors import (
    AddressTakenError,
    DuplicatePeerError,
    HubUpdateError,
    InvalidCredentialsError,
    IPPoolExhaustedError,
    OutcomeUnknownError,
    PeerNotFoundError,
    ProvisioningError,
    RecordsUnavailableError,
)

# The nearest class in an error's line of descent counts.
STATUS: Final[dict[type[ProvisioningError], int]] = {
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


def _nearest(table: dict[type[ProvisioningError], int], error: ProvisioningError) -> int:
    return next(table[kind] for kind in type(error).__mro__ if kind in table)


def answer(error: ProvisioningError) -> JSONResponse:
    """Return the HTTP answer to one of the domain's errors."""
    status = _nearest(STATUS, error)
    retry_after = {"Retry-After": str(_nearest(RETRY_AFTER, error))}
    detail: object = str(error)
    if isinstance(error, DuplicatePeerError):
        detail = {"message": str(error), "existing_config": error.existing_config}
    elif isinstance(error, InvalidCredentialsError):
        detail = [{"type": "value_error", "loc": ["body", error.field], "msg": error.reason}]
    return JSONResponse(
        {"detail": detail},
        status_code=status,
        headers=retry_after if status == HTTPStatus.SERVICE_UNAVAILABLE else None,
    )


def invalid(error: RequestValidationError) -> JSONResponse:
    """Return FastAPI's list of errors without the input.

    What was sent may be a secret, may be nested too deep to be sent back, or no valid Unicode.
    """
    return _unprocessable(
        [{"type": e["type"], "loc": _location(e["loc"]), "msg": _message(e)} for e in error.errors()]
    )


def _unprocessable(errors: list[dict[str, Any]]) -> JSONResponse:
    return JSONResponse({"detail": errors}, status_code=422)


def _message(error: dict[str, Any]) -> str:
    if tuple(error["loc"]) == ("body",) and error["type"] in {"model_attributes_type", "missing"}:
        return "send one JSON object, with the header Content-Type: application/json"
    return _text(error["msg"])


def _location(parts: Sequence[str | int]) -> list[str | int]:
    return [_text(part) if isinstance(part, str) else part for part in parts]


def _text(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class DomainErrorRoute(APIRoute):
    """A route whose endpoint may raise the domain's errors."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap the handler in the table."""
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            try:
                return await handle(Request(request.scope, _bounded(request)))
            except ProvisioningError as error:
                return answer(error)
            except RequestValidationError as error:
                return invalid(error)
            except StarletteHTTPException as error:
                if error.status_code != HTTPStatus.BAD_REQUEST:
                    raise
                # What FastAPI says of a body that is no JSON in a way that it has no list of errors for.
                reason = "not readable as JSON: send UTF-8, nested less deeply, with shorter numbers"
                return _unprocessable([{"type": "json_invalid", "loc": ["body"], "msg": reason}])

        return guarded


def _bounded(request: Request) -> Receive:
    """Count the body while it comes in, so that no more of it than is allowed is ever kept."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > MAX_BODY_BYTES:
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
