"""Patterns of node names: `*` is any run of characters, `?` any one, and all else is itself."""

import re
from functools import lru_cache
from typing import Final

NODE_ID_GLOB: Final = r"^[A-Za-z0-9_*?-]{1,128}$"
_GLOB: Final = re.compile(NODE_ID_GLOB[1:-1])


def parse_pattern(text: str) -> str:
    """Check the pattern's characters and length; raise ValueError."""
    if _GLOB.fullmatch(text) is None:
        raise ValueError("a node_id pattern is 1 to 128 of A-Z a-z 0-9 _ - and the wildcards * and ?")
    return text


def pattern_matches(pattern: str, node_id: str) -> bool:
    """Say whether the whole name fits, in time linear in its length whatever the pattern is.

    Every way to match is followed at once, one bit each (Shift-And), so there is nothing to go back to.
    """
    places, anywhere, stays, end = _compiled(pattern)
    reached = 1
    for character in node_id:
        reached = (reached & places.get(character, anywhere)) << 1 | (reached & stays)
        if not reached:
            return False
    return bool(reached & end)


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> tuple[dict[str, int], int, int, int]:
    """Return the places that each character may fill, those that any may, the stars', and the end.

    Bit n stands for n single characters of the pattern matched so far.
    """
    places: dict[str, int] = {}
    anywhere, stays, bit = 0, 0, 1
    for character in pattern:
        if character == "*":
            stays |= bit
            continue
        if character == "?":
            anywhere |= bit
        else:
            places[character] = places.get(character, 0) | bit
        bit <<= 1
    return {character: found | anywhere for character, found in places.items()}, anywhere, stays, bit
