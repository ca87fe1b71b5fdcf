"""The answers to a path or a method that no route has."""

from http import HTTPStatus
from typing import Any, Final

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Scope

from backend.api.request_id import identify, mark

_METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


async def unrouted(request: Request, error: Exception) -> Response:
    """Answer as Starlette does, with the request's ID, and with every method of the path in a 405."""
    if not isinstance(error, HTTPException):
        raise error
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(_methods(request.scope))
    response = JSONResponse({"detail": error.detail}, error.status_code, headers)
    mark(response.raw_headers, identify(request.scope))
    return response


def _methods(scope: Scope) -> list[str]:
    """Return the methods that some route of the app takes at this path. Starlette names one route's alone."""
    asked: dict[str, Any] = {name: scope[name] for name in ("type", "path", "headers", "app")}
    asked["root_path"] = scope.get("root_path", "")
    return [
        method
        for method in _METHODS
        if any(route.matches({**asked, "method": method})[0] is Match.FULL for route in scope["app"].routes)
    ]
