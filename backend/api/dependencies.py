"""How an endpoint gets at the service, and how it waits for it."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Annotated, Final, TypeVar

from fastapi import Depends, Request
from fastapi.dependencies.utils import get_dependant, solve_dependencies
from fastapi.exceptions import RequestValidationError

from backend.api.embedding import provisioning_service
from backend.errors import OutcomeUnknownError
from backend.services.wireguard_provisioning_service import WireGuardProvisioningService

__all__ = ["Service", "outcome", "provisioning_service", "service_for"]

T = TypeVar("T")

# Longer than two batches that meet a `wg` which hangs, shorter than the patience of most HTTP clients.
ANSWER_TIMEOUT_SECONDS: Final = 45.0
# When a waiting request first asks whether its outcome is in doubt, and how often from then on: seconds.
_CERTAIN_SECONDS: Final = 2.5
_LOOK_SECONDS: Final = 0.5


Service = Annotated[WireGuardProvisioningService, Depends(provisioning_service)]


def _take(service: Service) -> None:
    """Depend on the service and on nothing else."""


async def service_for(request: Request) -> WireGuardProvisioningService:
    """Return what an endpoint gets as its Service, for those who ask outside of FastAPI's dependencies."""
    if provisioning_service not in getattr(request.app, "dependency_overrides", ()):
        return await provisioning_service(request)
    solved = await solve_dependencies(
        request=request,
        dependant=get_dependant(path=request.url.path, call=_take),
        dependency_overrides_provider=request.app,
        async_exit_stack=request.scope["fastapi_inner_astack"],
        embed_body_fields=False,
    )
    if solved.errors:
        raise RequestValidationError(solved.errors)
    service: WireGuardProvisioningService = solved.values["service"]
    return service


async def outcome(future: Future[T], in_doubt: Callable[[], bool]) -> T:
    """Await a change without holding a thread; raise OutcomeUnknownError when it takes too long.

    `in_doubt` says that the records don't tell how it ends; then that takes 3 s. The change itself goes on:
    who asks again learns how it ended.
    """
    loop = asyncio.get_running_loop()
    decided = loop.create_future()
    future.add_done_callback(lambda _: _tell(loop, decided))
    until = loop.time() + ANSWER_TIMEOUT_SECONDS
    timer: asyncio.TimerHandle

    def look() -> None:
        nonlocal timer
        if in_doubt() or loop.time() >= until:
            _wake(decided)
        else:
            timer = loop.call_later(_LOOK_SECONDS, look)

    timer = loop.call_later(min(_CERTAIN_SECONDS, ANSWER_TIMEOUT_SECONDS), look)
    try:
        await decided
    except asyncio.CancelledError:
        # The server gives its requests up when it stops; uncaught that would be a 500.
        raise OutcomeUnknownError("the service is stopping; ask again to learn how it ended") from None
    finally:
        timer.cancel()
    if future.done():
        return future.result()
    if loop.time() < until:
        raise OutcomeUnknownError(
            "the records do not answer, and the change may yet happen; ask again to learn how it ended"
        )
    raise OutcomeUnknownError(
        f"no outcome within {ANSWER_TIMEOUT_SECONDS:.0f} s; it goes on, ask again to learn how it ended"
    )


def _tell(loop: asyncio.AbstractEventLoop, decided: "asyncio.Future[None]") -> None:
    with suppress(RuntimeError):  # the loop is closed, and nobody waits any more
        loop.call_soon_threadsafe(_wake, decided)


def _wake(decided: "asyncio.Future[None]") -> None:
    if not decided.done():
        decided.set_result(None)
