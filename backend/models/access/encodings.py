"""Bytes as text, where each has one spelling: what decodes but would be written otherwise is refused.

Every decoder raises ValueError for any text that its encoder doesn't write.
"""

import base64
from typing import Final

# Alphabets of `to_digits`: https://datatracker.ietf.org/doc/html/draft-msporny-base58-03 (Bitcoin's, without
# a checksum), and multibase's `k`.
BASE58: Final = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
BASE36: Final = "0123456789abcdefghijklmnopqrstuvwxyz"


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


def _only_spelling(data: bytes, text: str, spelling: str) -> bytes:
    if text != spelling:
        raise ValueError("not the canonical spelling")
    return data


def to_digits(data: bytes, alphabet: str) -> str:
    """Write the bytes as one number in the digits of the alphabet."""
    number, digits = int.from_bytes(data, "big"), ""
    while number:
        number, digit = divmod(number, len(alphabet))
        digits = alphabet[digit] + digits
    # A number has no leading zeros: each zero byte in front is one digit of its own.
    return alphabet[0] * (len(data) - len(data.lstrip(b"\0"))) + digits


def from_digits(text: str, alphabet: str) -> bytes:
    """Read what `to_digits` writes. The time grows with the square of the length: bound it before."""
    number = 0
    for character in text:
        number = number * len(alphabet) + alphabet.index(character)
    zeros = len(text) - len(text.lstrip(alphabet[0]))
    return bytes(zeros) + number.to_bytes((number.bit_length() + 7) // 8, "big")
