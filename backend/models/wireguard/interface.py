"""The name of a WireGuard interface: parsed once, before it is an argument to anything (wg-quick(8))."""

import re
from typing import Final, Self

# wg-quick(8): "INTERFACE [...] must be 15 characters or less and match [a-zA-Z0-9_=+.-]".  A leading dash
# would be an option to `ip` and `wg`, a leading dot a hidden file, or `..`.
_NAME: Final = re.compile(r"(?![-.])[A-Za-z0-9_=+.-]{1,15}")
# What `wg show` takes for a request of its own, and what net.ipv4.conf has for all interfaces together, so
# that the kernel gives these names to none.
_WORDS: Final = frozenset({"all", "default", "help", "interfaces"})


class InterfaceName(str):
    """A name that `ip`, `wg` and the kernel take for an interface's, and for nothing else.

    Only :meth:`parse` makes one.
    """

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Check the name; raise a ValueError that states the rule and doesn't repeat the text."""
        if _NAME.fullmatch(text) is None:
            raise ValueError(
                "an interface's name has 1 to 15 of the characters A-Z a-z 0-9 _ = + . - and starts with "
                "neither a dash nor a dot"
            )
        if text in _WORDS:
            raise ValueError(f"{', '.join(sorted(_WORDS))} are words of `wg` and the kernel, and no names")
        return cls(text)
