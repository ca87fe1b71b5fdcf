"""The file with one peer more or less, for those who call the config manager by hand.

A peer with one IPv4 address and no endpoint stands in a block of ours (`wireguard_config_text`), and the
service writes such blocks from its records. A peer with networks or an endpoint of its own stands in front
of them, in a section that the service keeps like an operator's and hands out no address of::

    (newline)
    # wireguard-provisioning: added peer LABEL
    [Peer]
    PublicKey = KEY
    AllowedIPs = NETWORK, NETWORK
    Endpoint = HOST:PORT            (only if given)
    PersistentKeepalive = N         (only if given)
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Final, Self

from backend.models.wireguard.keys import KEY_PATTERN, WireGuardKey, canonical_spelling
from backend.models.wireguard.peer import cidr, only_address
from backend.services.hub.config_text import ParsedConfig, PeerBlock, parse
from backend.services.hub.config_values import InvalidConfigError, allowed_ip, check_endpoint

_SECTION: Final = (
    rb"\n# wireguard-provisioning: added peer [A-Za-z0-9_-]{1,128}\n\[Peer\]\nPublicKey = %s\n"
    rb"AllowedIPs = [0-9A-Fa-f:./, ]+\n(?:Endpoint = [^\n]+\n)?(?:PersistentKeepalive = [0-9]+\n)?"
)

# The operator's text and the blocks of ours that a file is to hold.
Content = tuple[bytes, tuple[PeerBlock, ...]]


@dataclass(frozen=True, slots=True)
class NewPeer:
    """A peer that is to be written. `persistent_keepalive` is in seconds, 0 to 65535."""

    label: str
    public_key: WireGuardKey
    allowed_ips: tuple[IPv4Network | IPv6Network, ...]
    endpoint: str | None
    persistent_keepalive: int | None

    @classmethod
    def parse(
        cls,
        label: str,
        public_key: str,
        allowed_ips: Sequence[str],
        endpoint: str | None,
        persistent_keepalive: int | None,
    ) -> Self:
        """Check each value; raise a ValueError that says which one `wg` wouldn't take."""
        if isinstance(allowed_ips, str) or not allowed_ips:
            raise ValueError("allowed_ips is a list of one or more addresses in CIDR notation")
        networks = dict.fromkeys(allowed_ip(text.encode()) for text in allowed_ips)
        if endpoint is not None:
            check_endpoint(endpoint.encode())
        key = WireGuardKey.parse(public_key)
        # A block of ours checks label and keepalive.
        PeerBlock.make(label, key, (), persistent_keepalive)
        return cls(label, key, tuple(networks), endpoint, persistent_keepalive)

    @property
    def block(self) -> PeerBlock | None:
        """The same as a block of ours, if it can be one."""
        if self.endpoint is not None or only_address(self.allowed_ips) is None:
            return None
        return PeerBlock.make(self.label, self.public_key, self.allowed_ips, self.persistent_keepalive)

    @property
    def section(self) -> bytes:
        """The text of a peer that can't be a block of ours."""
        lines = [
            "",
            f"# wireguard-provisioning: added peer {self.label}",
            "[Peer]",
            f"PublicKey = {self.public_key}",
            f"AllowedIPs = {', '.join(map(str, self.allowed_ips))}",
        ]
        if self.endpoint is not None:
            lines.append(f"Endpoint = {self.endpoint}")
        if self.persistent_keepalive is not None:
            lines.append(f"PersistentKeepalive = {self.persistent_keepalive:d}")
        return "\n".join([*lines, ""]).encode()


def with_peer(config: ParsedConfig, peer: NewPeer) -> Content:
    """Return what the file holds with this peer instead of one with the same key that was added before.

    ValueError where `wg` would leave the peer out, or take a key or a network away from another one, all
    without a word.
    """
    if peer.public_key == config.hub_public_key:
        raise ValueError("that is the hub's own key: `wg` would leave the peer out without a word")
    operator_text, managed = without_peer(config, peer.public_key) or (config.operator_text, config.blocks)
    others = (config if operator_text == config.operator_text else parse(operator_text)).operator_peers
    if any(canonical_spelling(other.public_key) == peer.public_key for other in others):
        raise ValueError("an operator's peer has that key")
    held = {network for block in managed for network in block.allowed_ips}
    held.update(cidr(network) for other in others for network in other.allowed_ips)
    for network in map(cidr, peer.allowed_ips):
        if network in held:
            raise ValueError(f"{network} belongs to another peer")
    block = peer.block
    if block is not None:
        return operator_text, (*managed, block)
    return operator_text + peer.section, managed


def without_peer(config: ParsedConfig, public_key: str) -> Content | None:
    """Return what the file holds without a peer that was added or is ours; None if there is none."""
    left = tuple(peer for peer in config.blocks if peer.public_key != public_key)
    operator_text = _without_section(config, public_key)
    if operator_text is None and len(left) == len(config.blocks):
        return None
    return config.operator_text if operator_text is None else operator_text, left


def _without_section(config: ParsedConfig, public_key: str) -> bytes | None:
    if re.fullmatch(KEY_PATTERN[1:-1], public_key) is None:
        return None
    found = re.search(_SECTION % re.escape(public_key.encode()), config.operator_text)
    if found is None:
        return None
    head, tail = config.operator_text[: found.start()], config.operator_text[found.end() :]
    if head and tail and not head.endswith(b"\n") and not tail.startswith(b"\n"):
        head += b"\n"
    left = tuple(peer for peer in config.operator_peers if peer.public_key != public_key)
    try:
        # A key that an operator has written below would fall to another section.
        whole = parse(head + tail).operator_peers == left
    except InvalidConfigError:
        whole = False
    if not whole:
        raise ValueError("an operator has changed this peer's section; take it out of the file by hand")
    return head + tail
