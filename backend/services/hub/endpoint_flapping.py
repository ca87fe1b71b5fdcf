"""Detects a key whose endpoint goes back and forth, as it does when two nodes have the same key."""

from collections import deque
from collections.abc import Callable
from typing import Final

# A peer flaps if it returns so often to an endpoint that it had left, within so many seconds. A node that
# roams seldom returns even once.
_RETURNS: Final = 3
_WINDOW_SECONDS: Final = 600.0
# How many left endpoints are remembered of each peer.
_MOVES: Final = 16


class EndpointFlapping:
    """The peers that flap. Times are time.monotonic()'s."""

    def __init__(self, on_flapping: Callable[[str], None]) -> None:
        """`on_flapping` is called with the node_id of a peer that begins to flap."""
        self._on_flapping = on_flapping
        # By node_id: the endpoints that the peer left, and when. Only the thread that calls `note` uses it.
        self._left: dict[str, deque[tuple[float, str]]] = {}
        # By node_id: when the peer returned to an endpoint that it had left.
        self._returns: dict[str, deque[float]] = {}
        self._flagged: frozenset[str] = frozenset()

    def __contains__(self, node_id: str) -> bool:
        return node_id in self._flagged

    def __len__(self) -> int:
        return len(self._flagged)

    def note(self, node_id: str, before: str | None, after: str, now: float) -> None:
        """Note that a peer's endpoint has changed from `before`, if it had one, to `after`."""
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
        """Forget the peers whose endpoint hasn't changed for ten minutes: they don't flap any more."""
        since = now - _WINDOW_SECONDS
        for node_id in [node_id for node_id, left in self._left.items() if left[-1][0] < since]:
            del self._left[node_id]
            self._returns.pop(node_id, None)
            self._flagged -= {node_id}

    def _flag(self, node_id: str) -> None:
        if node_id not in self._flagged:
            self._flagged |= {node_id}
            self._on_flapping(node_id)
