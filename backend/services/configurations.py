"""Renders the configuration that a node gets, as JSON text and as the Pydantic model."""

import json
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from backend.models.wireguard.keys import WireGuardKey
from backend.models.wireguard.peer import Peer
from backend.models.wireguard.provisioning import PERSISTENT_KEEPALIVE_SECONDS, PeerConfiguration
from backend.services.hub.operator_peers import OperatorPeers

# Peers in one chunk: rendering them takes well under a millisecond, and other requests run between chunks.
_CHUNK: Final = 250


class Configurations:
    """Makes peers' configurations. Only three fields differ between peers, so the rest is rendered once."""

    def __init__(
        self, network: IPv4Network, hub_endpoint: str, dns_server: IPv4Address, operator_peers: OperatorPeers
    ) -> None:
        self._operator_peers = operator_peers
        # In the model's order.
        self._hub_fields = {
            "subnet_mask": str(network.netmask),
            "hub_public_key": "",
            "hub_endpoint": hub_endpoint,
            "allowed_ips": str(network),
            "persistent_keepalive": PERSISTENT_KEEPALIVE_SECONDS,
            "dns_servers": [str(dns_server)],
        }
        self._common: tuple[WireGuardKey | None, str] = (None, "")

    def model(self, peer: Peer) -> PeerConfiguration:
        """Return a peer's configuration."""
        return PeerConfiguration.model_validate_json(self.json(peer))

    def json(self, peer: Peer) -> str:
        """Return what the model's ``model_dump_json()`` returns."""
        return _render(peer, self._shared())

    def answer(self, peer: Peer) -> str:
        """Return the ProvisioningResponse for a peer, as JSON."""
        message = f"Peer {peer.node_id} provisioned successfully"
        return f'{{"status":"success","config":{self.json(peer)},"message":"{message}"}}'

    def json_by_node(self, peers: Sequence[Peer]) -> Iterator[str]:
        """Yield the JSON object of these peers' configurations by node_id, in short pieces."""
        common = self._shared()
        yield "{"
        for start in range(0, len(peers), _CHUNK):
            chunk = peers[start : start + _CHUNK]
            text = ",".join([f'"{peer.node_id}":{_render(peer, common)}' for peer in chunk])
            yield f",{text}" if start else text
        yield "}"

    def _shared(self) -> str:
        key, common = self._common
        if key != self._operator_peers.hub_key:
            key = self._operator_peers.hub_key
            fields = self._hub_fields | {"hub_public_key": key}
            common = json.dumps(fields, separators=(",", ":"), ensure_ascii=False)[1:-1]
            self._common = (key, common)
        return common


def _render(peer: Peer, common: str) -> str:
    # None of the three needs escaping: a node_id has letters, digits, dash and underscore.
    moment = peer.provisioned_at.isoformat()[:19]
    return (
        f'{{"node_id":"{peer.node_id}","assigned_ip":"{peer.address}",{common},"provisioned_at":"{moment}Z"}}'
    )
