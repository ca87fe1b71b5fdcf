"""The endpoints of provisioning. Include `router` with prefix="/api/v1"."""

import asyncio
from typing import Any, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, Field

from backend.api.dependencies import Service, outcome, service_of_the_app
from backend.api.errors import DomainErrorRoute
from backend.models.wireguard.provisioning import (
    PeerConfiguration,
    ProvisioningRequest,
    ProvisioningResponse,
)

router = APIRouter(
    prefix="/wireguard",
    tags=["wireguard"],
    route_class=DomainErrorRoute,
    lifespan=service_of_the_app,
)


class Problem(BaseModel):
    """Why not, in a sentence."""

    detail: str


class DuplicatePeer(BaseModel):
    """What stands in the way, as far as the caller may know it."""

    message: str = Field(examples=["Peer swarm-node-001 is already provisioned"])
    existing_config: PeerConfiguration | dict[str, str] = Field(
        description="Whole where the node and both keys are the same; node_id and assigned_ip where the key "
        "is another one; empty where another node holds the WireGuard key."
    )


class Conflict(BaseModel):
    """The node, or its WireGuard key, is already provisioned."""

    detail: DuplicatePeer


class Deprovisioned(BaseModel):
    """The peer is gone."""

    status: Literal["success"] = "success"
    message: str = Field(examples=["Peer swarm-node-001 deprovisioned successfully"])


class PoolStats(BaseModel):
    """The pool's figures: total = reserved + allocated + available."""

    total_addresses: int = Field(
        description="Usable ones: without network and broadcast address.", examples=[254]
    )
    reserved_addresses: int = Field(description="The hub's, and those of hand-made peers.", examples=[1])
    allocated_addresses: int = Field(examples=[1])
    available_addresses: int = Field(examples=[252])
    utilization_percent: int = Field(ge=0, le=100, examples=[0])


def _problem(description: str, example: str) -> dict[str, Any]:
    return {
        "model": Problem,
        "description": description,
        "content": {"application/json": {"example": {"detail": example}}},
    }


_CONFLICT: dict[str, Any] = {
    "model": Conflict,
    "description": "The node or its WireGuard key is already provisioned; nothing was changed.",
    "content": {
        "application/json": {
            "example": {
                "detail": {
                    "message": "Peer swarm-node-001 is already provisioned",
                    "existing_config": {"node_id": "swarm-node-001", "assigned_ip": "10.0.0.2"},
                }
            }
        }
    },
}
_INVALID: dict[str, Any] = {
    "description": "The input can't be accepted; each entry says where and why.",
    "content": {
        "application/json": {
            "example": {
                "detail": [
                    {
                        "type": "value_error",
                        "loc": ["body", "wireguard_public_key"],
                        "msg": "Value error, a WireGuard key is 44 characters of base64, this is 33",
                    }
                ]
            }
        }
    },
}


def _json(text: str | bytes) -> Response:
    """Send JSON as it is: what a model would make of it is known, and is tested against the model."""
    return Response(text, media_type="application/json")


_NOT_FOUND = _problem("No such peer.", "Peer swarm-node-001 not found")
_UNAVAILABLE = _problem(
    "The hub or the records could not be updated, nothing was changed; ask again after Retry-After seconds.",
    "interface wg0 does not exist; bring it up (`python -m backend hub up` or `wg-quick up wg0`)",
)


@router.post(
    "/provision",
    summary="Provision a peer",
    response_model=ProvisioningResponse,
    responses={
        409: _CONFLICT,
        422: _INVALID,
        413: _problem(
            "The body is larger than 64 KiB.", "The body is larger than 64 KiB; send less metadata"
        ),
        503: _problem(
            "No address is left, or the hub or the records could not be updated and nothing was changed; "
            "ask again after Retry-After seconds.",
            "IP pool exhausted: 253 addresses allocated from range 10.0.0.0/24",
        ),
    },
)
async def provision_peer(request: ProvisioningRequest, service: Service) -> Response:
    """Give a node an address, and tell the hub about it. The answer comes when the hub knows the node."""
    peer = await outcome(service.submit_provision(request))
    message = f"Peer {peer.node_id} provisioned successfully"
    return _json(f'{{"status":"success","config":{service.peer_json(peer)},"message":"{message}"}}')


@router.get("/peers", summary="List the peers", response_model=dict[str, PeerConfiguration])
async def list_peers(service: Service) -> Response:
    """Return every peer's configuration by node_id."""
    pieces = []
    for piece in service.list_json():
        pieces.append(piece)
        await asyncio.sleep(0)
    return _json(b"".join(pieces))


@router.get(
    "/peers/{node_id}",
    summary="Show a peer",
    response_model=PeerConfiguration,
    responses={404: _NOT_FOUND},
)
async def get_peer(node_id: str, service: Service) -> Response:
    """Return one peer's configuration."""
    return _json(service.get_peer_json(node_id))


@router.delete(
    "/peers/{node_id}", summary="Deprovision a peer", responses={404: _NOT_FOUND, 503: _UNAVAILABLE}
)
async def deprovision_peer(node_id: str, service: Service) -> Deprovisioned:
    """Take a peer off the hub and free its address. The answer comes when the hub has forgotten it."""
    await outcome(service.submit_deprovision(node_id))
    return Deprovisioned(message=f"Peer {node_id} deprovisioned successfully")


@router.get("/pool/stats", summary="Show the pool's figures")
async def pool_stats(service: Service) -> PoolStats:
    """Return how many addresses there are, and what became of them."""
    return PoolStats(**service.get_pool_stats())
