"""Bytes as text, where each has one spelling: what decodes but would be written otherwise is refused.

Every decoder raises ValueError for any text that its encoder doesn't write.
"""

import base64
from typing import Final

# https://datatracker.ietf.org/doc/html/draft-msporny-base58-03, and the multibase table for base36.
_BASE58: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_BASE36: Final = "0123456789abcdefghijklmnopqrstuvwxyz"


def encode_base64(data: bytes) -> str:
    """Write standard base64 with padding (RFC 4648, section 4)."""
    return base64.b64encode(data).decode()


def decode_base64(text: str) -> bytes:
    """Read standard base64 with padding."""
    data = base64.b64decode(text, validate=True)
    # Python ignores the bits behind the last byte.
    return _only_spelling(data, text, encode_base64(data))


def encode_base32(data: bytes) -> str:
    """Write base32 in lower case without padding (RFC 4648, section 6), as multibase's `b` has it."""
    return base64.b32encode(data).decode().rstrip("=").lower()


def decode_base32(text: str) -> bytes:
    """Read base32 in lower case without padding."""
    data = base64.b32decode(text.upper() + "=" * (-len(text) % 8))
    return _only_spelling(data, text, encode_base32(data))


def encode_base36(data: bytes) -> str:
    """Write base36 in lower case, as multibase's `k` has it."""
    return _to_digits(data, _BASE36)


def decode_base36(text: str) -> bytes:
    """Read base36 in lower case. The time grows with the square of the length: bound it before."""
    return _from_digits(text, _BASE36)


def encode_base58(data: bytes) -> str:
    """Write base58 with Bitcoin's alphabet, without a checksum."""
    return _to_digits(data, _BASE58)


def decode_base58(text: str) -> bytes:
    """Read base58. The time grows with the square of the length: bound it before."""
    return _from_digits(text, _BASE58)


def _only_spelling(data: bytes, text: str, spelling: str) -> bytes:
    if text != spelling:
        raise ValueError("not the canonical spelling")
    return data


def _to_digits(data: bytes, alphabet: str) -> str:
    number, digits = int.from_bytes(data, "big"), ""
    while number:
        number, digit = divmod(number, len(alphabet))
        digits = alphabet[digit] + digits
    # A number has no leading zeros: each zero byte in front is one digit of its own.
    return alphabet[0] * (len(data) - len(data.lstrip(b"\0"))) + digits


def _from_digits(text: str, alphabet: str) -> bytes:
    number = 0
    for character in text:
        number = number * len(alphabet) + alphabet.index(character)
    zeros = len(text) - len(text.lstrip(alphabet[0]))
    return bytes(zeros) + number.to_bytes((number.bit_length() + 7) // 8, "big")
