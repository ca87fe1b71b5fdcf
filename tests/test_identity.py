"""An identity is one key, however it is spelled, and no key that is nobody's."""

import base64
import hashlib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import example, given
from hypothesis import strategies as st

from backend.models.access import encodings
from backend.models.access.identity import NodeIdentity

# The Ed25519 test vector of libp2p's peer-ids specification, with its PeerID and CID.
SPEC_SEED: Final = "7e0830617c4a7de83925dfb2694556b12936c477a0e1feb2e148ec9da60fee7d"
SPEC_HEX: Final = "080112201ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e"
SPEC_PEER_ID: Final = "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"
SPEC_CID: Final = "bafzaajaiaejcahwr5d5ofrfbis4l5d6uwr57hu5tjodrypfm6yaq6dsc2r2pzyt6"

P: Final = 2**255 - 19
D: Final = -121665 * pow(121666, -1, P) % P
L: Final = 2**252 + 27742317777372353535851937790883648493
Point = tuple[int, int]


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def spellings(raw: bytes) -> dict[str, str]:
    """Spell a key in every accepted form."""
    protobuf = b"\x08\x01\x12\x20" + raw
    multihash = b"\x00\x24" + protobuf
    cid = b"\x01\x72" + multihash
    return {
        "raw": b64(raw),
        "hex": protobuf.hex(),
        "HEX": protobuf.hex().upper(),
        "base64": b64(protobuf),
        "peer_id": encodings.to_digits(multihash, encodings.BASE58),
        "base32": "b" + encodings.encode_base32(cid),
        "base36": "k" + encodings.to_digits(cid, encodings.BASE36),
    }


def parsed(text: str) -> NodeIdentity | None:
    try:
        return NodeIdentity.parse(text)
    except ValueError:
        return None


def refusal(text: str) -> str:
    with pytest.raises(ValueError) as refused:
        NodeIdentity.parse(text)
    return str(refused.value)


keys = st.binary(min_size=32, max_size=32).map(
    lambda seed: Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
)


@st.composite
def nearly_identities(draw: st.DrawFn) -> str:
    """Spell a key, and change what a caller may get wrong: a character, the length, the case, the padding."""
    text = draw(st.sampled_from(sorted(spellings(draw(keys)).values())))
    at = draw(st.integers(0, len(text) - 1))
    other = draw(st.one_of(st.characters(), st.sampled_from("0Il1=+/-_ \n\u0131\u0661\ud800")))
    mangled = [
        text[:at] + other + text[at + 1 :],
        text[:at] + other + text[at:],
        text[:at] + text[at + 1 :],
        text[:at],
        text + other,
        text.swapcase(),
        text.capitalize(),
        "1" + text,
        text + text,
        text.rstrip("="),
        text + "=",
    ]
    return draw(st.sampled_from(mangled))


@pytest.mark.parametrize(
    "text",
    [
        SPEC_HEX,
        SPEC_HEX.upper(),
        SPEC_PEER_ID,
        SPEC_CID,
        b64(bytes.fromhex(SPEC_HEX)),
        spellings(bytes.fromhex(SPEC_HEX[8:]))["raw"],
    ],
)
def test_the_specifications_key_is_read_in_every_form(text: str) -> None:
    identity = NodeIdentity.parse(text)
    owner = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(SPEC_SEED))
    assert identity.raw == owner.public_key().public_bytes_raw()
    assert identity.peer_id == SPEC_PEER_ID
    assert repr(identity) == f"NodeIdentity({SPEC_PEER_ID})"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        # As other implementations of libp2p and IPFS spell them.
        (
            "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA",
            "080112202ffa35a99d3a3cfbb17bb7c1dc5561b18a8dcca4df38dc613ea859c37eb1336b",
        ),
        (
            "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA",
            "bafzaajaiaejcal72gwuz2or47oyxxn6b3rkwdmmkrxgkjxzy3rqt5kczyn7lcm3l",
        ),
        (
            "12D3KooWD3bfmNbuuuVCYwkjnFt3ukm3qaB3hDED3peHHXawvRAi",
            "k51qzi5uqu5dhdmj65s7o239pk7w2knayz61k30js9t66wd6h82yw6iinitcuz",
        ),
        (
            "bafzaajaiaejca4syrpdu6gdx4wsdnokxkprgzxf4wrstuc34gxw5k5jrag2so5gk",
            "k51qzi5uqu5dj16qyiq0tajolkojyl9qdkr254920wxv7ghtuwcz593tp69z9m",
        ),
    ],
)
def test_two_spellings_in_the_wild_are_one_identity(one: str, other: str) -> None:
    assert NodeIdentity.parse(one) == NodeIdentity.parse(other)
    assert len({NodeIdentity.parse(one), NodeIdentity.parse(other)}) == 1


@given(keys)
def test_every_form_of_a_key_is_that_key(raw: bytes) -> None:
    forms = spellings(raw)
    assert {NodeIdentity.parse(text) for text in forms.values()} == {NodeIdentity(raw)}
    assert NodeIdentity(raw).peer_id == forms["peer_id"]
    # The lengths tell the forms apart, whatever the key.
    assert [len(text) for text in forms.values()] == [44, 72, 72, 48, 52, 65, 62]


@given(nearly_identities())
def test_only_an_accepted_spelling_is_ever_taken_for_a_key(text: str) -> None:
    identity = parsed(text)
    assert identity is None or text in spellings(identity.raw).values()


@given(st.text() | st.text("0123456789abcdefABCDEFkbQm=", max_size=300))
@example("")
@example("b")
@example("k")
@example("08")
@example("CA")
@example("=" * 44)
@example("1" * 256)
@example("z" * 100_000)
@example("\u0661" * 44)
def test_any_text_is_parsed_or_refused_with_the_documented_error(text: str) -> None:
    parsed(text)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("QmVMT29id3TUASyfZZ6k9hmNyc2nYabCo4uMSpDw4zrgDk", "the hash of an RSA or ECDSA key"),
        ("QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", "the hash of an RSA or ECDSA key"),
        ("16Uiu2HAmLhLvBoYaoZfaMUKuibM6ac163GwKY74c5kiSLg5KvLpY", "a secp256k1 key"),
        ("bafzaajiiaijcca3xo7uzjzcsyilaj6i54cj44qk7kqzpoao5rti2pjx6udtdbp6kte", "a secp256k1 key"),
        ("08021221037777e994e452c21604f91de093ce415f5432f701dd8cd1a7a6fea0e630bfca99", "a secp256k1 key"),
        (b64(b"\x08\x00\x12\xa6\x02" + bytes(100)), "an RSA key"),
        ("0803125b" + "30" * 91, "an ECDSA key"),
    ],
)
def test_refusal_names_the_kind_of_a_key_that_is_not_ed25519(text: str, kind: str) -> None:
    says = refusal(text)
    assert says.startswith(f"this is {kind}; send an Ed25519 key")
    assert text not in says


@pytest.mark.parametrize(
    "text",
    [
        "peer_libp2p_public_key",
        "swarm-node",
        # A key that is 31, 33 and 36 bytes long.
        b64(bytes(31)),
        b64(bytes(33)),
        "08011221" + "00" * 33,
        # Another multibase, another codec (raw), CID version 0 and 2, a varint of two bytes.
        "z" + encodings.to_digits(b"\x01\x72\x00\x24" + bytes.fromhex(SPEC_HEX), encodings.BASE58),
        SPEC_CID.upper(),
        "b" + encodings.encode_base32(b"\x01\x55\x00\x24" + bytes.fromhex(SPEC_HEX)),
        "b" + encodings.encode_base32(b"\x02\x72\x00\x24" + bytes.fromhex(SPEC_HEX)),
        "b" + encodings.encode_base32(b"\x01\xf2\x00\x00\x24" + bytes.fromhex(SPEC_HEX)),
        "k0" + encodings.to_digits(b"\x01\x72\x00\x24" + bytes.fromhex(SPEC_HEX), encodings.BASE36),
        # The length in the multihash, and bytes behind the key.
        encodings.to_digits(b"\x00\x25" + bytes.fromhex(SPEC_HEX), encodings.BASE58),
        encodings.to_digits(b"\x00\x25" + bytes.fromhex(SPEC_HEX) + b"\x00", encodings.BASE58),
        SPEC_HEX[:-1] + "E",
        SPEC_HEX + "00",
        " ".join((SPEC_HEX[:36], SPEC_HEX[36:])),
    ],
)
def test_refusal_of_an_identity_lists_the_accepted_forms_and_not_the_value(text: str) -> None:
    says = refusal(text)
    for form in ("12D3KooW", "CIDv1", "44 characters of base64", "08011220", "Ed25519"):
        assert form in says
    assert text not in says


def add(one: Point, other: Point) -> Point:
    """Add two points of edwards25519 (RFC 8032, section 5.1)."""
    (x1, y1), (x2, y2) = one, other
    t = D * x1 * x2 * y1 * y2
    return (
        (x1 * y2 + x2 * y1) * pow(1 + t, -1, P) % P,
        (y1 * y2 + x1 * x2) * pow(1 - t, -1, P) % P,
    )


def times(number: int, point: Point) -> Point:
    result = (0, 1)
    while number:
        if number & 1:
            result = add(result, point)
        point, number = add(point, point), number >> 1
    return result


def points(y: int) -> list[Point]:
    """Return the points with this y-coordinate."""
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    if x * x % P != square:
        x = x * pow(2, (P - 1) // 4, P) % P
    return [(x, y), (-x % P, y)] if x * x % P == square else []


def encode(point: Point) -> bytes:
    return (point[1] | (point[0] & 1) << 255).to_bytes(32, "little")


def torsion() -> set[Point]:
    """Find the points of order 1, 2, 4 and 8 as multiples of L, from scratch."""
    for y in range(2, 100):
        for point in points(y):
            generator = times(L, point)
            subgroup = {times(factor, generator) for factor in range(8)}
            if len(subgroup) == 8:
                return subgroup
    raise AssertionError


def test_point_of_low_order_is_refused() -> None:
    low = torsion()
    assert len(low) == 8
    for point in low:
        assert "low order" in refusal(b64(encode(point)))
        # With the sign of a zero x, too, which is a spelling that is not canonical.
        other_sign = (int.from_bytes(encode(point), "little") ^ 1 << 255).to_bytes(32, "little")
        assert "low order" in refusal(b64(other_sign))


@pytest.mark.parametrize("sign", [0, 1 << 255])
@pytest.mark.parametrize("y", [P, P + 1, P + 2, P + 18])
def test_key_with_an_unreduced_y_is_refused(y: int, sign: int) -> None:
    assert "not the 32 bytes of a point" in refusal(b64((y | sign).to_bytes(32, "little")))


def test_half_of_all_numbers_are_no_key() -> None:
    for y in range(2, 60):
        assert (parsed(b64(y.to_bytes(32, "little"))) is None) == (not points(y))


@given(st.binary(max_size=100), st.integers(0, 511))
def test_only_the_owners_signature_of_these_bytes_is_good(message: bytes, bit: int) -> None:
    owner = Ed25519PrivateKey.from_private_bytes(hashlib.sha256(message).digest())
    identity = NodeIdentity(owner.public_key().public_bytes_raw())
    signature = owner.sign(message)
    assert identity.verify(signature, message)
    assert not identity.verify(signature, message + b"\0")
    flipped = int.from_bytes(signature, "little") ^ 1 << bit
    assert not identity.verify(flipped.to_bytes(64, "little"), message)
    assert not NodeIdentity.parse(SPEC_PEER_ID).verify(signature, message)
    # A signature has one spelling, too: S plus the group's order is refused (RFC 8032, section 5.1.7).
    s = int.from_bytes(signature[32:], "little") + L
    assert not identity.verify(signature[:32] + s.to_bytes(32, "little"), message)
    for size in (0, 63, 65):
        assert not identity.verify(bytes(size), message)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        # https://datatracker.ietf.org/doc/html/draft-msporny-base58-03, section 5.
        (b"Hello World!", "2NEpo7TZRRrLZSi2U"),
        (
            b"The quick brown fox jumps over the lazy dog.",
            "USm3fpXnKG5EUBx2ndxBDMPVciP5hGey2Jh4NDv6gmeo1LkMeiKrLJUUBk6Z",
        ),
        (bytes.fromhex("0000287fb4cd"), "11233QC4"),
        (b"", ""),
    ],
)
def test_base58_has_the_spelling_of_its_draft(data: bytes, text: str) -> None:
    assert encodings.to_digits(data, encodings.BASE58) == text
    assert encodings.from_digits(text, encodings.BASE58) == data


@pytest.mark.parametrize(
    ("data", "base32", "base36"),
    [
        # https://github.com/multiformats/multibase, tests: basic, leading_zero, two_leading_zeros.
        (b"yes mani !", "pfsxgidnmfxgsibb", "2lcpzo5yikidynfl"),
        (b"\0yes mani !", "ab4wk4zanvqw42jaee", "02lcpzo5yikidynfl"),
        (b"\0\0yes mani !", "aaahszltebwwc3tjeaqq", "002lcpzo5yikidynfl"),
    ],
)
def test_base32_and_base36_have_the_spelling_of_multibase(data: bytes, base32: str, base36: str) -> None:
    assert encodings.encode_base32(data) == base32
    assert encodings.decode_base32(base32) == data
    assert encodings.to_digits(data, encodings.BASE36) == base36
    assert encodings.from_digits(base36, encodings.BASE36) == data


@pytest.mark.parametrize(
    ("encode", "decode"),
    [
        (encodings.encode_base32, encodings.decode_base32),
        (
            partial(encodings.to_digits, alphabet=encodings.BASE36),
            partial(encodings.from_digits, alphabet=encodings.BASE36),
        ),
        (
            partial(encodings.to_digits, alphabet=encodings.BASE58),
            partial(encodings.from_digits, alphabet=encodings.BASE58),
        ),
        (encodings.encode_base64, encodings.decode_base64),
    ],
    ids=["base32", "base36", "base58", "base64"],
)
def test_bytes_have_one_spelling_and_come_back_from_it(
    encode: Callable[[bytes], str], decode: Callable[[str], bytes]
) -> None:
    @given(st.binary(max_size=50), st.text(max_size=20) | st.text("0123abcdABCD=+/lIO", max_size=20))
    def check(data: bytes, text: str) -> None:
        assert decode(encode(data)) == data
        with suppress(ValueError):
            assert encode(decode(text)) == text

    check()
