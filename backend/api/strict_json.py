"""JSON that can be read in one way only (I-JSON, RFC 7493); what is ambiguous or without end is refused."""

import json
import math
from codecs import BOM_UTF8
from collections.abc import Iterable
from typing import Any, Final, NoReturn

from fastapi import HTTPException, Request

# More than any field of ours allows; the parser itself would go on to a thousand.
MAX_LEVELS: Final = 32
# 2**64 has 20.
MAX_DIGITS: Final = 20
# RFC 7493, section 2.2.
MAX_EXACT: Final = 2**53 - 1


class StrictJSONError(ValueError):
    """The body can't be accepted as JSON. The message says why, and repeats nothing of the body."""


def loads(body: bytes) -> Any:
    """Return the one value that `body` holds; raise StrictJSONError, and nothing else."""
    try:
        value = _DECODER.decode(body.decode())
    except UnicodeDecodeError:
        raise StrictJSONError("The body is not UTF-8") from None
    except json.JSONDecodeError as exc:
        if body.startswith(BOM_UTF8):
            raise StrictJSONError("The body begins with a byte order mark; send it without") from None
        raise StrictJSONError(f"The body is not JSON: {exc.msg}, at character {exc.pos}") from None
    except RecursionError:
        raise _too_deep() from None
    # The least that so many levels need.
    if body.count(b"{") + body.count(b"[") > MAX_LEVELS and _is_deeper(value, MAX_LEVELS):
        raise _too_deep()
    if b"\\u" in body:  # the only way for one to come through UTF-8
        _refuse_lone_surrogates(value)
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
    """Read a number with a point or an exponent; a whole one is what it is without: JSON has one kind."""
    number = float(text)
    if math.isinf(number):
        raise StrictJSONError("A number is too large")
    # Beyond that a float stands for several whole numbers.
    return int(number) if number.is_integer() and abs(number) <= MAX_EXACT else number


def _constant(name: str) -> NoReturn:
    raise StrictJSONError(f"{name} is no number in JSON")


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant
)


def _too_deep() -> StrictJSONError:
    return StrictJSONError(f"The body is nested more than {MAX_LEVELS} levels deep")


def _is_deeper(value: object, levels: int) -> bool:
    """Go down level by level, without recursion."""
    containers = [value] if isinstance(value, dict | list) else []
    for _ in range(levels):
        containers = [
            child
            for container in containers
            for child in _children(container)
            if isinstance(child, dict | list)
        ]
    return bool(containers)


def _children(container: dict[str, object] | list[object]) -> Iterable[object]:
    return container.values() if isinstance(container, dict) else container


def _refuse_lone_surrogates(value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise StrictJSONError("A text holds half of a surrogate pair, which is no character") from None


class StrictRequest(Request):
    """A request whose JSON is read strictly."""

    async def json(self) -> Any:
        """Return the body's value; raise a 422 in the form of FastAPI's own."""
        if not hasattr(self, "_json"):
            try:
                self._json = loads(await self.body())
            except StrictJSONError as error:
                detail = [{"type": "json_invalid", "loc": ["body"], "msg": str(error)}]
                # FastAPI lets one of these through as it is, and makes a 400 of everything else.
                raise HTTPException(422, detail) from None
        return self._json
