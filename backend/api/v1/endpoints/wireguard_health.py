"""The endpoints for the peers' health."""

import asyncio
import json
from datetime import UTC, datetime
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from backend.api.dependencies import Service
from backend.api.errors import problem
from backend.api.security import REFUSALS, Reader, SecuredRoute
from backend.models.fields import StrictModel
from backend.models.wireguard.health import HealthState, PeerHealth
from backend.models.wireguard.peer import cidr
from backend.services.hub.hub_health import HealthReport, HealthStatus, HubHealth
from backend.services.pieces import in_pieces

router = APIRouter(prefix="/wireguard", tags=["WireGuard"], route_class=SecuredRoute, responses=REFUSALS)

# A request waits at most so long for a new look at the interface, then answers from the last one: seconds.
_PATIENCE_SECONDS: Final = 2.0


class PeerHealthAnswer(BaseModel):
    """One peer as the hub sees it."""

    node_id: str = Field(examples=["swarm-node-001"])
    public_key: str = Field(examples=["vXs/2igcEtnCFS8dJ1SSp1Gi6AHrqL0h4uvGXghFwS8="])
    state: HealthState = Field(
        description="A sign of life is a handshake or data from the peer. never: no handshake yet. online: "
        "a sign of life within 75 s (WIREGUARD_SUSPECT_AFTER). suspect: none for 75 s. offline: none for "
        "180 s (WIREGUARD_OFFLINE_AFTER), as also with an idle node that sends no keepalive."
    )
    endpoint: str | None = Field(
        description="The last address and UDP port that the hub received from; null if there was none.",
        examples=["198.51.100.7:51820"],
    )
    allowed_ips: list[str] = Field(examples=[["10.0.0.2/32"]])
    latest_handshake_seconds: int | None = Field(
        default=None,
        description="Seconds since its last handshake; absent if it has made none.",
        examples=[41],
    )
    received_bytes: int = Field(
        description="Bytes that the hub has received from the peer; a new interface begins at 0.",
        examples=[52428800],
    )
    sent_bytes: int = Field(
        description="Bytes that the hub has sent to the peer; a new interface begins at 0.",
        examples=[126353408],
    )
    persistent_keepalive: int = Field(
        description="The PersistentKeepalive that the hub uses towards the peer, in seconds; 0: off.",
        examples=[0],
    )
    is_stale: bool = Field(
        description="Whether the peer has made a handshake once, and has shown no sign of life for "
        "stale_threshold seconds."
    )
    endpoint_flapping: bool = Field(
        description="Whether the endpoint goes back and forth, as when two nodes have the same key."
    )


class HubHealthAnswer(BaseModel):
    """The health of the hub. A peer that has made no handshake yet counts in peer_count alone."""

    status: HealthStatus = Field(
        description="healthy: no peer is stale. degraded: some are stale. unhealthy: all are stale, or there "
        "is no interface. Peers that have made no handshake yet don't count."
    )
    interface: str = Field(examples=["wg0"])
    public_key: str = Field(
        description="The hub's public key.", examples=["HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykw="]
    )
    listening_port: int | None = Field(description="UDP; null before the first look.", examples=[51820])
    peer_count: int = Field(examples=[3])
    healthy_peers: int = Field(examples=[2])
    stale_peers: int = Field(examples=[0])
    stale_peer_list: list[str] = Field(description="The stale peers' keys.", examples=[[]])
    total_received_bytes: int = Field(examples=[1073741824])
    total_sent_bytes: int = Field(examples=[536870912])
    timestamp: datetime = Field(
        description="When the interface was last read with success; the time of the answer if it never was."
    )
    reason: str | None = Field(
        default=None, description="Why the interface can't be read now; absent if it was read."
    )
    peers: list[PeerHealthAnswer] | None = Field(
        default=None, description="Each peer; absent without include_peers=true."
    )


class StaleQuery(StrictModel):
    """When a peer counts as stale."""

    # All of a URL's query is text.
    model_config = ConfigDict(strict=False)

    stale_threshold: int = Field(
        default=300, ge=60, le=3600, description="Seconds without a sign of life after which a peer is stale."
    )


class HealthQuery(StaleQuery):
    """What to include in the answer, and for which interface."""

    interface: str | None = Field(
        default=None, max_length=256, description="The hub's interface; another name gets a 404."
    )
    include_peers: bool = Field(default=False, description="Also show each peer.")


@router.get(
    "/health",
    operation_id="get_health",
    summary="Show the hub's health",
    response_model=HubHealthAnswer,
    responses={404: problem("Another interface.", "This hub has no such interface; its interface is wg0")},
)
async def get_health(query: Annotated[HealthQuery, Query()], _: Reader, service: Service) -> Response:
    """Return how many peers show signs of life, how many are stale, and the hub's status."""
    health = service.health
    health.require_interface(query.interface)
    await _look(health)
    report = health.report(query.stale_threshold)
    parts: list[str] = []
    async with health.one_report:
        for piece in in_pieces(health.monitor.peers()):
            for peer in piece:
                report.add(peer)
            if query.include_peers:
                parts.append(",".join(_json(_peer(peer, report)) for peer in piece))
            await asyncio.sleep(0)
    text = _json(_sum(health, service.hub_key, report))
    if query.include_peers:
        text = f'{text[:-1]},"peers":[{",".join(parts)}]}}'
    return Response(text, media_type="application/json")


@router.get(
    "/peers/{node_id}/health",
    operation_id="get_peer_health",
    summary="Show a peer's health",
    response_model=PeerHealthAnswer,
    responses={404: problem("No such peer.", "Peer swarm-node-001 not found")},
)
async def get_peer_health(
    node_id: str, query: Annotated[StaleQuery, Query()], _: Reader, service: Service
) -> Response:
    """Return one peer's state, and when and where the hub received from it last."""
    await _look(service.health)
    peer = service.health.monitor.peer(node_id)
    text = _json(_peer(peer, service.health.report(query.stale_threshold)))
    return Response(text, media_type="application/json")


def _json(fields: dict[str, Any]) -> str:
    return json.dumps(fields, separators=(",", ":"))


async def _look(health: HubHealth) -> None:
    """Wait for a look that is at most a second old, unless it takes too long."""
    await asyncio.wait([asyncio.wrap_future(health.refresh())], timeout=_PATIENCE_SECONDS)


def _sum(health: HubHealth, hub_key: str, report: HealthReport) -> dict[str, Any]:
    looked_at = health.monitor.looked_at
    looked = datetime.now(UTC) if looked_at is None else datetime.fromtimestamp(looked_at, UTC)
    fields = {
        "status": report.status,
        "interface": health.interface,
        "public_key": hub_key,
        "listening_port": health.monitor.listen_port,
        "peer_count": report.peer_count,
        "healthy_peers": report.healthy_peers,
        "stale_peers": len(report.stale_keys),
        "stale_peer_list": report.stale_keys,
        "total_received_bytes": report.received_bytes,
        "total_sent_bytes": report.sent_bytes,
        "timestamp": looked.isoformat(timespec="seconds").replace("+00:00", "Z"),
    }
    return fields if health.problem is None else fields | {"reason": health.problem}


def _peer(peer: PeerHealth, report: HealthReport) -> dict[str, Any]:
    fields = {
        "node_id": peer.peer.node_id,
        "public_key": peer.peer.wireguard_public_key,
        "state": peer.state,
        "endpoint": peer.endpoint,
        "allowed_ips": list(map(cidr, peer.peer.allowed_ips)),
        "received_bytes": peer.received_bytes,
        "sent_bytes": peer.sent_bytes,
        "persistent_keepalive": peer.persistent_keepalive,
        "is_stale": report.is_stale(peer),
        "endpoint_flapping": peer.endpoint_flapping,
    }
    if peer.handshake_age is None:
        return fields
    return fields | {"latest_handshake_seconds": int(peer.handshake_age)}
