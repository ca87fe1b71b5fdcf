"""The class of our routes: it reads a body strictly, answers errors, and gives each answer its request ID.

It works for a router that is included in any app: nothing has to be registered there.
"""

from collections.abc import Callable, Coroutine
from typing import Any, Final

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from backend.api.errors import MAX_BODY_BYTES, BodyTooLargeError, answer, unreadable
from backend.api.request_id import identify, mark
from backend.api.strict_json import StrictJSONError, loads
from backend.api.unrouted import unrouted
from backend.errors import ProvisioningError

_MAX_LENGTH_DIGITS: Final = 20


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
                response = answer(error)
            except HTTPException as error:
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
        except HTTPException as error:
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
