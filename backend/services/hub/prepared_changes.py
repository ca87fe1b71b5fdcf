"""Changes on their way to the hub, whose new file is being written beside the old one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Self

from backend.models.wireguard.keys import WireGuardKey
from backend.models.wireguard.peer import Peer
from backend.services.ports import Action, Change
from backend.services.wireguard_config_manager import ManagedPeer, StagedConfig


def managed(peer: Peer) -> ManagedPeer:
    """Return a peer as the file knows it: without keepalive, for it's the node behind NAT that must send."""
    return ManagedPeer(peer.node_id, peer.wireguard_public_key, peer.address)


@dataclass(frozen=True, slots=True)
class PreparedChanges:
    """`peers` is what there will be with the changes. A replacement, or `discard`, has to follow."""

    changes: Sequence[Change]
    peers: dict[str, ManagedPeer]
    added: Mapping[WireGuardKey, IPv4Address]
    removed: Mapping[WireGuardKey, IPv4Address]
    staged: StagedConfig

    @classmethod
    def begin(
        cls,
        before: Mapping[str, ManagedPeer],
        changes: Sequence[Change],
        stage: Callable[[tuple[ManagedPeer, ...]], StagedConfig],
    ) -> Self:
        """Have the file staged that has these changes; raise HubUpdateError where it can't be written."""
        peers = dict(before)
        added: dict[WireGuardKey, IPv4Address] = {}
        removed: dict[WireGuardKey, IPv4Address] = {}
        for change in changes:
            peer = change.peer
            if change.action is Action.ADD:
                peers[peer.node_id] = managed(peer)
                added[peer.wireguard_public_key] = peer.address
            elif change.action is Action.REMOVE:
                peers.pop(peer.node_id, None)
                removed[peer.wireguard_public_key] = peer.address
        return cls(changes, peers, added, removed, stage(tuple(peers.values())))

    def discard(self) -> None:
        """Take the new file away, unless it has replaced the old one."""
        self.staged.discard()
