"""The endpoint that Prometheus reads."""

import asyncio
from collections.abc import Mapping
from typing import Any, Final

from fastapi import APIRouter, Response

from backend.api.dependencies import Service
from backend.api.security import REFUSALS, OpenRoute, Reader, SecuredRoute

# prometheus_client's CONTENT_TYPE_PLAIN_0_0_4.
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_EXAMPLE: Final = (
    "# HELP wireguard_queue_changes Changes that wait for the agent.\n"
    "# TYPE wireguard_queue_changes gauge\n"
    "wireguard_queue_changes 0.0\n"
)


class MetricsResponse(Response):
    """Text for Prometheus."""

    media_type = CONTENT_TYPE


def metrics_router(*, public: bool = False) -> APIRouter:
    """Return the router with `GET /metrics`. It asks for a key of the role read, unless it is public."""
    router = APIRouter(tags=["metrics"], route_class=OpenRoute if public else SecuredRoute)
    router.add_api_route(
        "/metrics",
        _read_publicly if public else _read,
        operation_id="read_metrics",
        summary="Read the metrics for Prometheus",
        response_class=MetricsResponse,
        responses={
            **{status: _as_json(REFUSALS[status]) for status in ([429] if public else REFUSALS)},
            200: {
                "description": "Prometheus's text format 0.0.4; docs/operations.md lists the metrics.",
                "content": {CONTENT_TYPE: {"schema": {"type": "string"}, "example": _EXAMPLE}},
            },
        },
    )
    return router


def _as_json(refusal: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a refusal as JSON: FastAPI would put its schema under this route's own media type."""
    schema = {"$ref": f"#/components/schemas/{refusal['model'].__name__}"}
    content = {kind: {"schema": schema, **parts} for kind, parts in refusal["content"].items()}
    return {"description": refusal["description"], "content": content}


async def _read(_: Reader, service: Service) -> Response:
    """Return every metric of the service."""
    return await _read_publicly(service)


async def _read_publicly(service: Service) -> Response:
    """Return every metric of the service."""
    pieces = []
    for piece in service.metrics.render():
        pieces.append(piece)
        await asyncio.sleep(0)
    return MetricsResponse(b"".join(pieces))
