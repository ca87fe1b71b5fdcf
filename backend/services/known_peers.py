"""Decides whether a request repeats a known peer's, and whether its caller may see that peer's address."""

from collections.abc import Mapping

from backend.models.access.callers import Caller
from backend.models.access.identity import NodeIdentity
from backend.models.wireguard.peer import UNRECORDED_PUBLIC_KEY, Peer
from backend.models.wireguard.provisioning import ProvisioningRequest


def is_same(body: ProvisioningRequest, identity: NodeIdentity | None, peer: Peer) -> bool:
    """Say whether a request has the node_id and both keys of this peer.

    `identity` is the identity that the sender proved, where the hub asks for proofs.
    """
    if body.node_id != peer.node_id or body.wireguard_public_key != peer.wireguard_public_key:
        return False
    return peer.public_key in {body.public_key, UNRECORDED_PUBLIC_KEY} or _is(identity, peer)


def is_repeat(sent: Mapping[str, object], peer: Peer) -> bool:
    """Say whether a body that isn't validated yet has the peer's node_id and public_key.

    The caller has found the peer by the body's WireGuard key. Another spelling of the same identity is
    accepted; whether the sender has proved it is checked later.
    """
    public_key = sent.get("public_key")
    if sent.get("node_id") != peer.node_id or not isinstance(public_key, str):
        return False
    return public_key == peer.public_key or _is(_identity(public_key), peer)


def may_know_address(body: ProvisioningRequest, caller: Caller, peer: Peer) -> bool:
    """Say whether the caller may know the address of the peer that has the node_id it asks for."""
    if caller.operates or (caller.token_id is not None and caller.token_id == peer.token_id):
        return True
    if peer.public_key == UNRECORDED_PUBLIC_KEY:
        # Nothing is known of the node but its WireGuard key, which is proved with the identity.
        return caller.identity is not None and body.wireguard_public_key == peer.wireguard_public_key
    return _is(caller.identity, peer)


def _is(identity: NodeIdentity | None, peer: Peer) -> bool:
    """Say whether a peer's public_key is this identity: one key can be written in several ways."""
    return identity is not None and _identity(peer.public_key) == identity


def _identity(public_key: str) -> NodeIdentity | None:
    try:
        return NodeIdentity.parse(public_key)
    except ValueError:
        return None
