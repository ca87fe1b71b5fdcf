"""The service without access control, to see what that costs. Run as a module, in place of `backend`.

No caller is authenticated, nothing is counted, and nothing is written to the audit log.
"""

from typing import Any

from fastapi import Request

from backend.__main__ import app
from backend.adapters.records import audit
from backend.api.security import SecuredRoute
from backend.models.access.callers import SERVICE


async def authenticate(_: SecuredRoute, request: Request) -> None:
    """Take every request for the service's own."""
    request.state.caller = SERVICE
    request.state.access = request.app.state.provisioning_service.access


def write_nothing(*_: Any) -> int:
    """Leave the audit log empty."""
    return 0


if __name__ == "__main__":
    setattr(SecuredRoute, "authenticate", authenticate)  # noqa: B010 - a plain assignment is no method to mypy
    setattr(audit, "append_audit", write_nothing)  # noqa: B010 - see above
    app(prog_name="service without access control")
