"""Notices a key whose endpoint goes back and forth, as it does when two nodes have the same key."""

from collections import deque
from collections.abc import Callable
from typing import Final

# A node that moves doesn't come back to an earlier endpoint so often within this time: seconds.
_RETURNS: Final = 3
_WINDOW_SECONDS: Final = 600.0
# The most moves that are remembered of a peer.
_MOVES: Final = 16


class EndpointFlapping:
    """The moves of those peers whose endpoint has changed lately. Times are time.monotonic()'s."""

    def __init__(self, on_flapping: Callable[[str], None]) -> None:
        """`on_flapping` is called with the node_id of a peer that begins to flap."""
        self._on_flapping = on_flapping
        # By node_id: the endpoints that were left, and when. Changed by the thread that calls `note`.
        self._left: dict[str, deque[tuple[float, str]]] = {}
        self._returns: dict[str, deque[float]] = {}
        self._flagged: frozenset[str] = frozenset()

    def __contains__(self, node_id: str) -> bool:
        return node_id in self._flagged

    def __len__(self) -> int:
        return len(self._flagged)

    def note(self, node_id: str, before: str | None, after: str, now: float) -> None:
        """Note that a peer's endpoint has changed."""
        if before is None:
            return
        left = self._left.setdefault(node_id, deque(maxlen=_MOVES))
        if any(endpoint == after for _, endpoint in left):
            returns = self._returns.setdefault(node_id, deque(maxlen=_RETURNS))
            returns.append(now)
            if len(returns) == _RETURNS and now - returns[0] <= _WINDOW_SECONDS:
                self._flag(node_id)
        left.append((now, before))

    def tidy(self, now: float) -> None:
        """Forget the peers that have kept their endpoint for a while."""
        since = now - _WINDOW_SECONDS
        for node_id in [node_id for node_id, left in self._left.items() if left[-1][0] < since]:
            del self._left[node_id]
            self._returns.pop(node_id, None)
            self._flagged -= {node_id}

    def _flag(self, node_id: str) -> None:
        if node_id not in self._flagged:
            self._flagged |= {node_id}
            self._on_flapping(node_id)
