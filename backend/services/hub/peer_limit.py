"""How many peers the hub's interface takes: checked before anything is written, so that `wg` doesn't fail."""

from collections.abc import Callable

from backend.errors import PeerLimitError


class PeerLimit:
    """The limit of whatever implements the interface, counted over our peers and the operator's."""

    def __init__(
        self, interface: str = "", most: Callable[[], int | None] = lambda: None, fewest: int = 0
    ) -> None:
        """`most` returns the limit, None for none. It is called each time: the interface may be replaced.

        It is not called for fewer than `fewest` peers, which every interface takes.
        """
        self._interface = interface
        self._most = most
        self._fewest = fewest

    def require_room(self, peers: int) -> None:
        """Raise PeerLimitError unless the interface takes one more than `peers`."""
        if peers < self._fewest:
            return
        most = self._most()
        if most is not None and peers >= most:
            raise PeerLimitError(self._interface, most)
