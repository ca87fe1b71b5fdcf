"""The hub's wg-quick file: what is the operator's stays, what is ours is replaced as a whole."""

import errno
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from pathlib import Path
from typing import Any, Final, NoReturn

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import strategies as st

from backend.errors import ConfigFileError, HubUpdateError
from backend.models.wireguard.keys import WireGuardKey, WireGuardPrivateKey
from backend.services import wireguard_config_manager
from backend.services.hub import config_text
from backend.services.hub.config_text import OperatorPeer, PeerBlock, parse, render
from backend.services.hub.config_values import InvalidConfigError
from backend.services.wireguard_config_manager import WireGuardConfigManager
from tests.harness.peers import block, networks
from tests.harness.requests import other_spelling
from tests.harness.requirements import require
from tests.harness.torture import tried

_PRIVATE: Final = "iB4Y8yRkAyI8mdFBYCpOUXLTn1kAbGbyGmtXGvRZ/F4="
_HUB: Final = WireGuardPrivateKey.parse(_PRIVATE).public_key()
_KEYS: Final = tuple(WireGuardPrivateKey(bytes([number + 1] * 32)).public_key() for number in range(40))
_ZERO: Final = "A" * 43 + "="
_MINIMAL: Final = f"[Interface]\nPrivateKey = {_PRIVATE}\n".encode()
# What an operator's file may look like: hooks, comments, odd spacing, CRLF, Latin-1, peers of their own.
_OPERATORS: Final = (
    b"# H\xf4tel de ville, r\xe9seau\r\n"
    b"  [interface]   # the hub\r\n"
    b"Address = 10.0.0.1/24, fd00::1/64\n"
    b"\tlistenport=51820\n"
    b"PrivateKey\t=" + _PRIVATE.encode() + b" # don't show\n"
    b"PostUp = iptables -A FORWARD -i %i -j ACCEPT; echo 'a\\b' # why\n"
    b"SaveConfig = FALSE\n\n\n"
    b"[Peer]\n# Zo\xeb's laptop \x0b \x0c \x1c \x85 \xe2\x80\xa8 all in one line\n"
    b"PublicKey = " + _KEYS[30].encode() + b"\r\n"
    b"AllowedIPs = 10.0.0.200/32 , 192.168.7.9/24\nAllowedIPs = fd00::200\n"
    b"Endpoint = [2001:db8::1]:51820\n\n"
    b"[PEER]\nPUBLICKEY=" + _KEYS[31].encode() + b"\nPresharedKey = " + _PRIVATE.encode() + b"\n"
    b"PersistentKeepalive = off\n"
    b"[Interface]\nPostUp = echo second\nFwMark = 0xca6c\n"
    b"# the end"
)
_OPERATOR_PEERS: Final = (
    OperatorPeer(
        _KEYS[30],
        (IPv4Network("10.0.0.200/32"), IPv4Network("192.168.7.0/24"), IPv6Network("fd00::200/128")),
    ),
    OperatorPeer(_KEYS[31], (), preshared_key=_PRIVATE),
)


def _peer(number: int, keepalive: int | None = 25, label: str | None = None) -> PeerBlock:
    return block(label or f"node-{number}", _KEYS[number], IPv4Address("10.0.0.2") + number, keepalive)


def _block(number: int) -> bytes:
    return (
        f"\n# wireguard-provisioning: managed peer node-{number}\n[Peer]\nPublicKey = {_KEYS[number]}\n"
        f"AllowedIPs = 10.0.0.{number + 2}/32\nPersistentKeepalive = 25\n"
    ).encode()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "wg0.conf"
    path.write_bytes(_OPERATORS)
    path.chmod(0o600)
    return path


@pytest.fixture
def manager(config: Path) -> WireGuardConfigManager:
    return WireGuardConfigManager(config)


# What the text means


def test_operators_file_is_understood() -> None:
    parsed = parse(_OPERATORS)
    assert parsed.operator_text == _OPERATORS
    assert parsed.operator_peers == _OPERATOR_PEERS
    assert parsed.blocks == ()
    assert parsed.private_key.public_key() == _HUB
    assert parsed.operator_stripped.decode().splitlines() == [
        "[interface]",
        "listenport=51820",
        f"PrivateKey={_PRIVATE}",
        "[Peer]",
        f"PublicKey={_KEYS[30]}",
        "AllowedIPs=10.0.0.200/32,192.168.7.9/24",
        "AllowedIPs=fd00::200",
        "Endpoint=[2001:db8::1]:51820",
        "[PEER]",
        f"PUBLICKEY={_KEYS[31]}",
        f"PresharedKey={_PRIVATE}",
        "PersistentKeepalive=off",
        "[Interface]",
        "FwMark=0xca6c",
    ]


def test_managed_block_has_exactly_the_documented_form() -> None:
    assert render(b"", [_peer(0)]) == _block(0)
    assert (
        block("x_Y-9", _KEYS[1], "10.1.2.3").text
        == (
            f"\n# wireguard-provisioning: managed peer x_Y-9\n[Peer]\nPublicKey = {_KEYS[1]}\n"
            "AllowedIPs = 10.1.2.3/32\n"
        ).encode()
    )


@pytest.mark.parametrize(
    "label", ["", "a b", "a\n", "a\n[Interface]\nPostUp = id", "a\r", "\u00e9", "a#", "x" * 129]
)
def test_label_that_could_reach_beyond_its_line_is_refused(label: str) -> None:
    with pytest.raises(ValueError, match="label is 1 to 128"):
        block(label, _KEYS[0], "10.0.0.2")


def test_peer_that_was_not_parsed_is_refused() -> None:
    with pytest.raises(ValueError, match="canonical base64"):
        PeerBlock.make("a", WireGuardKey.trusted(_KEYS[0] + "\nx"), networks("10.0.0.2"))
    with pytest.raises(ValueError, match="0 to 65535"):
        block("a", _KEYS[0], "10.0.0.2", 65_536)


@pytest.mark.parametrize(
    "operator_text",
    [_OPERATORS, _OPERATORS + b"\n", _OPERATORS + b"\r\n", _MINIMAL, _MINIMAL[:-1], _MINIMAL + b"\n\n"],
)
def test_operators_text_comes_back_exactly_with_and_without_its_last_newline(operator_text: bytes) -> None:
    peers = (_peer(0), _peer(1, None), _peer(2, 0))
    parsed = parse(render(operator_text, peers))
    assert parsed.operator_text == operator_text
    assert parsed.blocks == peers


@pytest.mark.parametrize("edited", [b"", b"\n# by hand\n"])
def test_a_block_of_ours_whose_key_is_a_second_spelling_is_still_ours(edited: bytes) -> None:
    """Earlier versions let such keys in. Taken for the operator's, it would never go again."""
    peer = block("node-0", other_spelling(_KEYS[0]), "10.0.0.2")
    parsed = parse(render(_MINIMAL, [peer, _peer(1)]) + edited)
    assert parsed.blocks == (peer, _peer(1))
    assert parsed.operator_peers == ()


def test_text_that_an_operator_put_behind_our_blocks_moves_before_them_in_order() -> None:
    first = f"[Peer]\nPublicKey = {_KEYS[5]}\n".encode()
    second = f"# mine\n[Peer]\nPublicKey = {_KEYS[6]}".encode()
    parsed = parse(_MINIMAL[:-1] + _block(0) + first + _block(1) + second)
    assert parsed.operator_text == _MINIMAL + first + second
    assert parsed.blocks == (_peer(0), _peer(1))
    assert [peer.public_key for peer in parsed.operator_peers] == [_KEYS[5], _KEYS[6]]


def test_keys_in_a_managed_block_are_ours_and_comments_in_it_are_the_operators() -> None:
    edited = _block(0).replace(
        b"AllowedIPs", b"# asked by Ann\nEndpoint = 192.0.2.1:7\n\nnonsense\nAllowedIPs"
    )
    parsed = parse(_MINIMAL + edited + b"PresharedKey = " + _PRIVATE.encode() + b"\n# below\n" + _block(1))
    assert parsed.operator_text == _MINIMAL + b"# asked by Ann\n\n# below\n"
    assert parsed.operator_peers == ()
    # A line that `wg` would refuse makes the block one that we never wrote.
    assert parsed.blocks == (_peer(1),)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"/32", b"/31"),
        (b"10.0.0.2/32", b"10.0.0.2/32, 10.0.0.9/32"),
        (b"10.0.0.2/32", b"fd00::2/128"),
        (b"AllowedIPs", b"#"),
        (b"PublicKey", b"#"),
        (_KEYS[0].encode(), _ZERO.encode()),
        (_KEYS[0].encode(), b"x"),
        (b"= 25", b"= 65536"),
    ],
)
def test_damaged_block_is_no_peer_and_goes_with_the_next_write(config: Path, old: bytes, new: bytes) -> None:
    config.write_bytes(_MINIMAL + _block(0).replace(old, new) + _block(1))
    manager = WireGuardConfigManager(config)
    assert manager.parsed.blocks == (_peer(1),)
    assert manager.write(manager.parsed.blocks)
    assert config.read_bytes().replace(b"#\n", b"").endswith(_block(1))
    assert b"node-0" not in config.read_bytes()


@pytest.mark.parametrize(
    "line",
    [
        b"# wireguard-provisioning: managed peer node-1",
        b"# wireguard-provisioning: managed peer node-1 ",
        b" # wireguard-provisioning: managed peer node-1",
        b"# wireguard-provisioning: managed peer a b",
        b"# wireguard-provisioning: managed peer ",
        b"#wireguard-provisioning: managed peer node-1",
        b"# wireguard-provisioning: managed peer " + b"x" * 129,
    ],
)
def test_comment_that_is_not_exactly_a_marker_above_a_peer_is_the_operators(line: bytes) -> None:
    between = b"\n" if line.endswith(b"node-1") and line.startswith(b"# ") else b""
    text = _MINIMAL + line + b"\n" + between + f"[Peer]\nPublicKey = {_KEYS[1]}\n".encode()
    assert parse(text).operator_text == text
    assert parse(render(text, [_peer(0)])).operator_text == text


_COMMENT_LIKE_A_MARKER: Final = b"# wireguard-provisioning: managed peer mine\n"


@pytest.mark.parametrize(
    "before",
    [
        _COMMENT_LIKE_A_MARKER + _block(0),
        _block(0) + _COMMENT_LIKE_A_MARKER + b"AllowedIPs = 10.0.0.9/32\n",
        _block(0) + _COMMENT_LIKE_A_MARKER[:-1] + _block(1),
    ],
)
def test_removing_a_block_makes_no_marker_of_ours_out_of_an_operators_comment(before: bytes) -> None:
    operator_peers = f"[Peer]\nPublicKey = {_KEYS[7]}\n".encode()
    parsed = parse(_MINIMAL + before + operator_peers)
    assert parsed.operator_text == _MINIMAL + _COMMENT_LIKE_A_MARKER + b"\n" + operator_peers
    again = parse(render(parsed.operator_text, [_peer(2)]))
    assert again.operator_text == parsed.operator_text
    assert again.operator_peers == (OperatorPeer(_KEYS[7], ()),)
    assert again.blocks == (_peer(2),)


def test_file_that_an_editor_gave_carriage_returns_keeps_our_peers_ours() -> None:
    text = render(_MINIMAL, [_peer(0), _peer(1)]).replace(b"\n", b"\r\n")
    parsed = parse(text)
    assert parsed.operator_text == _MINIMAL.replace(b"\n", b"\r\n")
    assert parsed.blocks == (_peer(0), _peer(1))


@pytest.mark.parametrize("character", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028"])
def test_only_a_newline_ends_a_line(character: str) -> None:
    comment = f"# a{character}PostUp = id{character}[Peer]{character}nonsense\n".encode()
    parsed = parse(_MINIMAL + comment)
    assert parsed.operator_text == _MINIMAL + comment
    assert b"PostUp" not in parsed.operator_stripped


_HIDDEN: Final = "c2VjcmV0IHRoYXQgbm9ib2R5IG1heSBzZWUgZXZlciE="


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[Interface]\n[Foo]\n", "line 2: a section other than [Interface] and [Peer]"),
        (f"PrivateKey = {_HIDDEN}\n", "line 1: a key outside of any section"),
        (f"[Interface]\nPrivatKey = {_HIDDEN}\n", "line 2: a key that `wg` doesn't know in this section"),
        (f"[Interface]\n{_HIDDEN}\n", "line 2: a key that"),
        ("[Interface]\nPublicKey = x\n", "line 2: a key that"),
        ("[Peer]\nAddress = 10.0.0.1/24\n", "line 2: a key that"),
        ("[ Interface ]\nAddress = 10.0.0.1/24\n", "line 2: a key that"),
        ("[Interface]\nPost Up = id\n", "line 2: a key that"),
        ("[Interface]\nListenPort = 65536\n", "line 2: ListenPort is not a number from 0 to 65535"),
        ("[Interface]\nListenPort = " + "9" * 5000, "line 2: ListenPort is not a number"),
        ("[Interface]\nFwMark = 0x100000000\n", "line 2: FwMark is not a number from 0 to 4294967295"),
        ("[Interface]\nPrivateKey =\n", "line 2: PrivateKey has no value"),
        (f"[Interface]\nPrivateKey = {_HIDDEN}A\n", "line 2: PrivateKey is not the canonical base64"),
        (f"[Interface]\nPrivateKey = {_HIDDEN[:-2]}F=\n", "line 2: PrivateKey is not the canonical base64"),
        (f"[Interface]\nPrivateKey = {_ZERO}\n", "line 2: PrivateKey is all zero"),
        ("[Interface]\n", "no [Interface] section has a PrivateKey"),
        ("", "no [Interface] section has a PrivateKey"),
        (f"[Peer]\nPublicKey = {_KEYS[0]}\n", "no [Interface] section has a PrivateKey"),
        ("[Interface]\nSaveConfig = true\n", "line 2: SaveConfig = true lets"),
        ("[Interface]\nSaveConfig = TRUE # x\n", "line 2: SaveConfig = true lets"),
        ("[Interface]\nSaveConfig = yes\n", "line 2: SaveConfig is neither true nor false"),
        ("[Interface]\nSaveConfig\n", "line 2: SaveConfig is neither true nor false"),
        (f"[Peer]\nPresharedKey = {_HIDDEN}x\n", "line 2: PresharedKey is not the canonical base64"),
        ("[Interface]\n\n[Peer]\nAllowedIPs = 10.0.0.2/32\n", "line 3: the [Peer] section has no PublicKey"),
        ("[Peer]\nAllowedIPs = 10.0.0.2/33\n", "line 2: AllowedIPs is not a list"),
        ("[Peer]\nAllowedIPs = 10.0.0.2/32,\n", "line 2: AllowedIPs is not a list"),
        ("[Peer]\nAllowedIPs = +10.0.0.2/32\n", "line 2: AllowedIPs is not a list"),
        ("[Peer]\nAllowedIPs = fe80::1%eth0\n", "line 2: AllowedIPs is not a list"),
        ("[Peer]\nAllowedIPs =\n", "line 2: AllowedIPs has no value"),
        ("[Peer]\nEndpoint = hub\n", "line 2: Endpoint is not host:port"),
        ("[Peer]\nEndpoint = hub:http\n", "line 2: Endpoint is not host:port"),
        ("[Peer]\nEndpoint = 1.2.3:4\n", "line 2: Endpoint is not host:port"),
        ("[Peer]\nEndpoint = [::1:4\n", "line 2: Endpoint is not host:port"),
        ("[Peer]\nEndpoint = [1::2::3]:4\n", "line 2: Endpoint is not host:port"),
        ("[Peer]\nEndpoint = [2001:db8::1%eth0]:4\n", "line 2: Endpoint is not host:port"),
        ("[Peer]\nEndpoint = hub:65536\n", "line 2: Endpoint's port is not a number from 0 to 65535"),
        ("[Peer]\nEndpoint = hub:0\n", "line 2: Endpoint's port is 0"),
        ("[Peer]\nPersistentKeepalive = 65536\n", "line 2: PersistentKeepalive is not a number"),
        ("[Interface]\n# a\0b\n", "line 2: there is a NUL byte in it"),
    ],
)
def test_text_that_cannot_be_used_says_where_and_repeats_no_secret(text: str, problem: str) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        parse(text.encode())
    assert str(caught.value).startswith(problem)
    assert caught.value.remedy
    assert _HIDDEN[:8] not in str(caught.value)


def test_secrets_are_not_shown_by_what_was_parsed(manager: WireGuardConfigManager) -> None:
    assert _PRIVATE not in repr(parse(_OPERATORS))
    manager.refresh()
    assert _PRIVATE not in repr(manager._version)


# What `wg` says to it

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
    assert wg_accepts(parse(render(_OPERATORS, [_peer(0), _peer(1, None)])).stripped)


@pytest.mark.parametrize(
    "line",
    [
        "ListenPort = 0",
        "ListenPort = 0000000000000000065535",
        "FwMark = off",
        "FwMark = 4294967295",
        "FwMark = 0xffffffff",
        "f w m a r k = 0x 1",
        f"[Peer]\nPublicKey = {_ZERO}",
        "[PEER]\nPublic Key = " + _KEYS[0][:20] + " " + _KEYS[0][20:],
        f"[Peer]\nPublicKey = {_KEYS[0]}\nEndpoint = 192.0.2.1:51820",
        f"[Peer]\nPublicKey = {_KEYS[0]}\nEndpoint = [2001:db8::1]:1",
        f"[Peer]\nPublicKey = {_KEYS[0]}\nEndpoint = 2001:db8::1:65535",
        f"[Peer]\nPublicKey = {_KEYS[0]}\nEndpoint = localhost:1",
        f"[Peer]\nPublicKey = {_KEYS[0]}\nAllowedIPs = 0.0.0.0/0, ::/0, 10.1.2.3/8, ::ffff:1.2.3.4",
        f"[Peer]\nPublicKey = {_KEYS[0]}\nPersistentKeepalive = OFF",
        f"[Peer]\nPublicKey = {_KEYS[0]}\nPersistentKeepalive = 00065535",
        f"[Peer]\nPublicKey = {_KEYS[0]}\nPublicKey = {_KEYS[1]}",
    ],
)
def test_what_operators_may_write_is_taken_by_both(line: str, wg_accepts: Callable[[bytes], bool]) -> None:
    text = _MINIMAL + line.encode() + b"\n"
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
    st.sampled_from(
        [_PRIVATE, _ZERO, _KEYS[0], _KEYS[1], _KEYS[0][:-2] + "B=", _KEYS[0][:-1], _KEYS[0] + "="]
    ),
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
        [b"", b"# comment", b"[Peer]\nPublicKey = " + _KEYS[3].encode(), b"AllowedIPs = 10.0.0.7/32"]
    ),
    st.sampled_from(
        [b"[Interface]", b"[Interface]\nPostUp = id # x", b"ListenPort = 1", b"Endpoint = 192.0.2.1:1"]
    ),
    st.sampled_from([b"[Interface]\nPrivateKey = " + _PRIVATE.encode(), b"[ interface ]", b" [PEER] # x"]),
    st.sampled_from(
        [
            b"# wireguard-provisioning: managed peer x",
            b"# wireguard-provisioning: managed peer y\r",
            b"[Peer]",
        ]
    ),
    st.sampled_from(
        [
            _block(0),
            _block(1)[1:],
            _block(2).rstrip(b"\n"),
            _block(3).replace(b"\n", b"\r\n"),
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
    start = draw(st.sampled_from([_MINIMAL[:-1], _MINIMAL[:-1], b"# nothing"]))
    text = draw(st.sampled_from([b"\n", b"\n", b"\r\n"])).join([start, *lines])
    text += draw(st.sampled_from([b"", b"\n", b"\n\n", b"\r\n"]))
    for position, odd in draw(st.lists(st.tuples(st.integers(0, len(text)), _ODD_BYTES), max_size=2)):
        text = text[:position] + odd + text[position:]
    return text


@tried(150, HealthCheck.filter_too_much)
@given(text=_texts())
def test_what_we_accept_is_never_refused_by_wg(text: bytes, wg_accepts: Callable[[bytes], bool]) -> None:
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
    for header in (b"", f"[Peer]\nPublicKey = {_KEYS[0]}\n".encode()):
        try:
            stripped = parse(_MINIMAL + header + line).stripped
        except InvalidConfigError:
            continue
        assert wg_accepts(stripped)


@tried(30, HealthCheck.filter_too_much)
@given(text=_texts().filter(lambda text: b"managed peer" not in text))
@example(text=_OPERATORS)
@example(text=_MINIMAL + b"[Interface]=x\nAddress = 10.0.0.1/24\n")
def test_what_we_accept_is_never_refused_after_wg_quick(
    text: bytes, wg_accepts: Callable[[bytes], bool], wg_quick_strip: Callable[[bytes], bytes]
) -> None:
    try:
        parsed = parse(text)
    except InvalidConfigError:
        return
    assert wg_accepts(wg_quick_strip(render(text, [_peer(9)])))
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
    for peers in (once.blocks, tuple(map(_peer, numbers))):
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
def test_blocks_that_are_taken_off_at_once_are_what_they_are_line_by_line(  # noqa: PLR0913, PLR0917 - each is drawn
    monkeypatch: pytest.MonkeyPatch,
    text: bytes,
    numbers: list[int],
    tail: bytes,
    position: int | None,
    odd: bytes,
) -> None:
    text = render(text, map(_peer, numbers)) + tail
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
    peer = _peer(0, keepalive, label)
    try:
        parse(operator_text)
    except InvalidConfigError:
        return
    parsed = parse(render(operator_text, [peer]))
    assert parsed.operator_text == operator_text
    assert parsed.blocks == (peer,)


# The file


def test_hundred_peers_come_and_go_and_the_operators_bytes_stay(
    config: Path, manager: WireGuardConfigManager
) -> None:
    peers: dict[int, PeerBlock] = {}
    for step in range(100):
        number = step * 7 % 40
        if number in peers:
            del peers[number]
        else:
            peers[number] = _peer(number)
        assert manager.write(peers.values())
        assert config.read_bytes() == _OPERATORS + b"".join(map(_block, peers))
    assert manager.parsed.operator_peers == _OPERATOR_PEERS
    assert manager.write([])
    assert config.read_bytes() == _OPERATORS


def _unread(path: Path) -> tuple[int, int, int]:
    """Return what reading a file doesn't change."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def test_file_that_is_as_it_should_be_is_left_alone(config: Path, manager: WireGuardConfigManager) -> None:
    assert manager.write([_peer(0)])
    before = _unread(config)
    assert not manager.write([_peer(0)])
    assert not WireGuardConfigManager(config).write([_peer(0)])
    assert _unread(config) == before


def test_stripped_text_is_the_one_that_strip_makes_of_the_file(
    config: Path, manager: WireGuardConfigManager
) -> None:
    peers = [_peer(0), _peer(1)]
    manager.write(peers)
    stripped = manager.parsed.stripped
    assert stripped == parse(config.read_bytes()).stripped
    assert b"PostUp" not in stripped
    assert manager.parsed.blocks == tuple(peers)


def test_first_look_is_taken_when_somebody_asks(config: Path, manager: WireGuardConfigManager) -> None:
    assert manager.path == config
    assert manager.interface == "wg0"
    assert manager.parsed.hub_public_key == _HUB
    assert not manager.refresh()
    assert WireGuardConfigManager(str(config)).refresh()


@tried(50, HealthCheck.filter_too_much)
@given(
    turns=st.lists(st.lists(st.integers(0, 5), unique=True), min_size=1, max_size=8),
    comes_to_the_end=st.booleans(),
)
def test_the_file_is_rendered_the_same_whatever_came_and_went(
    tmp_path_factory: pytest.TempPathFactory, turns: list[list[int]], comes_to_the_end: bool
) -> None:
    config = tmp_path_factory.mktemp("hub") / "wg0.conf"
    config.write_bytes(_OPERATORS)
    manager = WireGuardConfigManager(config)
    for numbers in turns:
        peers = list(map(_peer, sorted(numbers) if comes_to_the_end else numbers))
        manager.write(peers)
        assert config.read_bytes() == render(_OPERATORS, peers)
        assert manager.parsed.blocks == tuple(peers)


@pytest.mark.parametrize("settle", [True, False])
def test_operators_edit_between_two_writes_is_kept(
    config: Path, manager: WireGuardConfigManager, settle: bool
) -> None:
    config.write_bytes(_MINIMAL + b"# a\n")
    manager.write([_peer(0)])
    text = config.read_bytes()
    if settle:
        os.utime(config, (1_000_000_000, 1_000_000_000))
        assert not manager.refresh()
    # Same size, and perhaps within the same tick of the file system's clock.
    config.write_bytes(text.replace(b"# a\n", b"# b\n"))
    assert manager.write([_peer(0), _peer(1)])
    assert config.read_bytes() == _MINIMAL + b"# b\n" + _block(0) + _block(1)


def test_refresh_says_whether_the_operators_part_is_new(
    config: Path, manager: WireGuardConfigManager
) -> None:
    assert manager.refresh()
    assert not manager.refresh()
    config.write_bytes(render(_OPERATORS, [_peer(0)]))
    assert not manager.refresh()
    assert manager.parsed.blocks == (_peer(0),)
    other = WireGuardPrivateKey(bytes([99] * 32))
    config.write_bytes(_OPERATORS.replace(_PRIVATE.encode(), other.reveal().encode(), 1))
    assert manager.refresh()
    assert manager.parsed.hub_public_key == other.public_key()


def test_writing_does_not_parse_again_what_has_not_changed(
    manager: WireGuardConfigManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.refresh()

    def no_parse(text: bytes) -> NoReturn:
        raise AssertionError(f"{len(text)} bytes were parsed again")

    monkeypatch.setattr(wireguard_config_manager, "parse", no_parse)
    for number in range(10):
        assert manager.write([_peer(number)])
        assert _block(number) in manager.parsed.stripped


def test_broken_file_is_refused_until_it_is_mended(config: Path, manager: WireGuardConfigManager) -> None:
    manager.write([_peer(0)])
    broken = config.read_bytes() + b"\n[Peer]\nnonsense\n"
    last_line = broken.count(b"\n")
    config.write_bytes(broken)
    for _ in range(3):
        with pytest.raises(ConfigFileError, match=rf"line {last_line}: a key") as caught:
            manager.refresh()
        assert caught.value.path == str(config)
        with pytest.raises(ConfigFileError):
            manager.write([])
        with pytest.raises(ConfigFileError):
            manager.validate_config()
    assert config.read_bytes() == broken
    assert manager.parsed.operator_peers == _OPERATOR_PEERS
    config.write_bytes(_OPERATORS)
    assert manager.validate_config() is True
    assert manager.write([_peer(1)])


def test_missing_file_says_how_to_make_one(config: Path, manager: WireGuardConfigManager) -> None:
    manager.refresh()
    config.unlink()
    with pytest.raises(ConfigFileError, match=r"doesn't exist.*python -m backend hub init"):
        manager.write([_peer(0)])
    assert not config.exists()


def test_file_that_vanishes_after_it_was_known_for_long_is_missed(
    config: Path, manager: WireGuardConfigManager
) -> None:
    os.utime(config, (1_000_000_000, 1_000_000_000))
    manager.refresh()
    config.unlink()
    with pytest.raises(ConfigFileError, match="doesn't exist"):
        manager.refresh()


def test_file_that_is_being_written_into_is_not_taken_for_whole(
    config: Path, manager: WireGuardConfigManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    fstat = os.fstat

    def write_then_look(fd: int) -> os.stat_result:
        with config.open("ab") as file:
            file.write(b"#")
        return fstat(fd)

    monkeypatch.setattr(os, "fstat", write_then_look)
    with pytest.raises(ConfigFileError, match="another program keeps writing into the file"):
        manager.refresh()


def test_something_else_than_a_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    pipe = tmp_path / "wg0.conf"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path):
        with pytest.raises(ConfigFileError, match="not a regular file"):
            WireGuardConfigManager(path).refresh()


def test_file_that_cannot_be_read_says_why(
    manager: WireGuardConfigManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(ConfigFileError, match="can't be read: Permission denied"):
            manager.refresh()
    manager.refresh()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o400])
def test_owner_and_mode_stay(config: Path, manager: WireGuardConfigManager, mode: int) -> None:
    config.chmod(mode)
    if os.geteuid() == 0:
        os.chown(config, 12345, 54321)
    before = config.stat()
    manager.write([_peer(0)])
    after = config.stat()
    assert after.st_ino != before.st_ino
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def test_new_file_is_nobody_elses_before_it_is_the_file(
    config: Path, manager: WireGuardConfigManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[int] = []
    fsync = os.fsync

    def look(fd: int) -> None:
        modes.extend(path.stat().st_mode & 0o777 for path in config.parent.iterdir())
        fsync(fd)

    monkeypatch.setattr(os, "fsync", look)
    umask = os.umask(0)
    try:
        manager.write([_peer(0)])
    finally:
        os.umask(umask)
    assert modes == [0o600, 0o600, 0o600]


def test_symbolic_link_stays_one(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere" / "hub.conf"
    target.parent.mkdir()
    target.write_bytes(_MINIMAL)
    link = tmp_path / "wg7.conf"
    link.symlink_to(target)
    manager = WireGuardConfigManager(link)
    assert manager.interface == "wg7"
    assert manager.path == target
    manager.write([_peer(0)])
    assert link.is_symlink()
    assert target.read_bytes() == _MINIMAL + _block(0)


@pytest.mark.parametrize(
    ("function", "error"),
    [
        ("replace", OSError(errno.EROFS, os.strerror(errno.EROFS))),
        ("fsync", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
        ("fchmod", PermissionError(errno.EPERM, os.strerror(errno.EPERM))),
        ("replace", KeyboardInterrupt()),
    ],
)
def test_failed_replacement_leaves_the_old_file_and_nothing_else(
    config: Path,
    manager: WireGuardConfigManager,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    error: BaseException,
) -> None:
    manager.write([_peer(0)])

    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        if isinstance(error, OSError):
            with pytest.raises(HubUpdateError, match=f"{config} could not be replaced: {error.strerror}"):
                manager.write([_peer(0), _peer(1)])
        else:
            with pytest.raises(KeyboardInterrupt):
                manager.write([_peer(0), _peer(1)])
    assert config.read_bytes() == _OPERATORS + _block(0)
    assert list(config.parent.iterdir()) == [config]
    assert manager.parsed.blocks == (_peer(0),)
    assert manager.write([_peer(0), _peer(1)])


def test_directory_that_cannot_be_made_durable_is_said_and_the_file_is_known_to_be_new(
    config: Path, manager: WireGuardConfigManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager.refresh()
    fsync = os.fsync

    def fail_for_directory(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):  # noqa: PTH112 - a descriptor, which is no path of ours
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_for_directory)
        with pytest.raises(HubUpdateError, match="Input/output error"):
            manager.write([_peer(0)])
    assert manager.parsed.blocks == (_peer(0),)
    assert config.read_bytes() == _OPERATORS + _block(0)


def _edit_before_replacing(
    monkeypatch: pytest.MonkeyPatch, config: Path, edits: Iterator[Callable[[], object]]
) -> None:
    """Let an operator be quicker: an edit between our look and our replacement."""
    fsync = os.fsync

    def edit_then_sync(fd: int) -> None:
        fsync(fd)
        next(edits, lambda: None)()

    monkeypatch.setattr(os, "fsync", edit_then_sync)


def test_edit_that_is_quicker_than_our_replacement_is_kept(
    config: Path, manager: WireGuardConfigManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    edits = iter([lambda: config.write_bytes(_OPERATORS + b"\n# quick\n"), lambda: config.chmod(0o640)])
    _edit_before_replacing(monkeypatch, config, edits)
    assert manager.write([_peer(0)])
    assert config.read_bytes() == _OPERATORS + b"\n# quick\n" + _block(0)
    assert config.stat().st_mode & 0o777 == 0o640
    assert manager.parsed.operator_peers == _OPERATOR_PEERS


def test_file_that_never_holds_still_is_not_replaced(
    config: Path, manager: WireGuardConfigManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def edits() -> Iterator[Callable[[], Any]]:
        for number in range(1000):
            yield lambda: config.write_bytes(_MINIMAL + b"#" * number)  # noqa: B023 - called at once

    _edit_before_replacing(monkeypatch, config, edits())
    with pytest.raises(HubUpdateError, match="another program keeps changing it"):
        manager.write([_peer(0)])
    assert list(config.parent.iterdir()) == [config]


def test_file_that_is_taken_away_meanwhile_is_not_brought_back(
    config: Path, manager: WireGuardConfigManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    _edit_before_replacing(monkeypatch, config, iter([config.unlink]))
    with pytest.raises(ConfigFileError, match="doesn't exist"):
        manager.write([_peer(0)])
    assert list(config.parent.iterdir()) == []


def test_reader_sees_whole_files_only(config: Path, manager: WireGuardConfigManager) -> None:
    stop = threading.Event()
    seen: set[int] = set()
    problems: list[Exception] = []

    def read() -> None:
        while not stop.is_set():
            try:
                seen.add(len(parse(config.read_bytes()).blocks))
            except Exception as exc:  # noqa: BLE001 - whatever it is, it's what the test looks for
                problems.append(exc)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for step in range(200):
            manager.write([_peer(number) for number in range(step % 40)])
    finally:
        stop.set()
        reader.join()
    assert problems == []
    assert seen <= set(range(40))


def test_what_a_killed_process_left_is_removed_and_nothing_else(config: Path) -> None:
    stale = config.parent / ".wg0.conf.abc_12x9.tmp"
    stale.touch()
    others = [".wg0.conf.lock", ".wg0.conf.d.abc_12x9.tmp", ".wg1.conf.abc_12x9.tmp", ".wg0.conf.abc.tmp"]
    for name in others:
        (config.parent / name).touch()
    manager = WireGuardConfigManager(config)
    manager.remove_stale_temporaries()
    assert {path.name for path in config.parent.iterdir()} == {"wg0.conf", *others}
    with pytest.raises(HubUpdateError, match="No such file"):
        WireGuardConfigManager(config.parent / "nowhere" / "wg0.conf").remove_stale_temporaries()


def test_leftover_of_a_real_writer_has_the_name_that_is_looked_for(
    config: Path, manager: WireGuardConfigManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object, **__: object) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        patch.setattr(Path, "unlink", die)
        with pytest.raises(KeyboardInterrupt):
            manager.write([_peer(0)])
    assert len(list(config.parent.iterdir())) == 2
    manager.remove_stale_temporaries()
    assert list(config.parent.iterdir()) == [config]


# The short way, for one peer at a time


def test_peer_is_added_replaced_and_removed(config: Path, manager: WireGuardConfigManager) -> None:
    manager.add_peer(_KEYS[0], ["10.0.0.2/32"])
    manager.add_peer(_KEYS[1], ["10.0.0.3"], None, 25, label="node-1")
    assert manager.parsed.blocks == (
        block("manual", _KEYS[0], "10.0.0.2"),
        _peer(1),
    )
    manager.add_peer(_KEYS[0], ["10.0.0.9/32"], persistent_keepalive=0)
    assert [peer.allowed_ips for peer in manager.parsed.blocks] == [("10.0.0.3/32",), ("10.0.0.9/32",)]
    assert manager.remove_peer(_KEYS[0])
    assert not manager.remove_peer(_KEYS[0])
    assert not manager.remove_peer(_KEYS[30])
    assert config.read_bytes() == _OPERATORS + _block(1)


@pytest.mark.parametrize(
    "arguments",
    [
        ("jKlMnOpQrStUvWxYzAbCdEfGhIjKlMnO=", ["10.0.0.3/32"], None, None, "a"),
        (_KEYS[1] + "\n", ["10.0.0.3/32"], None, None, "a"),
        (_ZERO, ["10.0.0.3/32"], None, None, "a"),
        (_HUB, ["10.0.0.3/32"], None, None, "a"),
        (_KEYS[1], [], None, None, "a"),
        (_KEYS[1], ["10.0.0.3/32", "10.0.0.2/32"], None, None, "a"),
        (_KEYS[1], ["10.0.0.3/32", "192.168.7.0/24"], None, None, "a"),
        (_KEYS[1], ["10.0.0.3/32", "10.0.0.4/33"], None, None, "a"),
        (_KEYS[1], ["10.0.0.3/32", "10.0.0.4/32 # a"], None, None, "a"),
        (_KEYS[1], ["10.0.0.3/32", "fd00::200"], None, None, "a"),
        (_KEYS[1], "10.0.0.3/32", None, None, "a"),
        (_KEYS[1], "7", None, None, "a"),
        (_KEYS[1], ["10.0.0.3/32"], "hub.example.com", None, "a"),
        (_KEYS[1], ["10.0.0.3/32"], "hub.example.com:0", None, "a"),
        (_KEYS[1], ["10.0.0.3/32"], "a:1\nPostUp = id", None, "a"),
        (_KEYS[1], ["10.0.0.3/32\n"], None, None, "a"),
        (_KEYS[1], ["10.0.0.2/32"], None, None, "a"),
        (_KEYS[1], ["10.0.0.3/32"], None, -1, "a"),
        (_KEYS[1], ["10.0.0.3/32"], None, 65_536, "a"),
        (_KEYS[1], ["10.0.0.3/32"], None, None, "a\n[Interface]\nPostUp = id"),
    ],
)
def test_peer_that_cannot_be_is_refused_without_touching_the_file(
    config: Path,
    manager: WireGuardConfigManager,
    arguments: tuple[str, list[str], str | None, int | None, str],
) -> None:
    manager.add_peer(_KEYS[0], ["10.0.0.2/32"])
    before, text = _unread(config), config.read_bytes()
    with pytest.raises(ValueError):
        manager.add_peer(*arguments)
    assert _unread(config) == before
    assert config.read_bytes() == text


def test_text_is_given_back_with_its_odd_bytes(manager: WireGuardConfigManager) -> None:
    assert manager.get_config().encode(errors="surrogateescape") == _OPERATORS


def test_reload_is_given_the_stripped_text_of_the_file(config: Path) -> None:
    given_texts: list[bytes] = []
    manager = WireGuardConfigManager(config, given_texts.append)
    manager.add_peer(_KEYS[0], ["10.0.0.2/32"], None, 25, "node-0")
    assert manager.reload_config() is True
    assert given_texts == [parse(_OPERATORS + _block(0)).stripped]
    config.write_bytes(b"")
    with pytest.raises(ConfigFileError, match="PrivateKey"):
        manager.reload_config()
    assert len(given_texts) == 1


def test_reload_without_a_way_to_do_it_says_so(manager: WireGuardConfigManager) -> None:
    with pytest.raises(HubUpdateError, match="wg0"):
        manager.reload_config()


def test_operators_networks_are_those_that_wg_would_make() -> None:
    text = _MINIMAL + f"[Peer]\nPublicKey={_KEYS[0]}\nAllowedIPs=10.1.2.3/8,fd00::1:2/112\n".encode()
    assert parse(text).operator_peers == (
        OperatorPeer(_KEYS[0], (IPv4Network("10.0.0.0/8"), IPv6Network("fd00::1:0/112"))),
    )
