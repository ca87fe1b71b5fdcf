"""/openapi.json, and /docs where the extra `docs` is installed.

FastAPI's own pages load a script from another host into this origin, where it could use what an operator
types. Here all of it comes from the installed package, and a Content-Security-Policy allows nothing else.
"""

from collections.abc import Awaitable, Callable
from functools import cache
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse

from backend.api.security import OpenRoute

# swagger-ui sets style attributes and has images in its style sheet; it needs nothing else.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
# All paths are relative: the app may be mounted somewhere.
_PAGE: Final = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
_START: Final = (
    'SwaggerUIBundle({url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null});\n'
)
_TYPES: Final = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript"}


def documentation(app: FastAPI) -> APIRouter:
    """Return the routes that describe the app, none of which is in its schema."""
    router = APIRouter(route_class=OpenRoute, include_in_schema=False)

    @cache
    def rendered(root: str) -> bytes:
        """Return the schema for where the app is mounted."""
        schema = app.openapi() | ({"servers": [{"url": root}]} if root else {})
        return bytes(JSONResponse(schema).body)

    @router.get("/openapi.json")
    async def openapi(request: Request) -> Response:
        root = request.scope.get("root_path", "").rstrip("/")
        return Response(rendered(root), media_type="application/json")

    if assets := _assets():
        page = _PAGE.format(title=escape(app.title))
        router.add_api_route("/docs", _sender(page, "text/html"))
        router.add_api_route("/docs/start.js", _sender(_START, "text/javascript"))
        for name, media_type in _TYPES.items():
            router.add_api_route(f"/docs/{name}", _sender(assets[name], media_type))
    return router


def _sender(body: str | bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        # In one piece, shared by all answers: slow clients take no memory for it.
        return Response(body, media_type=media_type, headers=_HEADERS)

    return send


def _assets() -> dict[str, bytes]:
    """Return swagger-ui's files where the package is installed, without running any of its code."""
    found = find_spec("fastapi_offline")
    for directory in (found.submodule_search_locations or ()) if found is not None else ():
        static = Path(directory, "static")
        try:
            return {name: (static / name).read_bytes() for name in _TYPES}
        except OSError:
            continue
    return {}
