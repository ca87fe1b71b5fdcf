"""A node's identity: a libp2p Ed25519 key, whichever way it is spelled.

https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md and RFC 8032.
"""

from dataclasses import dataclass
from typing import Final, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from backend.models.access.encodings import (
    BASE36,
    BASE58,
    decode_base32,
    decode_base64,
    from_digits,
    to_digits,
)

_KEY_BYTES: Final = 32
_RAW_CHARACTERS: Final = 44
# The longest form has 72 characters; it is the time of decoding that this bounds.
_MAX_CHARACTERS: Final = 256

# Every number in these is below 0x80, so that a varint of it is the one byte that stands here.
# message PublicKey { Type = 1: Ed25519 (1); Data = 2: 32 bytes }
_PROTOBUF: Final = bytes.fromhex("08011220")
# The identity multihash (0x00) of 36 bytes: the key is in the PeerID itself.
_MULTIHASH: Final = bytes.fromhex("0024")
# CID version 1, multicodec libp2p-key.
_CID: Final = bytes.fromhex("0172")
_OTHER_KINDS: Final = {
    bytes.fromhex("0800"): "an RSA key",
    bytes.fromhex("0802"): "a secp256k1 key",
    bytes.fromhex("0803"): "an ECDSA key",
    # SHA-256, where the key is too long to stand in the PeerID.
    bytes.fromhex("1220"): "the hash of an RSA or ECDSA key",
}
_FORMS: Final = (
    "send an Ed25519 key of libp2p: its PeerID (12D3KooW..., or a CIDv1 that begins with b or k), "
    "44 characters of base64, or its protobuf form (08011220...) in hex or base64"
)

_P: Final = 2**255 - 19
_D: Final = -121665 * pow(121666, -1, _P) % _P
_Y_OF_ORDER_8: Final = 2707385501144840649318225287225658788936804267575313519463743609750303402022
# The y-coordinates of order 1, 2, 4 and 8: without a private key, signatures can be made that fit every
# eighth message, or more.
_LOW_ORDER: Final = frozenset({0, 1, _P - 1, _Y_OF_ORDER_8, _P - _Y_OF_ORDER_8})


@dataclass(frozen=True, slots=True, repr=False)
class NodeIdentity:
    """An Ed25519 public key.

    `raw` is its 32 bytes (RFC 8032, section 5.1.2): canonical, on the curve and not of low order. Two
    spellings of one key make equal identities.
    """

    raw: bytes

    def __post_init__(self) -> None:
        """Raise ValueError for bytes that can't be a public key."""
        y = int.from_bytes(self.raw, "little") & (2**255 - 1)
        # The sign of x needs no look: x is zero for y = 1 and y = -1 only.
        if len(self.raw) != _KEY_BYTES or y >= _P or not _is_on_the_curve(y):
            raise ValueError(f"not the 32 bytes of a point on Ed25519; {_FORMS}")
        if y in _LOW_ORDER:
            raise ValueError(f"a point of low order is nobody's key; {_FORMS}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Take any of the forms; raise a ValueError that names them and doesn't repeat the text.

        They are: the raw key in canonical base64 (44 characters); its protobuf form in hex (72 digits, all
        in lower case or all in upper case) or in canonical base64 (48 characters); a PeerID in base58btc
        (`12D3KooW...`), or as a CIDv1 with multicodec libp2p-key in multibase base32 (`b...`) or base36
        (`k...`), both in lower case.
        """
        try:
            protobuf = _protobuf(text)
        except ValueError:
            raise ValueError(f"not readable; {_FORMS}") from None
        if kind := _OTHER_KINDS.get(protobuf[:2]):
            raise ValueError(f"this is {kind}; {_FORMS}")
        if not protobuf.startswith(_PROTOBUF):
            raise ValueError(f"not readable; {_FORMS}")
        return cls(protobuf[len(_PROTOBUF) :])

    @property
    def peer_id(self) -> str:
        """The canonical text: `12D3KooW...`."""
        return to_digits(_MULTIHASH + _PROTOBUF + self.raw, BASE58)

    def verify(self, signature: bytes, message: bytes) -> bool:
        """Say whether the key's owner signed these very bytes."""
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, message)
        except InvalidSignature:
            return False
        return True

    def __repr__(self) -> str:
        return f"NodeIdentity({self.peer_id})"


def _is_on_the_curve(y: int) -> bool:
    # -x² + y² = 1 + d·x²·y², so x² = u/v, and u/v is a square where u·v is one (Euler's criterion).
    u, v = y * y - 1, _D * y * y + 1
    return pow(u * v, (_P - 1) // 2, _P) != _P - 1


def _protobuf(text: str) -> bytes:
    """Return the protobuf form, or a multihash that has none in it; raise ValueError for anything else."""
    if len(text) > _MAX_CHARACTERS:
        raise ValueError("too long")
    if len(text) == _RAW_CHARACTERS:
        return _PROTOBUF + decode_base64(text)
    if text.startswith("08"):
        return _decode_hex(text)
    # What base64 makes of the byte 08 and a type below 64.
    if text.startswith("CA"):
        return decode_base64(text)
    return _unhash(_multihash(text))


def _decode_hex(text: str) -> bytes:
    data = bytes.fromhex(text)
    if text not in (data.hex(), data.hex().upper()):
        raise ValueError("not canonical hex")
    return data


def _multihash(text: str) -> bytes:
    if not text.startswith(("b", "k")):
        return from_digits(text, BASE58)
    data = decode_base32(text[1:]) if text.startswith("b") else from_digits(text[1:], BASE36)
    if not data.startswith(_CID):
        raise ValueError("no CID of a libp2p key")
    return data[len(_CID) :]


def _unhash(multihash: bytes) -> bytes:
    code, length = multihash[:1], multihash[1:2]
    if length != bytes([len(multihash[2:])]):
        raise ValueError("the length is wrong")
    return multihash[2:] if code == b"\0" else multihash
