"""/openapi.json, and /docs where the extra `docs` is installed.

FastAPI's own pages load a script from another host into this origin, where it could use what an operator
types. Here all of it comes from the installed package, and a Content-Security-Policy allows nothing else.
"""

from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse

from backend.api.open_route import OpenRoute

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
    # By where the app is mounted.
    rendered: dict[str, bytes] = {}

    @router.get("/openapi.json")
    async def openapi(request: Request) -> Response:
        root = request.scope.get("root_path", "").rstrip("/")
        body = rendered.get(root)
        if body is None:
            schema = app.openapi() | ({"servers": [{"url": root}]} if root else {})
            body = rendered[root] = bytes(JSONResponse(schema).body)
        return Response(body, media_type="application/json")

    assets = _assets()
    if assets is not None:
        _add_pages(router, app.title, assets)
    return router


def _add_pages(router: APIRouter, title: str, assets: dict[str, bytes]) -> None:
    page = _PAGE.format(title=escape(title))

    @router.get("/docs")
    async def docs() -> Response:
        return HTMLResponse(page, headers=_HEADERS)

    @router.get("/docs/start.js")
    async def start() -> Response:
        return Response(_START, media_type="text/javascript", headers=_HEADERS)

    @router.get("/docs/swagger-ui.css")
    async def style() -> Response:
        return _sent("swagger-ui.css", assets)

    @router.get("/docs/swagger-ui-bundle.js")
    async def script() -> Response:
        return _sent("swagger-ui-bundle.js", assets)


def _sent(name: str, assets: dict[str, bytes]) -> Response:
    # In one piece: what a client doesn't read of it is kept once for all of them.
    return Response(assets[name], media_type=_TYPES[name], headers=_HEADERS)


def _assets() -> dict[str, bytes] | None:
    """Return swagger-ui's files out of the package that has them, without running any of its code."""
    found = find_spec("fastapi_offline")
    for directory in (found.submodule_search_locations or ()) if found is not None else ():
        static = Path(directory, "static")
        try:
            return {name: (static / name).read_bytes() for name in _TYPES}
        except OSError:
            continue
    return None
