"""A WireGuard interface: its name, and its state as `wg show NAME dump` prints it (wg(8))."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, Self

# wg-quick(8): "INTERFACE [...] must be 15 characters or less and match [a-zA-Z0-9_=+.-]".  A leading dash
# would be an option to `ip` and `wg`, a leading dot a hidden file, or `..`.
_NAME: Final = re.compile(r"(?![-.])[A-Za-z0-9_=+.-]{1,15}")
# What `wg show` takes for a request of its own, and what net.ipv4.conf has for all interfaces together, so
# that the kernel gives these names to none.
_WORDS: Final = frozenset({"all", "default", "help", "interfaces"})

_NONE: Final = "(none)"
_OFF: Final = "off"


class InterfaceName(str):
    """A name that `ip`, `wg` and the kernel take for an interface's, and for nothing else.

    Only :meth:`parse` makes one, before the name is an argument to anything.
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


@dataclass(slots=True)
class InterfacePeer:
    """One peer. `allowed_ips` are in CIDR notation, `persistent_keepalive` is in seconds, 0 for off.

    Two are equal if their settings are. Endpoint and counters change by themselves: `latest_handshake` is in
    seconds since the epoch by the kernel's clock, 0 for a peer that has made none.
    """

    # Sorted.
    allowed_ips: tuple[str, ...]
    # A digest: the key itself is kept by `wg` and the file alone.
    preshared_key_digest: bytes | None = field(default=None, repr=False)
    persistent_keepalive: int = 0
    endpoint: str | None = field(default=None, compare=False, repr=False)
    latest_handshake: int = field(default=0, compare=False)
    received_bytes: int = field(default=0, compare=False)
    sent_bytes: int = field(default=0, compare=False)


@dataclass(slots=True)
class InterfaceState:
    """The interface itself. `public_key` is None while it has no private key, `fwmark` is 0 for off."""

    public_key: str | None
    listen_port: int
    fwmark: int = 0
    peers: dict[str, InterfacePeer] = field(default_factory=dict)

    @classmethod
    def parse(cls, dump: str) -> Self:
        """Read what `wg show NAME dump` prints; raise ValueError for anything else.

        The private key in its first field is passed over.
        """
        # One line at a time: a list of all of them takes as much memory again.
        lines = _lines(dump)
        first = next(lines, "")
        _, public_key, listen_port, fwmark = first.split("\t")
        peers = {}
        for line in lines:
            key, preshared_key, endpoint, allowed, handshake, received, sent, keepalive, *_ = line.split("\t")
            peers[key] = InterfacePeer(
                _allowed_ips(allowed),
                None if preshared_key == _NONE else preshared_key_digest(preshared_key),
                0 if keepalive == _OFF else int(keepalive),
                None if endpoint == _NONE else endpoint,
                int(handshake),
                int(received),
                int(sent),
            )
        return cls(
            None if public_key == _NONE else public_key,
            int(listen_port),
            0 if fwmark == _OFF else int(fwmark, 0),
            peers,
        )


def _lines(text: str) -> Iterator[str]:
    start = 0
    while (end := text.find("\n", start)) >= 0:
        yield text[start:end]
        start = end + 1
    if start < len(text):
        yield text[start:]


def _allowed_ips(text: str) -> tuple[str, ...]:
    if "," in text:
        return tuple(sorted(text.split(",")))
    return () if text == _NONE else (text,)


def preshared_key_digest(key: str) -> bytes:
    """Return the SHA-256 of a preshared key, which is enough to compare two."""
    return hashlib.sha256(key.encode()).digest()
