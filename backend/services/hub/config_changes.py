"""The file with one peer more or less, for Python programs that call the config manager themselves.

A peer with one IPv4 address and no endpoint stands in a block of ours (`config_text.py`), as the service
writes it from its records. A peer with networks or an endpoint of its own stands in front of the blocks, in a
section that the service keeps like an operator's, so that no node gets one of its addresses::

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
from typing import Final, Self

from backend.models.wireguard.keys import KEY_PATTERN, WireGuardKey, canonical_spelling
from backend.models.wireguard.peer import cidr, only_address
from backend.services.hub.config_text import ParsedConfig, PeerBlock, parse
from backend.services.hub.config_values import InvalidConfigError, allowed_ip, check_endpoint

_SECTION: Final = (
    rb"\n# wireguard-provisioning: added peer [A-Za-z0-9_-]{1,128}\n\[Peer\]\nPublicKey = %s\n"
    rb"AllowedIPs = [0-9A-Fa-f:./, ]+\n(?:Endpoint = [^\n]+\n)?(?:PersistentKeepalive = [0-9]+\n)?"
)

# Of a block's lines.
_BELOW_ALLOWED_IPS: Final = 5

# The operator's text and the blocks of ours that a file is to hold.
Content = tuple[bytes, tuple[PeerBlock, ...]]


@dataclass(frozen=True, slots=True)
class NewPeer:
    """A peer that is to be written: as a block of ours, or else in a section of its own."""

    block: PeerBlock
    # None where the block will do.
    section: bytes | None

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
        networks = tuple(dict.fromkeys(allowed_ip(text.encode()) for text in allowed_ips))
        block = PeerBlock.make(label, WireGuardKey.parse(public_key), networks, persistent_keepalive)
        if endpoint is None and only_address(networks) is not None:
            return cls(block, None)
        lines = block.text.replace(b" managed ", b" added ", 1).split(b"\n")
        if endpoint is not None:
            check_endpoint(endpoint.encode())
            lines.insert(_BELOW_ALLOWED_IPS, f"Endpoint = {endpoint}".encode())
        return cls(block, b"\n".join(lines))


def with_peer(config: ParsedConfig, peer: NewPeer) -> Content:
    """Return the file's content with this peer, in place of one with the same key that was added before.

    ValueError where `wg` would silently leave the peer out, or take a key or a network from another one.
    """
    key = peer.block.public_key
    if key == config.hub_public_key:
        raise ValueError("that is the hub's own key: `wg` would leave the peer out without a word")
    operator_text, blocks = without_peer(config, key) or (config.operator_text, config.blocks)
    others = (config if operator_text == config.operator_text else parse(operator_text)).operator_peers
    if any(canonical_spelling(other.public_key) == key for other in others):
        raise ValueError("an operator's peer has that key")
    held = {network for block in blocks for network in block.allowed_ips}
    held.update(cidr(network) for other in others for network in other.allowed_ips)
    for network in peer.block.allowed_ips:
        if network in held:
            raise ValueError(f"{network} belongs to another peer")
    if peer.section is None:
        return operator_text, (*blocks, peer.block)
    return operator_text + peer.section, blocks


def without_peer(config: ParsedConfig, public_key: str) -> Content | None:
    """Return the file's content without a peer that was added or is ours; None if there is none."""
    left = tuple(block for block in config.blocks if block.public_key != public_key)
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
