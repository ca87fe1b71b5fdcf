"""What a peer is told: as a model, and as the JSON text of that model without the model."""

import json
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from backend.models.wireguard.keys import WireGuardKey
from backend.models.wireguard.peer import Peer
from backend.models.wireguard.provisioning import PERSISTENT_KEEPALIVE_SECONDS, PeerConfiguration
from backend.services.hub.operator_peers import OperatorPeers

# So many take well under a millisecond: whoever renders thousands lets others go on in between.
_CHUNK: Final = 250


class Configurations:
    """Makes the configurations of one hub's peers: all but three of their fields are the hub's."""

    def __init__(
        self, network: IPv4Network, hub_endpoint: str, dns_server: IPv4Address, hand_made: OperatorPeers
    ) -> None:
        self._network = network
        self._hub_endpoint = hub_endpoint
        self._dns_server = dns_server
        self._hand_made = hand_made
        self._common: tuple[WireGuardKey | None, str] = (None, "")

    def model(self, peer: Peer) -> PeerConfiguration:
        """Return a peer's configuration."""
        # Built from values that were checked when they came in: not checked again.
        return PeerConfiguration.model_construct(
            node_id=peer.node_id,
            assigned_ip=peer.address,
            subnet_mask=self._network.netmask,
            hub_public_key=self._hand_made.hub_key,
            hub_endpoint=self._hub_endpoint,
            allowed_ips=str(self._network),
            persistent_keepalive=PERSISTENT_KEEPALIVE_SECONDS,
            dns_servers=[self._dns_server],
            provisioned_at=peer.provisioned_at,
        )

    def json(self, peer: Peer) -> str:
        """Return what the model's ``model_dump_json()`` returns."""
        return _render(peer, self._shared())

    def answer(self, peer: Peer) -> str:
        """Return the ProvisioningResponse for a peer, as JSON."""
        message = f"Peer {peer.node_id} provisioned successfully"
        return f'{{"status":"success","config":{self.json(peer)},"message":"{message}"}}'

    def json_by_node(self, peers: Sequence[Peer]) -> Iterator[str]:
        """Return the JSON object of these peers' configurations by node_id, in pieces that are soon made."""
        common = self._shared()
        yield "{"
        for start in range(0, len(peers), _CHUNK):
            chunk = peers[start : start + _CHUNK]
            text = ",".join([f'"{peer.node_id}":{_render(peer, common)}' for peer in chunk])
            yield f",{text}" if start else text
        yield "}"

    def _shared(self) -> str:
        key, common = self._common
        if key != self._hand_made.hub_key:
            key = self._hand_made.hub_key
            fields = {
                "subnet_mask": str(self._network.netmask),
                "hub_public_key": key,
                "hub_endpoint": self._hub_endpoint,
                "allowed_ips": str(self._network),
                "persistent_keepalive": PERSISTENT_KEEPALIVE_SECONDS,
                "dns_servers": [str(self._dns_server)],
            }
            common = json.dumps(fields, separators=(",", ":"), ensure_ascii=False)[1:-1]
            self._common = (key, common)
        return common


def _render(peer: Peer, common: str) -> str:
    # None of the three needs escaping: a node_id has letters, digits, dash and underscore.
    moment = peer.provisioned_at.isoformat()[:19]
    return (
        f'{{"node_id":"{peer.node_id}","assigned_ip":"{peer.address}",{common},"provisioned_at":"{moment}Z"}}'
    )
