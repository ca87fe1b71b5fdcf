"""What a WireGuard interface has, as `wg show NAME dump` prints it (wg(8)), without timers and counters."""

from dataclasses import dataclass, field
from typing import Final, Self

_NONE: Final = "(none)"
_OFF: Final = "off"
_PRESHARED_KEY: Final = 1
_ALLOWED_IPS: Final = 3
_KEEPALIVE: Final = 7


@dataclass(slots=True)
class InterfacePeer:
    """One peer. `allowed_ips` are in CIDR notation, `persistent_keepalive` is in seconds, 0 for off."""

    allowed_ips: frozenset[str]
    preshared_key: str | None = field(default=None, repr=False)
    persistent_keepalive: int = 0


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
        first, *lines = dump.rstrip("\n").split("\n")
        _, public_key, listen_port, fwmark = first.split("\t")
        peers = {}
        for line in lines:
            fields = line.split("\t")
            preshared_key, allowed, keepalive = (
                fields[_PRESHARED_KEY],
                fields[_ALLOWED_IPS],
                fields[_KEEPALIVE],
            )
            peers[fields[0]] = InterfacePeer(
                frozenset(() if allowed == _NONE else allowed.split(",")),
                None if preshared_key == _NONE else preshared_key,
                0 if keepalive == _OFF else int(keepalive),
            )
        return cls(
            None if public_key == _NONE else public_key,
            int(listen_port),
            0 if fwmark == _OFF else int(fwmark, 0),
            peers,
        )
