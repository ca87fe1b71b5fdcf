"""Cuts what takes long into pieces, between which the event loop does other work."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final, TypeVar

_Item = TypeVar("_Item")

# How many peers or credentials are read at once.
PIECE: Final = 500


def in_pieces(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    """Yield the items in lists of at most PIECE, each read when it is asked for."""
    iterator = iter(items)
    while piece := list(islice(iterator, PIECE)):
        yield piece
