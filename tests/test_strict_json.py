"""A body has one reading, or is refused with a sentence; nothing in between."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backend.api.strict_json import MAX_DIGITS, MAX_LEVELS, StrictJSONError, loads
from tests.harness.requests import provision_body

UNREADABLE = "The body can't be read as JSON"


def refusal(body: bytes) -> str:
    with pytest.raises(StrictJSONError) as caught:
        loads(body)
    return str(caught.value)


def nested(levels: int) -> bytes:
    """Return lists and objects in turn."""
    opening = b"".join(b"[" if level % 2 else b'{"a":' for level in range(levels))
    closing = b"".join(b"]" if level % 2 else b"}" for level in reversed(range(levels)))
    return opening + b"1" + closing


def test_provision_body_is_read_as_the_json_module_reads_it() -> None:
    body = json.dumps(provision_body("node-1", metadata={"a": [1.5, -2, True, None, "\u2713"]})).encode()
    assert loads(body) == json.loads(body)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"3600.0", 3600),
        (b"36e2", 3600),
        (b"-0.0", 0),
        (b"9007199254740991.0", 2**53 - 1),
        (b"3600.5", 3600.5),
        (b"9007199254740992.0", 2.0**53),
        (b"1e300", 1e300),
    ],
)
def test_exact_whole_number_may_be_written_as_a_float(text: bytes, value: float) -> None:
    found = loads(b'{"a": %s}' % text)["a"]
    assert found == value
    assert type(found) is type(value)


REFUSED = [
    (b"", f"{UNREADABLE}: EOF while parsing a value at line 1 column 0"),
    (b"{", f"{UNREADABLE}: EOF while parsing an object at line 1 column 1"),
    (b"1 2", f"{UNREADABLE}: trailing characters at line 1 column 3"),
    (b"\xff", "The body is not UTF-8"),
    (b'"\xed\xa0\x80"', "The body is not UTF-8"),
    ("{}".encode("utf-16"), "The body is not UTF-8"),
    ("[]".encode("utf-32-le"), f"{UNREADABLE}: expected value at line 1 column 2"),
    (b"\xef\xbb\xbf{}", "The body begins with a byte order mark; send it without"),
    (b'{"a": NaN}', f"{UNREADABLE}: expected value at line 1 column 7"),
    (b"[Infinity]", f"{UNREADABLE}: expected value at line 1 column 2"),
    (b"-Infinity", f"{UNREADABLE}: invalid number at line 1 column 2"),
    (b"1e999", "A number is too large"),
    (b"[-1e999]", "A number is too large"),
    (b"1" * (MAX_DIGITS + 1), "A number has more than 20 digits"),
    (b"-" + b"1" * (MAX_DIGITS + 1), "A number has more than 20 digits"),
    (b"1" * 4000, "A number has more than 20 digits"),
    (b"1" * 5000, f"{UNREADABLE}: number out of range at line 1 column 4302"),
    (b"1" * 4000 + b".0", "A number is too large"),
    (b'{"a": 1, "b": 2, "a": 1}', "An object has the same key twice"),
    (b'[{"x": {"a": 1, "\\u0061": 1}}]', "An object has the same key twice"),
    (b'"\\ud800"', f"{UNREADABLE}: unexpected end of hex escape at line 1 column 8"),
    (b'{"a": ["\\udc00\\ud800"]}', f"{UNREADABLE}: lone leading surrogate in hex escape at line 1 column 14"),
    (b'{"\\ud83d": 1}', f"{UNREADABLE}: unexpected end of hex escape at line 1 column 9"),
    (nested(MAX_LEVELS + 1), "The body is nested more than 32 levels deep"),
    (nested(190), "The body is nested more than 32 levels deep"),
    (b"[" * 30_000 + b"]" * 30_000, f"{UNREADABLE}: recursion limit exceeded at line 1 column 202"),
    (b'{"a":' * 9_000 + b"1" + b"}" * 9_000, f"{UNREADABLE}: recursion limit exceeded at line 1 column 1006"),
]


@pytest.mark.parametrize(("body", "sentence"), REFUSED, ids=[repr(body[:20]) for body, _ in REFUSED])
def test_ambiguous_or_unbounded_json_is_refused(body: bytes, sentence: str) -> None:
    assert refusal(body) == sentence


@pytest.mark.parametrize(
    "body",
    [
        nested(MAX_LEVELS),
        b"[" + b",".join([nested(MAX_LEVELS - 1)] * 40) + b"]",
        b"[" + b"{}," * 1000 + b"1]",
        b"9" * MAX_DIGITS,
        b"-" + b"9" * MAX_DIGITS,
        b"1e308",
        b'"\\ud83d\\ude00"',
        b'"{{{{[[[[NaN Infinity"',
        b'[{"a": 1}, {"a": 1}]',
        b' \n"x"\t',
    ],
)
def test_json_at_the_limits_is_accepted(body: bytes) -> None:
    assert loads(body) == json.loads(body)


def test_a_refusal_repeats_nothing_of_the_body() -> None:
    for body in (b'{"secret": 1, "secret": 1}', b'{"a": secret}', b'"secret\\ud800"', b'{"a": "secret'):
        assert "secret" not in refusal(body)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=20,
)
fragments = st.lists(
    st.sampled_from(
        [*"{}[]:,", '"a"', '"b"', '"\\ud800"', '"\\u0061"', "1", "-0", "1e999", "NaN", "null", " ", "\ufeff"]
    ),
    max_size=30,
).map("".join)
bodies = st.one_of(
    values.map(json.dumps).map(str.encode),
    values.map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    fragments.map(str.encode),
    st.binary(max_size=50),
)


def json_reads_it_in_one_way(body: bytes) -> bool:
    """Say by the json module alone whether our rules allow the body."""

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    def integer(text: str) -> int:
        assert len(text.lstrip("-")) <= MAX_DIGITS
        return int(text)

    try:
        value = json.loads(body.decode(), object_pairs_hook=members, parse_int=integer)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (AssertionError, ValueError):
        return False
    return True


@given(bodies)
def test_a_body_is_read_as_json_reads_it_or_refused(body: bytes) -> None:
    try:
        value: Any = loads(body)
    except StrictJSONError:
        assert not json_reads_it_in_one_way(body)
        return
    assert json_reads_it_in_one_way(body)
    assert value == json.loads(body)
    # Whatever was read can be written and read again.
    assert loads(json.dumps(value, ensure_ascii=False, allow_nan=False).encode()) == value
