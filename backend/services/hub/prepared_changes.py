"""Changes on their way to the hub, whose new file is being written beside the old one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from backend.models.wireguard.peer import Peer
from backend.services.hub.config_text import PeerBlock
from backend.services.ports import Action, Change
from backend.services.wireguard_config_manager import StagedConfig


@dataclass(frozen=True, slots=True)
class PreparedChanges:
    """`peers` is what there will be with the changes. A replacement, or `discard`, has to follow."""

    changes: Sequence[Change]
    peers: dict[str, PeerBlock]
    added: Sequence[Peer]
    removed: Sequence[Peer]
    staged: StagedConfig

    @classmethod
    def begin(
        cls,
        before: Mapping[str, PeerBlock],
        changes: Sequence[Change],
        stage: Callable[[tuple[PeerBlock, ...]], StagedConfig],
    ) -> Self:
        """Have the file staged that has these changes; raise HubUpdateError where it can't be written."""
        peers = dict(before)
        added: list[Peer] = []
        removed: list[Peer] = []
        for change in changes:
            peer = change.peer
            if change.action is Action.ADD:
                peers[peer.node_id] = PeerBlock.of(peer)
                added.append(peer)
            elif change.action is Action.REMOVE:
                peers.pop(peer.node_id, None)
                removed.append(peer)
        return cls(changes, peers, added, removed, stage(tuple(peers.values())))

    def discard(self) -> None:
        """Take the new file away, unless it has replaced the old one."""
        self.staged.discard()
