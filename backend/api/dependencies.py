"""How an endpoint gets at the service, and how it waits for it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Final, TypeVar

from fastapi import Depends, FastAPI, HTTPException, Request

from backend.errors import OutcomeUnknownError
from backend.services.wireguard_provisioning_service import WireGuardProvisioningService

T = TypeVar("T")

# Longer than two batches that meet a `wg` which hangs, shorter than the patience of most HTTP clients.
ANSWER_TIMEOUT_SECONDS: Final = 45.0
# When a waiting request first asks whether its outcome is in doubt, and how often from then on: seconds.
_CERTAIN_SECONDS: Final = 2.5
_LOOK_SECONDS: Final = 0.5


async def provisioning_service(request: Request) -> WireGuardProvisioningService:
    """Return the app's service. Not a plain function: FastAPI would give each request a thread for it."""
    service = getattr(request.app.state, "provisioning_service", None)
    if not isinstance(service, WireGuardProvisioningService):
        reason = "The provisioning service isn't running: start this app with its lifespan"
        raise HTTPException(503, reason, headers={"Retry-After": "10"})
    return service


Service = Annotated[WireGuardProvisioningService, Depends(provisioning_service)]


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


@asynccontextmanager
async def service_of_the_app(app: FastAPI) -> AsyncIterator[None]:
    """Give an app that includes the router a service from the environment, unless it has one of its own."""
    if hasattr(app.state, "provisioning_service"):
        yield
        return
    # The one arrow that points outwards: an app that merely includes the router has no other composition.
    from backend.main import provide_service  # noqa: PLC0415 - importing it at the top would be a circle
    from backend.settings import load_settings  # noqa: PLC0415 - belongs to it

    async with provide_service(app, load_settings()):
        yield
