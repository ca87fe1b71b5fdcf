"""The proofs of a request to provision: which of its parts were signed, and by whom."""

import hashlib
from dataclasses import replace

from fastapi import Request

from backend.models.access.callers import Caller
from backend.models.access.proof import (
    CHALLENGE_HEADER,
    NONCE_HEADER,
    SIGNATURE_HEADER,
    TIMESTAMP_HEADER,
    WIREGUARD_PROOF_HEADER,
    IdentityProof,
    WireGuardProof,
)
from backend.models.wireguard.provisioning import ProvisioningRequest
from backend.services.access.challenges import Proof
from backend.services.wireguard_provisioning_service import WireGuardProvisioningService


async def proven(
    request: Request, body: ProvisioningRequest, caller: Caller, service: WireGuardProvisioningService
) -> Caller:
    """Return the caller with the identity that it proved, where the hub asks for it.

    Raises UnauthenticatedError where the caller's token isn't for this node, or else a ProofError or, where
    the node's public_key is none, InvalidCredentialsError.
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
        request.method,
        request.scope["path"].removeprefix(request.scope.get("root_path", "")),
        service.hub_key,
        hashlib.sha256(await request.body()).digest(),
    )
    identity, signed_with = verifier.verify(proof, body.public_key, body.wireguard_public_key)
    return replace(caller, identity=identity, nonce=signed_with)


def _only(request: Request, name: str) -> str | None:
    """Return a header that is there once: of two, one would be checked and the other believed."""
    values = request.headers.getlist(name)
    return values[0] if len(values) == 1 else None
