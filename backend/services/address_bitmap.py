"""Which of up to 2**24 numbers are taken, and which is the lowest that isn't."""

from typing import Final, Self

_SHIFT: Final = 8
_WIDTH: Final = 1 << _SHIFT
_LAST_BIT: Final = _WIDTH - 1
_FULL: Final = (1 << _WIDTH) - 1
_TOP: Final = 2
_CAPACITY: Final = 1 << _SHIFT * (_TOP + 1)


def _bits(start: int, stop: int) -> int:
    """Return a node with the bits `start` to `stop - 1` set."""
    return (1 << stop) - (1 << start)


def _lowest_zero(bits: int) -> int:
    return (~bits & (bits + 1)).bit_length() - 1


class AddressBitmap:
    """A set of the numbers below `size`, sparse, in three levels of nodes with 256 bits each.

    A bit at the bottom is one number; a bit further up stands for a whole node below it, and is set when
    that node is full. Only a node that is neither empty nor full is stored, so a full one costs a bit,
    and every step of a search takes one node a level, however much is taken. The caller sees to it that
    numbers are within 0..size-1, and that two threads don't change it at the same time.
    """

    __slots__ = ("_count", "_levels")

    def __init__(self, size: int) -> None:
        if not 0 <= size <= _CAPACITY:
            raise ValueError(f"a bitmap holds at most {_CAPACITY} numbers, not {size}")
        self._count = 0
        self._levels: tuple[dict[int, int], ...] = ({}, {}, {})
        # What lies beyond the end is taken for good, so that no search has to know the end.
        self.set_range(size, _CAPACITY)

    @property
    def clear_count(self) -> int:
        """How many numbers are not in the set."""
        return _CAPACITY - self._count

    @property
    def node_count(self) -> int:
        """How many nodes are stored: what the memory is proportional to."""
        return sum(map(len, self._levels))

    def __contains__(self, number: int) -> bool:
        return self._is_covered(0, number >> _SHIFT) or bool(
            self._levels[0].get(number >> _SHIFT, 0) >> (number & _LAST_BIT) & 1
        )

    def copy(self) -> Self:
        """Return a set of its own with the same numbers; costs one step per stored node."""
        twin = type(self).__new__(type(self))
        twin._count = self._count  # noqa: SLF001 - one of its own kind
        twin._levels = tuple(level.copy() for level in self._levels)  # noqa: SLF001 - see above
        return twin

    def lowest_clear(self) -> int | None:
        """Return the lowest number that is not in the set."""
        top = self._levels[_TOP].get(0, 0)
        if top == _FULL:
            return None
        # A clear bit says that the node below isn't full: there is no way back up.
        path = _lowest_zero(top)
        for level in (1, 0):
            path = path << _SHIFT | _lowest_zero(self._levels[level].get(path, 0))
        return path

    def set(self, number: int) -> None:
        """Take a number; taking it twice is taking it once."""
        self._add(0, number >> _SHIFT, 1 << (number & _LAST_BIT))

    def clear(self, number: int) -> None:
        """Give a number back; one that isn't taken stays as it is."""
        if number not in self:
            return
        self._count -= 1
        for nodes in self._levels:
            node, bit = number >> _SHIFT, 1 << (number & _LAST_BIT)
            stored = nodes.get(node)
            # A node that isn't stored although it holds the number is full, and says so by a bit above.
            left = (_FULL if stored is None else stored) & ~bit
            if left:
                nodes[node] = left
            else:
                del nodes[node]
            if stored is not None:
                return
            number = node

    def set_range(self, start: int, stop: int) -> None:
        """Take the numbers `start` to `stop - 1`, whole nodes at once."""
        for level in range(_TOP + 1):
            if start >= stop:
                return
            if level == _TOP or start >> _SHIFT == (stop - 1) >> _SHIFT:
                self._add(level, start >> _SHIFT, _bits(start & _LAST_BIT, ((stop - 1) & _LAST_BIT) + 1))
                return
            if start & _LAST_BIT:
                self._add(level, start >> _SHIFT, _bits(start & _LAST_BIT, _WIDTH))
            if stop & _LAST_BIT:
                self._add(level, stop >> _SHIFT, _bits(0, stop & _LAST_BIT))
            start, stop = (start + _LAST_BIT) >> _SHIFT, stop >> _SHIFT
            # A bit above is about to stand for each of these.
            self._forget(level, start, stop)

    def _is_covered(self, level: int, node: int) -> bool:
        """Whether a bit further up says that the whole node is taken."""
        for nodes in self._levels[level + 1 :]:
            if nodes.get(node >> _SHIFT, 0) >> (node & _LAST_BIT) & 1:
                return True
            node >>= _SHIFT
        return False

    def _add(self, level: int, node: int, mask: int) -> None:
        """Set bits of one node, and pass on upwards that it is full. Below them nothing is stored."""
        if self._is_covered(level, node):
            return
        bits = self._levels[level].get(node, 0)
        self._count += (mask & ~bits).bit_count() << _SHIFT * level
        bits |= mask
        while bits == _FULL and level < _TOP:
            self._levels[level].pop(node, None)
            level += 1
            node, bit = node >> _SHIFT, 1 << (node & _LAST_BIT)
            bits = self._levels[level].get(node, 0) | bit
        self._levels[level][node] = bits

    def _forget(self, level: int, start: int, stop: int) -> None:
        """Drop the stored nodes `start` to `stop - 1` of a level."""
        nodes = self._levels[level]
        if stop - start < len(nodes):
            stored = [node for node in range(start, stop) if node in nodes]
        else:
            stored = [node for node in nodes if start <= node < stop]
        self._count -= sum(nodes.pop(node).bit_count() for node in stored) << _SHIFT * level
