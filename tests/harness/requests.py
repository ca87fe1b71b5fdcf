"""What clients of the service need: valid requests to provision a node."""

import base64
import ssl
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

# For clients that speak plain HTTP: to load the machine's certificates takes 20 ms for each.
NO_TLS: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def new_key() -> str:
    """Make a WireGuard public key that nobody else has."""
    return base64.b64encode(X25519PrivateKey.generate().public_key().public_bytes_raw()).decode()


def other_spelling(key: str) -> str:
    """Return the same key with bit 255 set, which the key agreement ignores and `wg` doesn't."""
    raw = bytearray(base64.b64decode(key))
    raw[31] |= 0x80
    return base64.b64encode(raw).decode()


def provision_body(node_id: str, key: str | None = None, **over: Any) -> dict[str, Any]:
    """Return the body of a valid request, with the fields in `over` put over it."""
    return {
        "node_id": node_id,
        "public_key": f"libp2p-{node_id}",
        "wireguard_public_key": key or new_key(),
        "capabilities": {"gpu_count": 1, "gpu_memory_mb": 16384, "cpu_cores": 8, "models": ["llama-2-7b"]},
        "version": "1.0.0",
        "metadata": {"region": "eu-1"},
        **over,
    }
