"""The text of a wg-quick(8) file: what is the operator's, what is ours, and what `wg` would make of it.

Works on bytes, because an operator's comments may be in any encoding. A line ends at a newline and nowhere
else: `wg` splits there alone, Python's own `splitlines` at a vertical tab or U+2028 as well.

Our peers stand in blocks of exactly this form, the newline in front of the comment included::

    (newline)
    # wireguard-provisioning: managed peer LABEL
    [Peer]
    PublicKey = KEY
    AllowedIPs = A.B.C.D/32
    PersistentKeepalive = N         (only if given)

Everything else is the operator's text. Blocks are rendered behind all of it: where two peers claim one
address `wg` gives it to the later one, which has to be ours.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network
from typing import Final, NamedTuple, Self

from backend.models.wireguard.keys import KEY_PATTERN, WireGuardKey, WireGuardPrivateKey
from backend.models.wireguard.peer import Peer, cidr, only_address
from backend.services.hub.config_sections import InterfaceSection, PeerSection, Section
from backend.services.hub.config_values import (
    UINT16_MAX,
    HubKeyError,
    InvalidConfigError,
    check_save_config,
    interface_addresses,
)

_WHITESPACE: Final = b" \t\r\v\f"
_INTERFACE: Final = b"[interface]"
_PEER: Final = b"[peer]"
_MARKER_START: Final = b"# wireguard-provisioning: managed peer "
# The carriage return is there for a file that an editor has converted; it's rendered without.
_MARKER: Final = re.compile(re.escape(_MARKER_START) + rb"([A-Za-z0-9_-]{1,128})\r?")
_LABEL: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
_KEY: Final = re.compile(KEY_PATTERN)
_BLOCK: Final = re.compile(
    rb"\n%s([A-Za-z0-9_-]{1,128})\n\[Peer\]\nPublicKey = (%s)\nAllowedIPs = ([0-9.]{7,15}/[0-9]{2})\n"
    rb"(?:PersistentKeepalive = (0|[1-9][0-9]{0,4})\n)?"
    % (re.escape(_MARKER_START), KEY_PATTERN[1:-1].encode())
)
# wg-quick(8), CONFIGURATION: these are its own, and `wg` would refuse them.
_QUICK_KEYS: Final = frozenset(
    {b"address", b"mtu", b"dns", b"table", b"preup", b"predown", b"postup", b"postdown", b"saveconfig"}
)


class PeerBlock(NamedTuple):
    """One of our blocks. `persistent_keepalive` is in seconds, 0 to 65535."""

    label: str
    public_key: WireGuardKey
    # As `wg` prints them: objects would take half a kilobyte for each peer.
    allowed_ips: tuple[str, ...]
    persistent_keepalive: int | None
    # Rendered once: the file of ten thousand peers is written each time one of them is added or removed.
    text: bytes

    @classmethod
    def of(cls, peer: Peer) -> Self:
        """Make the block of a peer. Without keepalive: a node behind NAT sends them itself."""
        return cls.make(peer.node_id, peer.wireguard_public_key, peer.allowed_ips)

    @classmethod
    def make(
        cls,
        label: str,
        public_key: WireGuardKey,
        allowed_ips: tuple[IPv4Network | IPv6Network, ...],
        persistent_keepalive: int | None = None,
    ) -> Self:
        """Check every value and render the block; raise ValueError."""
        # A newline that reaches the file is a hook that wg-quick runs as root, so nothing is taken on trust.
        if _LABEL.fullmatch(label) is None:
            raise ValueError("a managed peer's label is 1 to 128 letters, digits, underscores and hyphens")
        if _KEY.fullmatch(public_key) is None:
            raise ValueError("a managed peer's key is not the canonical base64 of 32 bytes")
        written = tuple(map(cidr, allowed_ips))
        text = (
            f"\n# wireguard-provisioning: managed peer {label}\n[Peer]\nPublicKey = {public_key}\n"
            f"AllowedIPs = {', '.join(written)}\n"
        )
        if persistent_keepalive is not None:
            if not 0 <= persistent_keepalive <= UINT16_MAX:
                raise ValueError(f"PersistentKeepalive is 0 to {UINT16_MAX} seconds")
            text += f"PersistentKeepalive = {persistent_keepalive:d}\n"
        return cls(label, public_key, written, persistent_keepalive, text.encode())


@dataclass(frozen=True, slots=True)
class OperatorPeer:
    """A peer that an operator wrote. `persistent_keepalive` is in seconds, 0 for off."""

    public_key: str
    allowed_ips: tuple[IPv4Network | IPv6Network, ...]
    preshared_key: str | None = field(default=None, repr=False)
    persistent_keepalive: int = 0


@dataclass(frozen=True, slots=True)
class ParsedConfig:
    """A file, taken apart."""

    operator_text: bytes = field(repr=False)
    # The operator's lines as `wg` reads them: without wg-quick's keys, comments and white space.
    operator_stripped: bytes = field(repr=False)
    private_key: WireGuardPrivateKey
    # The public half of it.
    hub_public_key: WireGuardKey
    operator_peers: tuple[OperatorPeer, ...]
    # Without damaged blocks.
    blocks: tuple[PeerBlock, ...]
    # None where the file names no port, so that `wg` takes any.
    listen_port: int | None = None
    # 0 for none.
    fwmark: int = 0
    # What wg-quick gives the interface.
    addresses: tuple[IPv4Interface | IPv6Interface, ...] = ()

    @property
    def stripped(self) -> bytes:
        """The text for `wg syncconf`, as `wg-quick strip` would print it."""
        return render(self.operator_stripped, self.blocks)


def parse(text: bytes) -> ParsedConfig:
    """Take a file apart and check the operator's text; raise InvalidConfigError.

    The operator's text between and behind our blocks is appended, in order, to the text before them. What
    stands in a block is ours to replace, so damage there is no error.
    """
    nul = text.find(b"\0")
    if nul >= 0:
        line = text.count(b"\n", 0, nul) + 1
        raise InvalidConfigError(f"line {line}: there is a NUL byte in it", "Take the byte out")
    head, behind = _take_off_blocks(text)
    gaps, blocks, lines = _split(head)
    reader = _OperatorTextReader()
    for number, raw, compact in lines:
        try:
            reader.read(number, raw, compact)
        except InvalidConfigError as exc:
            raise type(exc)(f"line {number}: {exc.problem}", exc.remedy) from None
    operator_peers, interface = reader.peers(), reader.interface
    if interface.private_key is None:
        # `wg syncconf` would answer 0, take the hub's key away and choose another port.
        raise HubKeyError("no [Interface] section has a PrivateKey")
    read = (_read_block(label, keys) for label, keys in blocks)
    return ParsedConfig(
        operator_text=_join(gaps),
        operator_stripped=b"".join(reader.stripped),
        private_key=interface.private_key,
        hub_public_key=interface.private_key.public_key(),
        operator_peers=operator_peers,
        blocks=(*(block for block in read if block is not None), *behind),
        listen_port=interface.listen_port,
        fwmark=interface.fwmark,
        addresses=tuple(reader.addresses),
    )


def render(operator_text: bytes, peers: Iterable[PeerBlock]) -> bytes:
    """Put our blocks behind the operator's text, raw or stripped."""
    return b"".join([operator_text, *(peer.text for peer in peers)])


def _take_off_blocks(text: bytes) -> tuple[bytes, list[PeerBlock]]:
    """Take the blocks off the end of a file that is just as `render` writes it, and return what is left.

    Nearly every file is, and a block takes a tenth of the time that way. If anything else stands between or
    behind our blocks, the whole text is returned.
    """
    peers: list[PeerBlock] = []
    start = position = text.find(b"\n" + _MARKER_START)
    while 0 <= position < len(text):
        block = _BLOCK.match(text, position)
        if block is None:
            return text, []
        label, key, allowed, keepalive = (group.decode() for group in block.groups(b""))
        seconds = int(keepalive) if keepalive else None
        try:
            public_key, network = WireGuardKey.parse_written(key), IPv4Network(allowed)
        except ValueError:
            return text, []
        if only_address((network,)) is None or (seconds or 0) > UINT16_MAX:
            return text, []
        peers.append(PeerBlock(label, public_key, (allowed,), seconds, block[0]))
        position = block.end()
    return (text[:start] if peers else text), peers


def _compact(line: bytes) -> bytes:
    """Return a line as `wg` sees it: without its comment and without any white space."""
    return line.partition(b"#")[0].translate(None, _WHITESPACE)


def _is_marker(line: bytes) -> bool:
    return line.startswith(_MARKER_START) and _MARKER.fullmatch(line) is not None


# A block's label and its key lines as `wg` sees them; and number, raw and compact form of a line.
_Block = tuple[str, list[bytes]]
_Line = tuple[int, bytes, bytes]


def _split(text: bytes) -> tuple[list[bytes], list[_Block], list[_Line]]:
    """Tell our blocks from the operator's text.

    A block starts at a marker line with a [Peer] line right below it, and takes every key that follows up
    to the next section: a key that an operator added there would otherwise change its section when the
    block moves. Comments and blank lines in it are the operator's.

    Returns the operator's text before, between and behind the blocks; the blocks; and those of the operator's
    lines that `wg` doesn't skip.
    """
    gaps: list[bytes] = []
    blocks: list[_Block] = []
    operator_lines: list[_Line] = []
    lines = text.split(b"\n")
    gap: list[bytes] = []
    block: list[bytes] | None = None
    below_marker = False
    for index, line in enumerate(lines):
        if below_marker:
            below_marker = False
            continue
        if _is_marker(line) and index + 1 < len(lines) and _compact(lines[index + 1]).lower() == _PEER:
            gaps.append(_before_block(b"".join(gap), line))
            gap, block, below_marker = [], [], True
            blocks.append((line[len(_MARKER_START) :].decode().rstrip("\r"), block))
            continue
        compact = _compact(line)
        if compact.startswith(b"["):
            block = None
        if compact and block is not None:
            block.append(compact)
            continue
        if compact:
            operator_lines.append((index + 1, line, compact))
            if gap and compact.lower() == _PEER and _is_marker(gap[-1].removesuffix(b"\n")):
                # They weren't neighbours: a key of ours stood between, or this would be a block.
                gap.append(b"\n")
        gap.append(line + b"\n" if index + 1 < len(lines) else line)
    return [*gaps, b"".join(gap)], blocks, operator_lines


def _before_block(gap: bytes, marker: bytes) -> bytes:
    """Take off the newline that belongs to the block behind."""
    return gap.removesuffix(b"\r\n" if marker.endswith(b"\r") and gap.endswith(b"\r\n") else b"\n")


def _join(gaps: Iterable[bytes]) -> bytes:
    """Put the operator's text together, without making one line or a block of ours out of two parts."""
    text = bytearray()
    for gap in filter(None, gaps):
        if text and not text.endswith(b"\n"):
            text += b"\n"
        if _is_marker(bytes(text[text.rfind(b"\n", 0, -1) + 1 : -1])) and (
            _compact(gap.partition(b"\n")[0]).lower() == _PEER
        ):
            text += b"\n"
        text += gap
    return bytes(text)


class _OperatorTextReader:
    """Reads the operator's lines as wg-quick and then `wg` would, and accepts what both accept.

    The two don't agree on everything: `wg` takes `[ Interface ]` for a section, wg-quick doesn't, and
    then hands on its own keys, which `wg` refuses. So both views of the section are kept.
    """

    def __init__(self) -> None:
        self.stripped: list[bytes] = []
        self.addresses: list[IPv4Interface | IPv6Interface] = []
        self.interface = InterfaceSection()
        self._peers: list[PeerSection] = []
        self._section: Section | None = None
        self._quick_interface = False

    def read(self, number: int, raw: bytes, compact: bytes) -> None:
        """Take the next line; raise InvalidConfigError."""
        key, _, value = raw.partition(b"#")[0].partition(b"=")
        key = key.strip(_WHITESPACE).lower()
        if compact.startswith(b"["):
            self._quick_interface = key == _INTERFACE
            self._section = self._open(number, compact.lower())
        elif self._quick_interface and key in _QUICK_KEYS:
            if key == b"saveconfig":
                check_save_config(value.strip(_WHITESPACE).lower())
            elif key == b"address":
                self.addresses += interface_addresses(value)
            return
        elif self._section is None:
            raise InvalidConfigError("a key outside of any section")
        else:
            self._section.take(compact)
        self.stripped.append(compact + b"\n")

    def peers(self) -> tuple[OperatorPeer, ...]:
        """Return what the [Peer] sections add up to; raise InvalidConfigError."""
        peers = []
        for peer in self._peers:
            if peer.public_key is None:
                raise InvalidConfigError(
                    f"line {peer.number}: the [Peer] section has no PublicKey",
                    "Give it one, or take the section out",
                )
            keepalive = peer.persistent_keepalive or 0
            peers.append(OperatorPeer(peer.public_key, peer.allowed_ips, peer.preshared_key, keepalive))
        return tuple(peers)

    def _open(self, number: int, header: bytes) -> Section:
        if header == _INTERFACE:
            return self.interface
        if header == _PEER:
            self._peers.append(PeerSection(number))
            return self._peers[-1]
        raise InvalidConfigError("a section other than [Interface] and [Peer]")


def _read_block(label: str, lines: Iterable[bytes]) -> PeerBlock | None:
    """Read one of our blocks; None if it isn't one that we could have written."""
    section = PeerSection()
    try:
        for line in lines:
            section.take(line)
        public_key = WireGuardKey.parse_written(section.public_key or "")
    except ValueError:
        return None
    if only_address(section.allowed_ips) is None:
        return None
    return PeerBlock.make(label, public_key, section.allowed_ips, section.persistent_keepalive)
