"""Whose request it is by its address: for limits, the audit log and a token's source_cidr."""

from fastapi import Request


def source_of(request: Request) -> str | None:
    """Return the caller's address, None where it came by a UNIX socket."""
    client = request.scope.get("client")
    return None if client is None else client[0]
