"""Keys and the shapes of provisioning."""

from backend.models.wireguard.provisioning import (
    NodeCapabilities,
    PeerConfiguration,
    ProvisioningRecord,
    ProvisioningRequest,
    ProvisioningResponse,
)

__all__ = [
    "NodeCapabilities",
    "PeerConfiguration",
    "ProvisioningRecord",
    "ProvisioningRequest",
    "ProvisioningResponse",
]
