"""The service's own app: its routers, its pages, and its lifespan."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException

from backend import __version__
from backend.api.documentation import documentation
from backend.api.embedding import provide_service
from backend.api.health import router as health_router
from backend.api.metrics import metrics_router
from backend.api.routes import unrouted
from backend.api.security import require_declared
from backend.api.v1.endpoints.wireguard_access import router as access_router
from backend.api.v1.endpoints.wireguard_health import router as peer_health_router
from backend.api.v1.endpoints.wireguard_provisioning import router as provisioning_router
from backend.services.wireguard_provisioning_service import WireGuardProvisioningService
from backend.settings import Settings


def create_app(settings: Settings, service: WireGuardProvisioningService | None = None) -> FastAPI:
    """Return our own app: the router, the health checks, and the service for as long as it runs.

    A service that is given is used and left running.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if service is not None:
            yield
            await service.access.authenticator.close()
            return
        async with provide_service(app, settings):
            yield

    app = FastAPI(
        title="WireGuard peer provisioning",
        description="Gives swarm nodes what they need to join a WireGuard hub.",
        version=__version__,
        lifespan=lifespan,
        # Ours are limited like the rest, and load nothing from elsewhere.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        # The redirect would go to wherever the Host header says.
        redirect_slashes=False,
    )
    app.add_exception_handler(HTTPException, unrouted)
    app.state.provisioning_settings = settings
    if service is not None:
        app.state.provisioning_service = service
    app.include_router(provisioning_router, prefix="/api/v1")
    app.include_router(access_router, prefix="/api/v1")
    app.include_router(peer_health_router, prefix="/api/v1")
    app.include_router(health_router)
    if settings.wireguard_metrics:
        app.include_router(metrics_router(public=settings.wireguard_metrics_public))
    app.include_router(documentation(app))
    require_declared(app.routes)
    return app
