"""The endpoints for peers, the pool and challenges. Include `router` with prefix="/api/v1"."""

import asyncio
import hashlib
from dataclasses import replace
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from backend.api.audit import audited
from backend.api.dependencies import Service, applied
from backend.api.embedding import service_of_the_app
from backend.api.errors import problem
from backend.api.security import REFUSALS, Operator, Provisioner, Reader, SecuredRoute, repeatable
from backend.errors import DuplicatePeerError, NoProofAskedError
from backend.models.access.audit import AuditAction
from backend.models.access.callers import Caller
from backend.models.access.idempotency import IdempotencyKey
from backend.models.access.proof import (
    CHALLENGE_HEADER,
    NONCE_HEADER,
    SIGNATURE_HEADER,
    TIMESTAMP_HEADER,
    WINDOW_SECONDS,
    WIREGUARD_PROOF_HEADER,
    IdentityProof,
    SignedRequest,
    WireGuardProof,
)
from backend.models.fields import StrictModel
from backend.models.wireguard.keys import WireGuardKey
from backend.models.wireguard.provisioning import (
    PeerConfiguration,
    ProvisioningRequest,
    ProvisioningResponse,
)
from backend.services.access.challenges import Proof
from backend.services.known_peers import is_repeat

router = APIRouter(
    prefix="/wireguard",
    tags=["WireGuard"],
    route_class=SecuredRoute,
    lifespan=service_of_the_app,
    responses=REFUSALS,
)


class DuplicatePeer(BaseModel):
    """The peer that has the node_id or the WireGuard key already, as far as the caller may see it."""

    message: str = Field(examples=["Peer swarm-node-001 is already provisioned"])
    existing_config: PeerConfiguration | dict[str, str] = Field(
        description="Whole where the node and both keys are the same; node_id and assigned_ip where the key "
        "is another one; empty where another node holds the WireGuard key, and for a caller that is neither "
        "an operator nor shows the peer's own token or proven identity."
    )


class Conflict(BaseModel):
    """The node, or its WireGuard key, is already provisioned."""

    detail: DuplicatePeer


class Deprovisioned(BaseModel):
    """The peer was removed from records, file and interface."""

    status: Literal["success"] = "success"
    message: str = Field(examples=["Peer swarm-node-001 deprovisioned successfully"])


class PoolStats(BaseModel):
    """The pool's figures: total = reserved + allocated + available."""

    total_addresses: int = Field(
        description="Usable ones: without network and broadcast address.", examples=[254]
    )
    reserved_addresses: int = Field(description="The hub's, and those of operator's peers.", examples=[1])
    allocated_addresses: int = Field(examples=[1])
    available_addresses: int = Field(examples=[252])
    utilization_percent: int = Field(ge=0, le=100, examples=[0])


class ChallengeRequest(StrictModel):
    """The key that the node will prove to hold."""

    wireguard_public_key: WireGuardKey


class ChallengeAnswer(BaseModel):
    """A challenge that only the holder of the private key can answer, once, within `expires_in` seconds."""

    challenge_id: str
    server_public_key: str = Field(description="An X25519 key made for this challenge, base64 of 32 bytes.")
    challenge: str = Field(description="Base64 of 32 bytes.")
    expires_in: int
    audience: str = Field(description="The hub's public key: what is signed names it.")


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
            # FastAPI's own schema, which it adds by itself to operations without an entry for 422.
            "schema": {"$ref": "#/components/schemas/HTTPValidationError"},
            "example": {
                "detail": [
                    {
                        "type": "value_error",
                        "loc": ["body", "wireguard_public_key"],
                        "msg": "Value error, a WireGuard key is 44 characters of base64, this is 33",
                    }
                ]
            },
        }
    },
}


_PROOF = "Where the hub asks for proofs (WIREGUARD_REQUIRE_PROOF=true; docs/access.md), all five: "


def _header(name: str, description: str, **schema: Any) -> dict[str, Any]:
    schema = {"type": "string"} | schema
    return {"name": name, "in": "header", "required": False, "schema": schema, "description": description}


# Documented here and not declared as parameters: FastAPI takes longer to read one than the whole body.
_HEADERS: dict[str, Any] = {
    "parameters": [
        _header(
            "Idempotency-Key",
            "The same body with the same key gets the first answer again within 24 hours. 1 to 255 "
            "visible ASCII characters, new for each request.",
            minLength=1,
            maxLength=255,
        ),
        _header(TIMESTAMP_HEADER, f"{_PROOF}Unix seconds, at most {WINDOW_SECONDS} off the hub's clock."),
        _header(NONCE_HEADER, f"{_PROOF}16 to 64 of A-Z, a-z, 0-9, - and _, new for each request."),
        _header(SIGNATURE_HEADER, f"{_PROOF}the Ed25519 signature by the node's libp2p key, in base64."),
        _header(CHALLENGE_HEADER, f"{_PROOF}the challenge_id of `POST /wireguard/challenge`."),
        _header(WIREGUARD_PROOF_HEADER, f"{_PROOF}the MAC that answers the challenge, in base64."),
    ]
}


def _json(text: str | bytes) -> Response:
    """Send text that is JSON already. A test compares it with the JSON of the response model."""
    return Response(text, media_type="application/json")


_NOT_FOUND = problem("No such peer.", "Peer swarm-node-001 not found")
_UNAVAILABLE = problem(
    "The hub or the records could not be updated, nothing was changed; ask again after Retry-After seconds.",
    "interface wg0 does not exist; bring it up with `python -m backend hub up`",
)


@router.post(
    "/challenge",
    operation_id="make_challenge",
    summary="Ask for a challenge to a WireGuard key",
    responses={404: problem("This hub asks for no proof.", NoProofAskedError.message)},
)
@audited(AuditAction.CHALLENGE)
@repeatable()
async def make_challenge(body: ChallengeRequest, _: Provisioner, service: Service) -> ChallengeAnswer:
    """Give a challenge, where this hub asks for proofs (WIREGUARD_REQUIRE_PROOF); 404 elsewhere."""
    proofs = service.access.proofs
    if proofs is None:
        raise NoProofAskedError
    challenge = proofs.challenges.issue(body.wireguard_public_key)
    return ChallengeAnswer(
        challenge_id=challenge.challenge_id,
        server_public_key=challenge.server_public_key,
        challenge=challenge.challenge,
        expires_in=challenge.expires_in,
        audience=service.hub_key,
    )


@router.post(
    "/provision",
    operation_id="provision_peer",
    summary="Provision a peer",
    openapi_extra=_HEADERS,
    response_model=ProvisioningResponse,
    responses={
        409: _CONFLICT,
        422: _INVALID,
        413: problem("The body is larger than 64 KiB.", "The body is larger than 64 KiB; send less metadata"),
        503: problem(
            "No address is left, or the hub or the records could not be updated and nothing was changed; "
            "ask again after Retry-After seconds.",
            "IP pool exhausted: 253 addresses allocated from range 10.0.0.0/24",
        ),
    },
)
@audited(AuditAction.PROVISION)
@repeatable(is_repeat)
async def provision_peer(
    body: ProvisioningRequest,
    request: Request,
    caller: Provisioner,
    service: Service,
) -> Response:
    """Give a node an address, and tell the hub about it. The answer comes when the hub knows the node."""
    request.state.subject = body.node_id
    caller = await _proven(request, body, caller, service)
    keys = request.headers.getlist("idempotency-key")
    if keys:
        # Two headers are joined by a space, which no valid key contains, so `parse` refuses them.
        key = IdempotencyKey.parse(" ".join(keys), await request.body())
        return _json(await _provision_once(body, caller, service, key))
    change = await applied(lambda: service.provision(body, caller), service.in_doubt)
    return _json(service.answer(change))


async def _proven(request: Request, body: ProvisioningRequest, caller: Caller, service: Service) -> Caller:
    """Return the caller with the identity that it proved, where the hub asks for proofs.

    Raises UnauthenticatedError where the caller's token isn't for this node; after that a ProofError, or
    InvalidCredentialsError where public_key is no identity.
    """
    verifier = service.access.proofs
    if verifier is None:
        return caller
    caller.require_node(body.node_id)
    names = (TIMESTAMP_HEADER, NONCE_HEADER, SIGNATURE_HEADER, CHALLENGE_HEADER, WIREGUARD_PROOF_HEADER)
    timestamp, nonce, signature, challenge_id, mac = (_only(request, name) for name in names)
    proof = Proof(
        IdentityProof.parse(timestamp, nonce, signature),
        WireGuardProof.parse(challenge_id, mac),
        SignedRequest(
            request.method,
            request.scope["path"].removeprefix(request.scope.get("root_path", "")),
            service.hub_key,
            hashlib.sha256(await request.body()).digest(),
        ),
    )
    identity, signed_with = verifier.verify(proof, body.public_key, body.wireguard_public_key)
    return replace(caller, identity=identity, nonce=signed_with)


def _only(request: Request, name: str) -> str | None:
    """Return a header's value; None if it is missing, or ambiguous because it was sent twice."""
    values = request.headers.getlist(name)
    return values[0] if len(values) == 1 else None


async def _provision_once(
    body: ProvisioningRequest, caller: Caller, service: Service, key: IdempotencyKey
) -> str | bytes:
    """Return the stored answer to this Idempotency-Key; provision where there is none."""
    stored = await asyncio.to_thread(service.stored_answer, caller, key)
    if stored is None:
        try:
            change = await applied(lambda: service.provision(body, caller, key), service.in_doubt)
        except DuplicatePeerError:
            # A request with the same key may have ended since the first look. Any other error stands: a
            # second look would take seconds where the records do not answer, and say less.
            stored = await asyncio.to_thread(service.stored_answer, caller, key)
            if stored is None:
                raise
        else:
            return service.answer(change)
    return stored


@router.get(
    "/peers",
    operation_id="list_peers",
    summary="List the peers",
    response_model=dict[str, PeerConfiguration],
)
async def list_peers(_: Reader, service: Service) -> Response:
    """Return every peer's configuration by node_id."""
    pieces = []
    for piece in service.list_json():
        pieces.append(piece)
        await asyncio.sleep(0)
    return _json(b"".join(pieces))


@router.get(
    "/peers/{node_id}",
    operation_id="get_peer_config",
    summary="Show a peer",
    response_model=PeerConfiguration,
    responses={404: _NOT_FOUND},
)
async def get_peer_config(node_id: str, _: Reader, service: Service) -> Response:
    """Return one peer's configuration."""
    return _json(service.get_peer_json(node_id))


@router.delete(
    "/peers/{node_id}",
    operation_id="deprovision_peer",
    summary="Deprovision a peer",
    responses={404: _NOT_FOUND, 503: _UNAVAILABLE},
)
@audited(AuditAction.DEPROVISION)
async def deprovision_peer(node_id: str, caller: Operator, service: Service) -> Deprovisioned:
    """Take a peer off the hub and free its address. The answer comes when the hub has forgotten it."""
    await applied(lambda: service.deprovision(node_id, caller), service.in_doubt)
    return Deprovisioned(message=f"Peer {node_id} deprovisioned successfully")


@router.get("/pool/stats", operation_id="get_pool_stats", summary="Show the pool's figures")
async def get_pool_stats(_: Reader, service: Service) -> PoolStats:
    """Return how many addresses the pool has, and how many of them are reserved, allocated and available."""
    return PoolStats(**service.get_pool_stats())
