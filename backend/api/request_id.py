"""A request's ID in logs, records and answers."""

import re
import secrets
from collections.abc import MutableMapping
from typing import Any, Final

# A caller's own ID has to have this form: it goes into logs, records and headers as it is.
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,64}")


def identify(scope: MutableMapping[str, Any]) -> bytes:
    """Return the caller's own ID where it has that form, or else a new one; and keep it in the state."""
    request_id = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    if not _REQUEST_ID.fullmatch(request_id):
        request_id = secrets.token_hex(16).encode()
    scope.setdefault("state", {})["request_id"] = request_id.decode()
    return request_id


def mark(headers: list[tuple[bytes, bytes]], request_id: bytes) -> None:
    """Add the headers that each answer has: the request's ID, and that no cache may keep it."""
    headers += [(b"x-request-id", request_id), (b"cache-control", b"no-store")]
