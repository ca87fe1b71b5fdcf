"""WireGuard keys: parsed once at the edge, typed from then on (wg(8), RFC 7748)."""

import base64
import re
from typing import Any, Final, Self

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

_KEY_BYTES: Final = 32
_KEY_CHARACTERS: Final = 44

# 43 characters carry 258 bits for 256: the last one may only be one whose two low bits are zero, or
# `wg` refuses the whole file. Python's own decoder takes all four spellings.
KEY_PATTERN: Final = r"^[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=$"
_CANONICAL: Final = re.compile(KEY_PATTERN[1:-1])

# The same of a public key: of the last bytes' bits, the highest isn't set in any that `wg pubkey` prints.
_PUBLIC_KEY_PATTERN: Final = r"^[A-Za-z0-9+/]{41}[A-HQ-Xg-nw-z0-3][AEIMQUYcgkosw048]=$"

_P: Final = 2**255 - 19
# The u-coordinates of order 1, 2, 4 and 8 on Curve25519 and on its twist: a key agreement with any of
# them gives a secret that everybody knows (RFC 7748, section 6.1).
_LOW_ORDER: Final = frozenset(
    {
        0,
        1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
        _P - 1,
    }
)


def _decode(text: str) -> bytes:
    """Return the 32 bytes of canonical base64, or raise a ValueError that doesn't repeat the text."""
    if len(text) != _KEY_CHARACTERS:
        raise ValueError(f"a WireGuard key is {_KEY_CHARACTERS} characters of base64, this is {len(text)}")
    if _CANONICAL.fullmatch(text) is None:
        raise ValueError("not the canonical base64 of 32 bytes; use what `wg pubkey` prints, unchanged")
    return base64.b64decode(text)


def _coordinate(raw: bytes) -> int:
    """Return the u-coordinate that the key agreement makes of 32 bytes (RFC 7748, section 5)."""
    return (int.from_bytes(raw, "little") & (2**255 - 1)) % _P


def canonical_spelling(text: str) -> str:
    """Return the one spelling that `wg pubkey` has for a key that is in a config or on an interface.

    The key agreement ignores bit 255 and counts modulo 2^255-19, so a key has at least one other spelling,
    which is another peer for `wg` and the interface.
    """
    return base64.b64encode(_coordinate(base64.b64decode(text)).to_bytes(_KEY_BYTES, "little")).decode()


class WireGuardKey(str):
    """A public key: 44 characters of base64 for 32 bytes.

    It is a ``str``, so it can be written, compared and bound to SQL as it is. To call the class takes a text
    that was parsed before, unchecked.
    """

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Take a key in the one spelling that `wg pubkey` has; raise a ValueError that says what is wrong."""
        raw = _decode(text)
        if _coordinate(raw) in _LOW_ORDER:
            raise ValueError("a point of low order is nobody's key; make one with `wg genkey | wg pubkey`")
        if int.from_bytes(raw, "little") >= _P:
            raise ValueError(
                "a second spelling of another key, not below 2^255-19 (RFC 7748, section 5); use what "
                "`wg pubkey` prints, unchanged"
            )
        return cls(text)

    @classmethod
    def parse_written(cls, text: str) -> Self:
        """Take a key that the hub's config has already, in whichever of its spellings; raise a ValueError.

        Earlier versions took all of them from nodes, and to refuse one now would take the node's tunnel down.
        """
        if _coordinate(_decode(text)) in _LOW_ORDER:
            raise ValueError("a point of low order is nobody's key")
        return cls(text)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(cls.parse, core_schema.str_schema(strict=True))

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {
            "type": "string",
            "pattern": _PUBLIC_KEY_PATTERN,
            "minLength": 44,
            "maxLength": 44,
            "description": "A WireGuard public key: canonical base64 of 32 bytes, as `wg pubkey` prints it.",
            "examples": ["vXs/2igcEtnCFS8dJ1SSp1Gi6AHrqL0h4uvGXghFwS8="],
        }


class WireGuardPrivateKey:
    """A private key. ``str`` and ``repr`` are masked; `reveal` alone shows it."""

    __slots__ = ("_key",)

    def __init__(self, raw: bytes) -> None:
        """Take 32 bytes; raise ValueError for any other number."""
        self._key = X25519PrivateKey.from_private_bytes(raw)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the base64 of a config's PrivateKey."""
        return cls(_decode(text))

    @classmethod
    def generate(cls) -> Self:
        """Make a new one, as `wg genkey` does."""
        return cls(X25519PrivateKey.generate().private_bytes_raw())

    def public_key(self) -> WireGuardKey:
        """Compute the public half, as `wg pubkey` does."""
        return WireGuardKey(base64.b64encode(self._key.public_key().public_bytes_raw()).decode())

    def reveal(self) -> str:
        """Return the base64 text, for the config file and nothing else."""
        return base64.b64encode(self._key.private_bytes_raw()).decode()

    def __repr__(self) -> str:
        return "WireGuardPrivateKey(***)"
