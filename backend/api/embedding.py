"""How an app that includes the router comes to a service: with its lifespan, or else at its first request.

A mounted app's lifespan is run by nothing, nor is any app's by a `TestClient` outside of a `with` block
(Starlette). The service then runs in a task, until the event loop ends and cancels it.

A service that can't start doesn't take the app down: the log says why in one sentence, each request to the
router gets a 503, and the start is tried again.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from math import inf
from typing import Final

from fastapi import FastAPI, HTTPException, Request

from backend.composition import running_service
from backend.errors import StartRefusedError
from backend.services.wireguard_provisioning_service import WireGuardProvisioningService
from backend.settings import Settings, load_settings

log = logging.getLogger(__name__)

# From a start that failed to the next try, which the next request makes.
RETRY_SECONDS: Final = 10


@dataclass(eq=False)
class _Start:
    """A start outside of a lifespan."""

    # Done when the service runs or can't.
    over: "asyncio.Future[None]"
    # The event loop keeps a weak reference only.
    task: "asyncio.Task[None] | None" = None
    # On the loop's clock. Never, while it isn't over or the service runs.
    retry_at: float = inf

    def fail(self) -> None:
        """Have it tried again in a while."""
        self.retry_at = self.over.get_loop().time() + RETRY_SECONDS
        self.over.set_result(None)


async def provisioning_service(request: Request) -> WireGuardProvisioningService:
    """Return the app's service. Not a plain function: FastAPI would give each request a thread for it."""
    app = request.app
    service = getattr(app.state, "provisioning_service", None)
    # At once, where it's there: this is done for each request.
    if not isinstance(service, WireGuardProvisioningService):
        service = await _service_elsewhere(app, request)
    if not isinstance(service, WireGuardProvisioningService):
        reason = "The provisioning service isn't running; this app's log says why"
        raise HTTPException(503, reason, headers={"Retry-After": str(RETRY_SECONDS)})
    return service


async def _service_elsewhere(app: FastAPI, request: Request) -> object:
    if not hasattr(app.state, "provisioning_service"):
        # The outermost app, where this one is mounted in it.
        outer = getattr(request.scope["router"], "dependency_overrides_provider", None) or app
        if hasattr(outer.state, "provisioning_service"):
            return outer.state.provisioning_service
        await start_late(app)
    return getattr(app.state, "provisioning_service", None)


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


def _has_its_own(app: FastAPI) -> bool:
    started = getattr(app.state, "provisioning_service", None) is not None
    return started or provisioning_service in getattr(app, "dependency_overrides", ())


@asynccontextmanager
async def service_of_the_app(app: FastAPI) -> AsyncIterator[None]:
    """Give an app that includes the router a service, unless it has one of its own.

    Its settings are `app.state.provisioning_settings`, or come from the environment.
    """
    async with AsyncExitStack() as stack:
        if not _has_its_own(app):
            try:
                settings = getattr(app.state, "provisioning_settings", None) or load_settings()
                await stack.enter_async_context(provide_service(app, settings))
            except StartRefusedError as exc:
                # In the message itself: an app that configures no logging shows nothing else.
                log.critical("provisioning_service_not_started: %s", exc)
                failed = app.state.provisioning_start = _Start(asyncio.get_running_loop().create_future())
                failed.fail()
        yield


async def start_late(app: FastAPI) -> None:
    """Start the service of an app whose lifespan has not done it, unless that was tried a moment ago."""
    loop = asyncio.get_running_loop()
    start: _Start | None = getattr(app.state, "provisioning_start", None)
    if start is None or start.over.get_loop() is not loop or start.retry_at < loop.time():
        start = app.state.provisioning_start = _Start(loop.create_future())
        start.task = loop.create_task(_run(app, start), name="provisioning_service")
    # Shielded: others wait for the same start.
    await asyncio.shield(start.over)


async def _run(app: FastAPI, start: _Start) -> None:
    """Run the service until the event loop ends."""
    try:
        async with service_of_the_app(app):
            if hasattr(app.state, "provisioning_service"):
                start.over.set_result(None)
                await start.over.get_loop().create_future()
    except Exception:
        log.exception("provisioning_service_failed")
    finally:
        if start.over.done():
            # Whatever loop comes next, the app has no service in it yet.
            del app.state.provisioning_start, app.state.provisioning_service
        else:
            start.fail()
