"""The service as an endpoint's dependency, and how an endpoint waits for the outcome of a change."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Annotated, Any, Final, TypeVar

from fastapi import Depends, Request
from fastapi.routing import APIRoute

from backend.api.embedding import provisioning_service
from backend.errors import OutcomeUnknownError, ProvisioningError
from backend.models.wireguard.peer import Change, ChangeUnderWayError
from backend.services.wireguard_provisioning_service import WireGuardProvisioningService

__all__ = ["Service", "applied", "outcome", "provisioning_service", "service_for"]

T = TypeVar("T")

# Longer than two batches with a `wg` that hangs, shorter than the timeout of most HTTP clients.
ANSWER_TIMEOUT_SECONDS: Final = 45.0
# When a waiting request first asks whether its outcome is in doubt, and how often from then on: seconds.
_CERTAIN_SECONDS: Final = 2.5
_LOOK_SECONDS: Final = 0.5


Service = Annotated[WireGuardProvisioningService, Depends(provisioning_service)]


async def service_for(request: Request) -> WireGuardProvisioningService:
    """Return an endpoint's Service before FastAPI resolves the endpoint's dependencies."""
    if provisioning_service not in request.app.dependency_overrides:
        return await provisioning_service(request)
    # An override may have dependencies itself, and may be a generator: FastAPI knows all of them.
    route = APIRoute("/", _keep_service, dependency_overrides_provider=request.app)
    await route.get_route_handler()(request)
    service: WireGuardProvisioningService = request.state.service
    return service


async def _keep_service(request: Request, service: Service) -> None:
    request.state.service = service


async def applied(decide: Callable[[], Change], in_doubt: Callable[[], bool]) -> Change:
    """Decide, and return the change once it is applied. Waits first for other changes of the same peer.

    Raises what `decide` raises, what the change ended with, or OutcomeUnknownError.
    """
    # One limit for all of them: where `wg` hangs, each change that comes first takes seconds.
    until = asyncio.get_running_loop().time() + ANSWER_TIMEOUT_SECONDS
    while True:
        try:
            change = decide()
        except ChangeUnderWayError as exc:
            try:
                await outcome(exc.change.applied, in_doubt, until)
            except OutcomeUnknownError:
                raise
            except ProvisioningError:
                pass  # the other change did not happen, and this one is decided again
        else:
            await outcome(change.applied, in_doubt, until)
            return change


async def outcome(future: Future[T], in_doubt: Callable[[], bool], until: float | None = None) -> T:
    """Await a change without holding a thread; raise OutcomeUnknownError when it takes too long.

    `in_doubt` says that the records don't tell how the change ends; a request then waits no longer than 3 s.
    It never waits longer than `until`, by the event loop's time(), which is by default 45 s from now.
    The change itself goes on: the client learns its outcome by asking again.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + ANSWER_TIMEOUT_SECONDS if until is None else until
    decided = loop.create_future()
    future.add_done_callback(partial(_wake_from_thread, loop, decided))
    timer = loop.call_later(_CERTAIN_SECONDS, _wake, decided)
    try:
        await decided
        while not future.done():
            if in_doubt():
                raise OutcomeUnknownError(
                    "the records do not answer, and the change may yet happen; ask again to learn how it "
                    "ended"
                )
            if loop.time() >= until:
                raise OutcomeUnknownError(
                    f"no outcome within {ANSWER_TIMEOUT_SECONDS:.0f} s; it goes on, ask again to learn how "
                    "it ended"
                )
            await asyncio.sleep(_LOOK_SECONDS)
    except asyncio.CancelledError:
        # The server cancels its requests when it stops; uncaught that would be a 500.
        raise OutcomeUnknownError("the service is stopping; ask again to learn how it ended") from None
    finally:
        timer.cancel()
    return future.result()


def _wake_from_thread(loop: asyncio.AbstractEventLoop, decided: "asyncio.Future[None]", _: Any) -> None:
    with suppress(RuntimeError):  # the loop is closed, and with it the request is gone
        loop.call_soon_threadsafe(_wake, decided)


def _wake(decided: "asyncio.Future[None]") -> None:
    if not decided.done():
        decided.set_result(None)
