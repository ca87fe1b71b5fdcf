"""A key has one canonical spelling. We accept what `wg` accepts, except points of low order."""

import base64
import os
import re
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from backend.models.wireguard.keys import WireGuardKey, WireGuardPrivateKey, canonical_spelling
from tests.harness.requests import new_key
from tests.harness.requirements import require
from tests.harness.torture import tried
from tests.harness.wireguard import genkey

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
P = 2**255 - 19


def accepted(text: str) -> bool:
    try:
        return WireGuardKey.parse(text) == text
    except ValueError:
        return False


def spell(u: int) -> str:
    return base64.b64encode(u.to_bytes(32, "little")).decode()


def wg_accepts(key: str, directory: Path) -> bool:
    """Ask `wg`, which parses a file before it finds that there is no such interface."""
    path = directory / "key.conf"
    path.write_text(f"[Peer]\nPublicKey = {key}\n", newline="", encoding="utf-8")
    done = subprocess.run(
        ["wg", "setconf", "nosuchif", path],
        capture_output=True,
        check=False,
        env={"PATH": os.environ["PATH"], "WG_ENDPOINT_RESOLUTION_RETRIES": "0"},
    )
    return done.stderr.startswith(b"Unable to modify interface")


keys = st.binary(min_size=32, max_size=32).map(lambda raw: base64.b64encode(raw).decode())


@st.composite
def nearly_keys(draw: st.DrawFn) -> str:
    """Make a key, and change what a client may get wrong: a character, the length, the padding."""
    text = draw(keys)
    position = draw(st.integers(0, 43))
    other = draw(st.sampled_from(ALPHABET + "=-_.é\u0661"))
    return draw(
        st.sampled_from(
            [
                text,
                text[:position] + other + text[position + 1 :],
                text[:42] + other + "=",
                text[:-1],
                text + "=",
                text[:position] + text[position + 1 :],
                text[:position] + other + text[position:],
                text.replace("+", "-").replace("/", "_"),
            ]
        )
    )


@tried(100)
@given(text=nearly_keys())
def test_our_verdict_on_a_key_is_that_of_wg(tmp_path: Path, text: str) -> None:
    require("wg")
    verdict = "fine"
    try:
        WireGuardKey.parse(text)
    except ValueError as exc:
        verdict = str(exc)
    # What we know better: a key that is nobody's, and one that is another's, too.
    known = verdict == "fine" or "low order" in verdict or "second spelling" in verdict
    assert known == wg_accepts(text, tmp_path)


@given(st.text())
def test_any_text_is_parsed_or_refused_with_the_documented_error(text: str) -> None:
    accepted(text)


@pytest.mark.parametrize("top_bit", [0, 2**255])
@pytest.mark.parametrize(
    "u",
    [
        0,
        1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
        P - 1,
        P,
        P + 1,
    ],
)
def test_point_of_low_order_is_refused(u: int, top_bit: int) -> None:
    # The key agreement ignores the top bit, so that bit makes no other key of it.
    with pytest.raises(ValueError, match="low order"):
        WireGuardKey.parse(spell(u + top_bit))


def second_spellings(key: str) -> list[str]:
    """Return the other texts that a key agreement, OpenSSL's, takes for this key."""
    private = X25519PrivateKey.generate()

    def agree(text: str) -> bytes:
        return private.exchange(X25519PublicKey.from_public_bytes(base64.b64decode(text)))

    u = int.from_bytes(base64.b64decode(key), "little")
    found = [spell(other) for other in (u + 2**255, u + P, u + P + 2**255) if other < 2**256]
    return [text for text in found if agree(text) == agree(key)]


@pytest.mark.parametrize("u", [pytest.param(9, id="base-point"), pytest.param(None, id="any")])
def test_a_second_spelling_gives_the_holder_of_one_private_key_no_second_address(u: int | None) -> None:
    key = new_key() if u is None else spell(u)
    others = second_spellings(key)
    assert len(others) == (1 if u is None else 3)
    for text in others:
        with pytest.raises(ValueError, match="second spelling") as refused:
            WireGuardKey.parse(text)
        assert text not in str(refused.value)
        assert canonical_spelling(text) == key
        # What was let in before goes on.
        assert WireGuardKey.parse_written(text) == text
    assert accepted(key)
    assert canonical_spelling(key) == key


@given(keys)
def test_the_published_pattern_refuses_no_key_that_is_taken(text: str) -> None:
    pattern = TypeAdapter(WireGuardKey).json_schema()["pattern"]
    top_bit = base64.b64decode(text)[31] & 0x80
    assert (re.search(pattern, text) is None) == bool(top_bit)
    assert not (top_bit and accepted(text))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("jKlMnOpQrStUvWxYzAbCdEfGhIjKlMnO=", "44 characters of base64, this is 33"),
        ("vXs/2igcEtnCFS8dJ1SSp1Gi6AHrqL0h4uvGXghFwS8=\n", "this is 45"),
        ("vXs/2igcEtnCFS8dJ1SSp1Gi6AHrqL0h4uvGXghFwS9=", "canonical"),
    ],
)
def test_refusal_of_a_key_names_the_mistake_but_not_the_key(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        WireGuardKey.parse(text)
    assert text.strip() not in str(refused.value)


def test_the_four_spellings_that_python_decodes_are_one_key_for_wg() -> None:
    key = WireGuardPrivateKey.generate().public_key()
    first = ALPHABET.index(key[42]) & ~0b11
    spellings = [f"{key[:42]}{ALPHABET[first + low]}=" for low in range(4)]
    assert len({base64.b64decode(text) for text in spellings}) == 1
    assert [accepted(text) for text in spellings] == [True, False, False, False]


def test_a_public_key_is_computed_as_wg_pubkey_does() -> None:
    require("wg")
    private, public = genkey()
    assert WireGuardPrivateKey.parse(private).public_key() == public
    assert WireGuardPrivateKey.parse(private).reveal() == private


def test_private_key_is_not_in_its_representations() -> None:
    key = WireGuardPrivateKey.generate()
    for text in (str(key), repr(key), f"{key}", f"{[key]}"):
        assert key.reveal() not in text
    with pytest.raises(ValueError, match="32 bytes"):
        WireGuardPrivateKey(b"short")
