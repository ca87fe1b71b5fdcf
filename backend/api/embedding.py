"""Starts the service of an app that includes the router: in its lifespan, or else at its first request.

Starlette runs no lifespan of a mounted app, nor of an app in a `TestClient` outside of a `with` block. The
service then runs in a task, until the event loop ends and cancels it.

A service that can't start doesn't take the app down: the log says why in one sentence, each request to the
router gets a 503, and the start is tried again.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Final

from fastapi import FastAPI, HTTPException, Request

from backend.composition import running_service
from backend.errors import StartRefusedError
from backend.services.no_metrics import NO_METRICS
from backend.services.ports import Metrics
from backend.services.wireguard_provisioning_service import WireGuardProvisioningService
from backend.settings import Settings, load_settings

log = logging.getLogger(__name__)

# After a failed start the first request after so many seconds tries again.
RETRY_SECONDS: Final = 10


@dataclass(eq=False)
class _Start:
    """A start of the service that a request has begun."""

    loop: asyncio.AbstractEventLoop
    # Set when the service runs or can't.
    over: asyncio.Event = field(default_factory=asyncio.Event)
    # Kept here because the event loop keeps a weak reference only.
    task: "asyncio.Task[None] | None" = None
    # When a failed start may be tried again, on the loop's clock.
    retry_at: float = inf

    def fail(self) -> None:
        """End the wait of the requests, which get a 503; a later request tries again."""
        self.retry_at = self.loop.time() + RETRY_SECONDS
        self.over.set()


async def provisioning_service(request: Request) -> WireGuardProvisioningService:
    """Return the app's service. Not a plain function: FastAPI would give each request a thread for it."""
    service = getattr(request.app.state, "provisioning_service", None)
    # The usual case, once the service runs.
    if isinstance(service, WireGuardProvisioningService):
        return service
    app = request.app
    if not hasattr(app.state, "provisioning_service"):
        outer = _outer_app(request)
        if hasattr(outer.state, "provisioning_service"):
            app = outer
        else:
            await _start_late(app)
    service = getattr(app.state, "provisioning_service", None)
    if not isinstance(service, WireGuardProvisioningService):
        raise HTTPException(
            503,
            "The provisioning service isn't running; this app's log says why",
            headers={"Retry-After": str(RETRY_SECONDS)},
        )
    return service


def metrics_of(request: Request) -> Metrics:
    """Return the metrics of the app's service; where none runs, those that count nothing."""
    for app in (request.app, _outer_app(request)):
        service = getattr(app.state, "provisioning_service", None)
        if isinstance(service, WireGuardProvisioningService):
            return service.metrics
    return NO_METRICS


def _outer_app(request: Request) -> FastAPI:
    """Return the outermost app, where the request's app is mounted in another one."""
    outer: FastAPI | None = getattr(request.scope["router"], "dependency_overrides_provider", None)
    return outer or request.app


@asynccontextmanager
async def provide_service(app: FastAPI, settings: Settings) -> AsyncIterator[None]:
    """Run the service for as long as the app lives. Starting and stopping block, so they get a thread."""
    running = running_service(settings)
    service = app.state.provisioning_service = await asyncio.to_thread(running.__enter__)
    try:
        yield
    finally:
        # Not deleted: a late request would start it anew.
        app.state.provisioning_service = None
        try:
            await service.access.authenticator.close()
        finally:
            await asyncio.to_thread(running.__exit__, None, None, None)


@asynccontextmanager
async def service_of_the_app(app: FastAPI) -> AsyncIterator[None]:
    """Give an app that includes the router a service, unless it has one of its own.

    Its settings are `app.state.provisioning_settings`, or come from the environment.
    """
    started = getattr(app.state, "provisioning_service", None) is not None
    async with AsyncExitStack() as stack:
        if not started and provisioning_service not in app.dependency_overrides:
            try:
                settings = getattr(app.state, "provisioning_settings", None) or load_settings()
                await stack.enter_async_context(provide_service(app, settings))
            except StartRefusedError as exc:
                # In the message itself: an app that configures no logging shows nothing else.
                log.critical("provisioning_service_not_started: %s", exc)
                app.state.provisioning_start = _Start(asyncio.get_running_loop())
                app.state.provisioning_start.fail()
        yield


async def _start_late(app: FastAPI) -> None:
    """Start the service of an app whose lifespan has not done it, unless that was tried a moment ago."""
    loop = asyncio.get_running_loop()
    start: _Start | None = getattr(app.state, "provisioning_start", None)
    if start is None or start.loop is not loop or start.retry_at < loop.time():
        start = app.state.provisioning_start = _Start(loop)
        start.task = loop.create_task(_run(app, start), name="provisioning_service")
    await start.over.wait()


async def _run(app: FastAPI, start: _Start) -> None:
    """Run the service until the event loop ends."""
    try:
        async with service_of_the_app(app):
            if hasattr(app.state, "provisioning_service"):
                start.over.set()
                await asyncio.Event().wait()
    except Exception:
        log.exception("provisioning_service_failed")
    finally:
        if start.over.is_set():
            # The app has no service any more, whatever event loop comes next.
            del app.state.provisioning_start, app.state.provisioning_service
        else:
            start.fail()
