"""The shapes that cross the HTTP boundary, and the record that is kept of each peer."""

import json
import re
from datetime import UTC
from ipaddress import IPv4Address
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
)

from backend.models.fields import FrozenModel, StrictModel, is_deeper, printable, require_no_secret
from backend.models.wireguard.keys import WireGuardKey

NODE_ID_PATTERN: Final = r"^[A-Za-z0-9_-]{1,128}$"
# https://semver.org/spec/v2.0.0.html
SEMVER_PATTERN: Final = (
    r"^(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)"
    r"(-((0|[1-9][0-9]*|[0-9]*[A-Za-z-][0-9A-Za-z-]*)(\.(0|[1-9][0-9]*|[0-9]*[A-Za-z-][0-9A-Za-z-]*))*))?"
    r"(\+([0-9A-Za-z-]+(\.[0-9A-Za-z-]+)*))?$"
)
_SEMVER: Final = re.compile(SEMVER_PATTERN.removesuffix("$") + r"\Z")
MODELS_MAX: Final = 64
METADATA_MAX_BYTES: Final = 8 * 1024
METADATA_MAX_DEPTH: Final = 8
PERSISTENT_KEEPALIVE_SECONDS: Final = 25


def _name(text: str) -> str:
    if text.isspace():
        raise ValueError("a name that is blank is none")
    return printable(text)


def _semantic(text: str) -> str:
    if _SEMVER.match(text) is None:
        raise ValueError("must be a semantic version (semver 2.0.0), such as 1.4.0 or 1.4.0-rc.1+build.7")
    return text


def _bounded_metadata(value: Any) -> Any:
    """Refuse what is too deep before anything recurses into it, then what is too large."""
    if is_deeper(value, METADATA_MAX_DEPTH):
        raise ValueError(f"at most {METADATA_MAX_DEPTH} levels are allowed")
    try:
        size = len(json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode())
    except UnicodeEncodeError:
        raise ValueError("text must be valid Unicode, without lone surrogates") from None
    except (TypeError, ValueError):
        raise ValueError("only JSON values are allowed, and neither NaN nor Infinity") from None
    if size > METADATA_MAX_BYTES:
        raise ValueError(f"at most {METADATA_MAX_BYTES} bytes of compact JSON are allowed, this is {size}")
    return value


NodeId = Annotated[
    str,
    StringConstraints(pattern=NODE_ID_PATTERN),
    # A name is repeated in the records, the config, the audit log and the answers.
    AfterValidator(require_no_secret),
    Field(description="The node's name, unique in the swarm.", examples=["swarm-node-001"]),
]
PeerPublicKey = Annotated[
    str,
    StringConstraints(min_length=1, max_length=256),
    AfterValidator(printable),
    Field(description="The node's libp2p public key.", examples=["peer_libp2p_public_key"]),
]
SemanticVersion = Annotated[
    str,
    StringConstraints(max_length=256),
    AfterValidator(_semantic),
    Field(
        description="The version of the node's software (semver 2.0.0).",
        json_schema_extra={"pattern": SEMVER_PATTERN},
    ),
]
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=256), AfterValidator(_name)]
UtcSecond = Annotated[
    AwareDatetime, AfterValidator(lambda moment: moment.astimezone(UTC).replace(microsecond=0))
]
Metadata = Annotated[dict[str, JsonValue], BeforeValidator(_bounded_metadata)]


class NodeCapabilities(StrictModel):
    """What the node offers to the swarm. Memory is in MiB."""

    gpu_count: int = Field(default=0, ge=0, le=16)
    gpu_memory_mb: int = Field(default=0, ge=0, le=1_048_576)
    cpu_cores: int = Field(default=1, ge=1, le=256)
    memory_mb: int = Field(default=1024, ge=512, le=2_097_152)
    # fail_fast: each wrong name would be an error of its own.
    models: list[ModelName] = Field(default_factory=list, max_length=MODELS_MAX, fail_fast=True)


class ProvisioningRequest(StrictModel):
    """What a node sends to join."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "node_id": "swarm-node-001",
                "public_key": "peer_libp2p_public_key",
                "wireguard_public_key": "vXs/2igcEtnCFS8dJ1SSp1Gi6AHrqL0h4uvGXghFwS8=",
                "capabilities": {
                    "gpu_count": 1,
                    "gpu_memory_mb": 16384,
                    "cpu_cores": 8,
                    "models": ["llama-2-7b"],
                },
                "version": "1.0.0",
                "metadata": {"region": "eu-1"},
            }
        }
    )

    node_id: NodeId
    public_key: PeerPublicKey
    wireguard_public_key: WireGuardKey
    capabilities: NodeCapabilities
    version: SemanticVersion
    metadata: Metadata | None = Field(default=None, description="At most 8 KiB and 8 levels.")


class PeerConfiguration(FrozenModel):
    """Everything that a node needs to write its own wg-quick(8) file, apart from its private key."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "node_id": "swarm-node-001",
                "assigned_ip": "10.0.0.2",
                "subnet_mask": "255.255.255.0",
                "hub_public_key": "mGqzHhYUtLHdQwJXu1lU5FLJ3yTyD5RcFr8ZGVPp0Gc=",
                "hub_endpoint": "hub.example.com:51820",
                "allowed_ips": "10.0.0.0/24",
                "persistent_keepalive": 25,
                "dns_servers": ["10.0.0.1"],
                "provisioned_at": "2026-02-19T12:00:00Z",
            }
        },
    )

    node_id: str
    assigned_ip: IPv4Address = Field(description="The node's address; the mask is subnet_mask.")
    subnet_mask: IPv4Address = Field(description="The pool's netmask.")
    hub_public_key: WireGuardKey
    hub_endpoint: str = Field(description="host:port for the [Peer] section's Endpoint.")
    allowed_ips: str = Field(description="CIDR for the [Peer] section's AllowedIPs: the pool.")
    persistent_keepalive: int = Field(description="Seconds, for the [Peer] section's PersistentKeepalive.")
    dns_servers: list[IPv4Address]
    provisioned_at: UtcSecond = Field(description="RFC 3339, UTC.")


class ProvisioningResponse(FrozenModel):
    """The answer to a node that has joined."""

    status: Literal["success"] = "success"
    config: PeerConfiguration
    message: str = Field(examples=["Peer swarm-node-001 provisioned successfully"])


class ProvisioningRecord(FrozenModel):
    """What is kept of a peer, durably: the truth that file and interface are made from."""

    node_id: str
    public_key: str
    wireguard_public_key: WireGuardKey
    assigned_ip: IPv4Address
    provisioned_at: UtcSecond
    capabilities: NodeCapabilities
    version: str
    metadata: dict[str, JsonValue] | None = None
    # A peer that isn't on the hub has no record.
    status: Literal["active"] = "active"
