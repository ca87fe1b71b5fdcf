"""What clients of the service need: its paths, the header for a credential, and valid bodies."""

import base64
import ssl
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

API: Final = "/api/v1/wireguard"
PROVISION: Final = f"{API}/provision"
PEERS: Final = f"{API}/peers"
STATS: Final = f"{API}/pool/stats"
TOKENS: Final = f"{API}/tokens"
KEYS: Final = f"{API}/keys"
AUDIT: Final = f"{API}/audit"

# For clients that speak plain HTTP: to load the machine's certificates takes 20 ms for each.
NO_TLS: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def bearer(secret: str) -> dict[str, str]:
    """Return the header that shows a token or a key."""
    return {"Authorization": f"Bearer {secret}"}


def new_key() -> str:
    """Make a new WireGuard public key."""
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
