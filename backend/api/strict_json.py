"""JSON that can be read in one way only (I-JSON, RFC 7493); anything ambiguous or unbounded is refused."""

import json
import math
from codecs import BOM_UTF8
from typing import Any, Final

from pydantic_core import from_json

from backend.models.fields import is_deeper

# More than any field of ours allows; the parser itself would go on to 200.
MAX_LEVELS: Final = 32
# 2**64 has 20.
MAX_DIGITS: Final = 20
# RFC 7493, section 2.2.
MAX_EXACT: Final = 2**53 - 1


class StrictJSONError(ValueError):
    """The body can't be accepted as JSON. The message says why, and repeats nothing of the body."""


def loads(body: bytes) -> Any:
    """Return the one value that `body` holds; raise StrictJSONError, and nothing else.

    pydantic's parser refuses what isn't JSON, half a surrogate pair, and more than 200 levels. Of two equal
    keys it takes the last, and 1e999 is infinity to it: so the json module reads the value, with the hooks
    below.
    """
    try:
        text = body.decode()
        from_json(text, allow_inf_nan=False)
    except UnicodeDecodeError:
        raise StrictJSONError("The body is not UTF-8") from None
    except ValueError as exc:
        if body.startswith(BOM_UTF8):
            raise StrictJSONError("The body begins with a byte order mark; send it without") from None
        raise StrictJSONError(f"The body can't be read as JSON: {exc}") from None
    value, _ = _DECODER.raw_decode(text.strip())
    # So many levels need at least so many brackets.
    if body.count(b"{") + body.count(b"[") > MAX_LEVELS and is_deeper(value, MAX_LEVELS):
        raise StrictJSONError(f"The body is nested more than {MAX_LEVELS} levels deep")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise StrictJSONError("An object has the same key twice")
    return result


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS and len(text.lstrip("-")) > MAX_DIGITS:
        raise StrictJSONError(f"A number has more than {MAX_DIGITS} digits")
    return int(text)


def _float(text: str) -> float | int:
    """Read a number with a point or an exponent; 3600.0 is the integer 3600: JSON has one kind of number."""
    number = float(text)
    if math.isinf(number):
        raise StrictJSONError("A number is too large")
    # A float beyond MAX_EXACT stands for several integers.
    return int(number) if number.is_integer() and abs(number) <= MAX_EXACT else number


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_float)
