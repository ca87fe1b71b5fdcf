"""How many peers the hub's interface takes: asked before anything is written, so that `wg` needn't fail."""

from collections.abc import Callable

from backend.errors import PeerLimitError


class PeerLimit:
    """The limit of whatever implements the interface, counted over our peers and the operator's."""

    def __init__(
        self, interface: str = "", most: Callable[[], int | None] = lambda: None, fewest: int = 0
    ) -> None:
        """Ask `most` at each look, since the interface may be made anew; None is no limit.

        Not for fewer than `fewest` peers, which any interface takes: a look costs each provision.
        """
        self._interface = interface
        self._most = most
        self._fewest = fewest

    def require_room(self, peers: int) -> None:
        """Raise PeerLimitError unless there may be more than `peers` of them."""
        if peers < self._fewest:
            return
        most = self._most()
        if most is not None and peers >= most:
            raise PeerLimitError(self._interface, most)
