"""What is accepted of a wg-quick file, held against `wg` and `wg-quick` themselves."""

import os
import subprocess
from collections.abc import Callable
from typing import Final

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import strategies as st

from backend.services.hub import config_text
from backend.services.hub.config_text import parse, render
from backend.services.hub.config_values import InvalidConfigError
from tests.harness.config_files import (
    KEYS,
    MINIMAL,
    OPERATORS,
    PRIVATE,
    ZERO,
    numbered,
    numbered_text,
)
from tests.harness.requirements import require
from tests.harness.torture import tried

_ACCEPTED: Final = "Unable to modify interface"
_REFUSED: Final = ("Configuration parsing error", "Invalid configuration")


@pytest.fixture(scope="module")
def wg_accepts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], bool]:
    """Ask the real `wg`: it parses the file before it looks for the interface, which isn't there."""
    require("wg")
    path = tmp_path_factory.mktemp("oracle") / "stripped.conf"

    def ask(text: bytes) -> bool:
        path.write_bytes(text)
        answer = subprocess.run(
            ["wg", "setconf", "nosuchif-x", path],
            env={**os.environ, "WG_ENDPOINT_RESOLUTION_RETRIES": "0", "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=30,
        ).stderr.decode(errors="replace")
        last = answer.splitlines()[-1]
        assert last.startswith((_ACCEPTED, *_REFUSED)), answer
        return last.startswith(_ACCEPTED)

    return ask


@pytest.fixture(scope="module")
def wg_quick_strip(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], bytes]:
    """Let the real wg-quick take its keys out."""
    require("wg")
    if os.geteuid() != 0:
        pytest.skip("wg-quick asks for root before it reads a file")
    path = tmp_path_factory.mktemp("quick") / "wgx.conf"
    path.touch(0o600)

    def ask(text: bytes) -> bytes:
        path.write_bytes(text)
        done = subprocess.run(["wg-quick", "strip", path], capture_output=True, check=True, timeout=30)
        return done.stdout

    return ask


def test_wg_takes_the_operators_file_and_our_blocks(wg_accepts: Callable[[bytes], bool]) -> None:
    assert wg_accepts(parse(render(OPERATORS, [numbered(0), numbered(1, None)])).stripped)


@pytest.mark.parametrize(
    "line",
    [
        "ListenPort = 0",
        "ListenPort = 0000000000000000065535",
        "FwMark = off",
        "FwMark = 4294967295",
        "FwMark = 0xffffffff",
        "f w m a r k = 0x 1",
        f"[Peer]\nPublicKey = {ZERO}",
        "[PEER]\nPublic Key = " + KEYS[0][:20] + " " + KEYS[0][20:],
        f"[Peer]\nPublicKey = {KEYS[0]}\nEndpoint = 192.0.2.1:51820",
        f"[Peer]\nPublicKey = {KEYS[0]}\nEndpoint = [2001:db8::1]:1",
        f"[Peer]\nPublicKey = {KEYS[0]}\nEndpoint = 2001:db8::1:65535",
        f"[Peer]\nPublicKey = {KEYS[0]}\nEndpoint = localhost:1",
        f"[Peer]\nPublicKey = {KEYS[0]}\nAllowedIPs = 0.0.0.0/0, ::/0, 10.1.2.3/8, ::ffff:1.2.3.4",
        f"[Peer]\nPublicKey = {KEYS[0]}\nPersistentKeepalive = OFF",
        f"[Peer]\nPublicKey = {KEYS[0]}\nPersistentKeepalive = 00065535",
        f"[Peer]\nPublicKey = {KEYS[0]}\nPublicKey = {KEYS[1]}",
    ],
)
def test_what_operators_may_write_is_taken_by_both(line: str, wg_accepts: Callable[[bytes], bool]) -> None:
    text = MINIMAL + line.encode() + b"\n"
    assert wg_accepts(text)
    assert wg_accepts(parse(text).stripped)


_ODD_BYTES: Final = st.sampled_from(
    [
        b" ",
        b"\t",
        b"\r",
        b"\x0b",
        b"\x0c",
        b"#",
        b"=",
        b",",
        b"/",
        b":",
        b"\xe9",
        b"\x1c",
        b"0",
        b"+",
        b"-",
        b"[",
    ]
)
_VALUES: Final = st.one_of(
    st.sampled_from([PRIVATE, ZERO, KEYS[0], KEYS[1], KEYS[0][:-2] + "B=", KEYS[0][:-1], KEYS[0] + "="]),
    st.sampled_from(
        ["0", "1", "65535", "65536", "007", "off", "Off", "0x", "0x10", "0X10", "0xg", "-1", "4294967296"]
    ),
    st.sampled_from(
        ["10.0.0.2", "10.0.0.2/32", "10.0.0.9/24,10.1.0.0/16", "1.2.3", "01.2.3.4", "1.2.3.4/033", "a.b.c.d"]
    ),
    st.sampled_from(
        [
            "::",
            "::1/128",
            "1::2::3",
            "fd00::1/129",
            "::1.2.3.4/96",
            "fe80::1%lo",
            "1:2:3:4:5:6:7:8:9",
            "::/0,",
        ]
    ),
    st.sampled_from(
        ["1.2.3.4:5", "[::1]:51820", "[::1]", "[1.2.3.4]:5", "::1:80", "1.2.3.4:", "1.2.3.4:65536", ":5", ""]
    ),
    st.sampled_from(["true", "false", "iptables -A x; echo [Peer]"]),
)
_NAMES: Final = st.one_of(
    st.sampled_from(
        ["PrivateKey", "ListenPort", "FwMark", "PublicKey", "PresharedKey", "AllowedIPs", "Endpoint"]
    ),
    st.sampled_from(
        [
            "PersistentKeepalive",
            "Address",
            "PostUp",
            "DNS",
            "SaveConfig",
            "postdown",
            "allowedips",
            "Nonsense",
        ]
    ),
)
_GOOD_LINES: Final = st.one_of(
    st.sampled_from(
        [b"", b"# comment", b"[Peer]\nPublicKey = " + KEYS[3].encode(), b"AllowedIPs = 10.0.0.7/32"]
    ),
    st.sampled_from(
        [b"[Interface]", b"[Interface]\nPostUp = id # x", b"ListenPort = 1", b"Endpoint = 192.0.2.1:1"]
    ),
    st.sampled_from([b"[Interface]\nPrivateKey = " + PRIVATE.encode(), b"[ interface ]", b" [PEER] # x"]),
    st.sampled_from(
        [
            b"# wireguard-provisioning: managed peer x",
            b"# wireguard-provisioning: managed peer y\r",
            b"[Peer]",
        ]
    ),
    st.sampled_from(
        [
            numbered_text(0),
            numbered_text(1)[1:],
            numbered_text(2).rstrip(b"\n"),
            numbered_text(3).replace(b"\n", b"\r\n"),
            b"\r",
            b"# \x85",
        ]
    ),
)


def _line(name: str, value: str, space: bytes) -> bytes:
    return name.encode() + space + b"=" + space + value.encode()


@st.composite
def _texts(draw: st.DrawFn) -> bytes:
    """Make files of which many are right, many nearly, and some have a byte somewhere it shouldn't be."""
    lines = draw(
        st.lists(
            st.one_of(
                _GOOD_LINES, _GOOD_LINES, st.builds(_line, _NAMES, _VALUES, st.sampled_from([b"", b" "]))
            ),
            max_size=10,
        )
    )
    start = draw(st.sampled_from([MINIMAL[:-1], MINIMAL[:-1], b"# nothing"]))
    text = draw(st.sampled_from([b"\n", b"\n", b"\r\n"])).join([start, *lines])
    text += draw(st.sampled_from([b"", b"\n", b"\n\n", b"\r\n"]))
    for position, odd in draw(st.lists(st.tuples(st.integers(0, len(text)), _ODD_BYTES), max_size=2)):
        text = text[:position] + odd + text[position:]
    return text


@tried(150, HealthCheck.filter_too_much)
@given(text=_texts())
def test_accepted_file_is_never_refused_by_wg(text: bytes, wg_accepts: Callable[[bytes], bool]) -> None:
    try:
        stripped = parse(text).stripped
    except InvalidConfigError:
        return
    assert wg_accepts(stripped)


@tried(100, HealthCheck.filter_too_much)
@given(name=_NAMES, value=_VALUES, odd=_ODD_BYTES, data=st.data())
def test_line_that_we_accept_is_never_refused_by_wg(
    name: str, value: str, odd: bytes, data: st.DataObject, wg_accepts: Callable[[bytes], bool]
) -> None:
    """A single line after a header of each kind reaches more of what can be wrong with a value."""
    line = _line(name, value, b"")
    position = data.draw(st.integers(0, len(line)))
    line = data.draw(st.sampled_from([line, line[:position] + odd + line[position:]]))
    for header in (b"", f"[Peer]\nPublicKey = {KEYS[0]}\n".encode()):
        try:
            stripped = parse(MINIMAL + header + line).stripped
        except InvalidConfigError:
            continue
        assert wg_accepts(stripped)


@tried(30, HealthCheck.filter_too_much)
@given(text=_texts().filter(lambda text: b"managed peer" not in text))
@example(text=OPERATORS)
@example(text=MINIMAL + b"[Interface]=x\nAddress = 10.0.0.1/24\n")
def test_accepted_file_is_never_refused_after_wg_quick(
    text: bytes, wg_accepts: Callable[[bytes], bool], wg_quick_strip: Callable[[bytes], bytes]
) -> None:
    try:
        parsed = parse(text)
    except InvalidConfigError:
        return
    assert wg_accepts(wg_quick_strip(render(text, [numbered(9)])))
    compact = wg_quick_strip(text).split(b"\n")
    lines = (line.partition(b"#")[0].translate(None, b" \t\r\v\f") for line in compact)
    assert b"".join(line + b"\n" for line in lines if line) == parsed.operator_stripped


@tried(150, HealthCheck.filter_too_much)
@given(text=_texts(), numbers=st.lists(st.integers(0, 39), unique=True, max_size=3))
def test_taking_apart_and_putting_together_changes_nothing_more(text: bytes, numbers: list[int]) -> None:
    try:
        once = parse(text)
    except InvalidConfigError:
        return
    for peers in (once.blocks, tuple(map(numbered, numbers))):
        again = parse(render(once.operator_text, peers))
        assert again.operator_text == once.operator_text
        assert again.operator_stripped == once.operator_stripped
        assert again.operator_peers == once.operator_peers
        assert again.blocks == peers
        assert again.private_key.reveal() == once.private_key.reveal()


@tried(100, HealthCheck.filter_too_much)
@given(
    text=_texts(),
    numbers=st.lists(st.integers(0, 39), max_size=3),
    tail=st.sampled_from([b"", b"", b"\n", b"# x\n"]),
    position=st.none() | st.integers(0, 600),
    odd=_ODD_BYTES,
)
def test_fast_and_line_by_line_parsers_find_the_same_blocks(  # noqa: PLR0913, PLR0917 - each is drawn
    monkeypatch: pytest.MonkeyPatch,
    text: bytes,
    numbers: list[int],
    tail: bytes,
    position: int | None,
    odd: bytes,
) -> None:
    text = render(text, map(numbered, numbers)) + tail
    if position is not None:
        text = text[:position] + odd + text[position:]

    def outcome() -> object:
        try:
            found = parse(text)
        except InvalidConfigError as exc:
            return str(exc)
        read = (found.operator_text, found.operator_stripped, found.operator_peers, found.blocks)
        return read, found.private_key.reveal()

    at_once = outcome()
    with monkeypatch.context() as patch:
        patch.setattr(config_text, "_take_off_blocks", lambda text: (text, []))
        assert at_once == outcome()


@tried(100, HealthCheck.filter_too_much)
@given(
    operator_text=_texts().filter(lambda text: b"managed peer" not in text),
    keepalive=st.one_of(st.none(), st.integers(0, 65_535)),
    label=st.from_regex(r"[A-Za-z0-9_-]{1,128}", fullmatch=True),
)
def test_what_an_operator_wrote_comes_back_byte_for_byte(
    operator_text: bytes, keepalive: int | None, label: str
) -> None:
    peer = numbered(0, keepalive, label)
    try:
        parse(operator_text)
    except InvalidConfigError:
        return
    parsed = parse(render(operator_text, [peer]))
    assert parsed.operator_text == operator_text
    assert parsed.blocks == (peer,)
