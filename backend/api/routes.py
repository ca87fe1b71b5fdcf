"""The class of our routes: it reads a body strictly, answers errors, and gives each answer its request ID.

The router works in any app, because nothing has to be registered there. `unrouted` answers requests for an
unknown path or method.
"""

import re
import secrets
import time
from collections.abc import Callable, Coroutine, MutableMapping
from http import HTTPStatus
from typing import Any, Final

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Message, Receive, Scope, Send

from backend.api.errors import MAX_BODY_BYTES, BodyTooLargeError, answer, unreadable
from backend.api.request_metrics import METHODS, count_request
from backend.api.strict_json import StrictJSONError, loads
from backend.errors import ProvisioningError

_MAX_LENGTH_DIGITS: Final = 20
# A caller's own ID has to have this form: it goes into logs, records and headers as it is.
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class StrictRequest(Request):
    """A request whose JSON is read strictly."""

    async def json(self) -> Any:
        """Return the body's value."""
        if not hasattr(self, "_json"):
            try:
                self._json = loads(await self.body())
            except StrictJSONError as error:
                raise unreadable(error) from None
        return self._json


class DomainErrorRoute(APIRoute):
    """A route whose endpoint may raise the domain's errors, and so may `authenticate`, before it.

    Every answer carries `X-Request-ID`, the caller's own where it has the right form, and
    `Cache-Control: no-store`. The endpoint finds the ID in `request.state.request_id`.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler, with errors answered by the table of api/errors.py."""
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            began = time.perf_counter()
            # The class alone: an error that a local variable holds would, by its traceback, hold this frame,
            # and both would wait for the garbage collector.
            failure: type[Exception] | None = None
            request_id = _identify(request.scope)
            try:
                bounded = StrictRequest(request.scope, _bounded(request))
                await self.authenticate(bounded)
                response = await handle(bounded)
            except (ProvisioningError, RequestValidationError) as error:
                response, failure = await self._answer_refusal(request, error)
            except HTTPException as error:
                failure = type(error)
                await self.refuse(request, error)
                # The same as the app's own handler would answer, but with the headers below.
                response = JSONResponse({"detail": error.detail}, error.status_code, error.headers)
            except Exception as error:
                # The app answers it.
                count_request(request, HTTPStatus.INTERNAL_SERVER_ERROR, began, self, type(error))
                raise
            count_request(request, response.status_code, began, self, failure)
            _mark(response.raw_headers, request_id)
            return response

        return guarded

    async def _answer_refusal(
        self, request: Request, error: ProvisioningError | RequestValidationError
    ) -> tuple[Response, type[Exception]]:
        refused = await self.refuse(request, error)
        return answer(refused), type(refused)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; also one with a method that this route doesn't have, in any app."""
        try:
            await super().handle(scope, receive, send)
        except HTTPException as error:
            # Starlette raises this for a method that no route has; errors of the handler are answered above.
            response = await unrouted(Request(scope), error)
            await response(scope, receive, send)

    async def authenticate(self, request: Request) -> None:
        """Do nothing. A subclass raises here to refuse the request before its body is read."""

    async def refuse(self, request: Request, error: Exception) -> Exception:  # noqa: ARG002 - overridden
        """Return the error to answer with. Hook: called for each refused request. The default is `error`."""
        return error


def _bounded(request: Request) -> Receive:
    """Return a `receive` that raises for a body over MAX_BODY_BYTES, before all of it is in memory."""
    declared = request.headers.get("content-length", "")
    # The number of digits first, because int() refuses thousands of them.
    if declared.isdecimal() and (len(declared) > _MAX_LENGTH_DIGITS or int(declared) > MAX_BODY_BYTES):
        raise unreadable(BodyTooLargeError())
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > MAX_BODY_BYTES:
            raise unreadable(BodyTooLargeError())
        return message

    return receive


async def unrouted(request: Request, error: Exception) -> Response:
    """Answer as Starlette does, with the request's ID, and with every method of the path in a 405."""
    if not isinstance(error, HTTPException):
        raise error
    count_request(request, error.status_code, time.perf_counter())
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(_methods(request.scope))
    response = JSONResponse({"detail": error.detail}, error.status_code, headers)
    _mark(response.raw_headers, _identify(request.scope))
    return response


def _methods(scope: Scope) -> list[str]:
    """Return the methods that some route of the app takes at this path. Starlette names one route's alone."""
    asked: dict[str, Any] = {name: scope[name] for name in ("type", "path", "headers", "app")}
    asked["root_path"] = scope.get("root_path", "")
    return [
        method
        for method in METHODS
        if any(route.matches({**asked, "method": method})[0] is Match.FULL for route in scope["app"].routes)
    ]


def _identify(scope: MutableMapping[str, Any]) -> bytes:
    """Return the caller's own ID where it has that form, or else a new one; and keep it in the state."""
    request_id = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    if not _REQUEST_ID.fullmatch(request_id):
        request_id = secrets.token_hex(16).encode()
    scope.setdefault("state", {})["request_id"] = request_id.decode()
    return request_id


def _mark(headers: list[tuple[bytes, bytes]], request_id: bytes) -> None:
    """Add the headers that each answer has: the request's ID, and that no cache may keep it."""
    headers += [(b"x-request-id", request_id), (b"cache-control", b"no-store")]
