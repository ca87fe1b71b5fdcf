"""The route of what needs no credential: limited by source, and it may tell more to who shows one."""

from typing import ClassVar

from fastapi import Request

from backend.api.dependencies import service_for
from backend.api.security import DoorRoute
from backend.api.source import source_of
from backend.errors import AccessError, RateLimitedError, RecordsUnavailableError
from backend.models.access.callers import Caller


class OpenRoute(DoorRoute):
    """Answers every caller. A credential that isn't valid is counted and logged as elsewhere, and ignored."""

    takes_a_caller: ClassVar[bool] = False

    async def admit(self, request: Request) -> None:
        """Count the request against its source; find out who asks where there is a credential."""
        access = request.state.access = (await service_for(request)).access
        if access.authenticator.required and "authorization" not in request.headers:
            await access.authenticator.limit_source(source_of(request, access.proxies))
            return
        try:
            await super().admit(request)
        except RateLimitedError:
            raise
        except (AccessError, RecordsUnavailableError) as error:
            # Whether a process lives doesn't depend on its database.
            self.note_refusal(request, error)


def is_told(request: Request) -> bool:
    """Say whether the caller of an OpenRoute showed a credential that lets it in."""
    caller: Caller | None = getattr(request.state, "caller", None)
    return caller is not None and not caller.may_only_repeat
