"""Whose request it is by its address: for limits, the audit log and a token's source_cidr."""

from fastapi import Request

from backend.models.access.sources import TrustedProxies


def source_of(request: Request, proxies: TrustedProxies) -> str | None:
    """Return the caller's address, None for a UNIX socket's, and keep it in `request.state`."""
    client = request.scope.get("client")
    peer = None if client is None else client[0]
    source: str | None = proxies.source(peer, request.scope["headers"])
    request.state.source = source
    return source
