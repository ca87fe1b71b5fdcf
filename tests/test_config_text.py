"""What the text of a wg-quick file means: what is the operator's, and what is ours."""

from ipaddress import IPv4Network, IPv6Network
from typing import Final

import pytest

from backend.models.wireguard.keys import WireGuardKey
from backend.services.hub.config_text import OperatorPeer, PeerBlock, parse, render
from backend.services.hub.config_values import InvalidConfigError
from tests.harness.config_files import (
    HUB,
    KEYS,
    MINIMAL,
    OPERATOR_PEERS,
    OPERATORS,
    PRIVATE,
    ZERO,
    numbered,
    numbered_text,
)
from tests.harness.peers import block, networks
from tests.harness.requests import other_spelling


def test_operators_file_is_understood() -> None:
    parsed = parse(OPERATORS)
    assert parsed.operator_text == OPERATORS
    assert parsed.operator_peers == OPERATOR_PEERS
    assert parsed.blocks == ()
    assert parsed.private_key.public_key() == HUB
    assert parsed.operator_stripped.decode().splitlines() == [
        "[interface]",
        "listenport=51820",
        f"PrivateKey={PRIVATE}",
        "[Peer]",
        f"PublicKey={KEYS[30]}",
        "AllowedIPs=10.0.0.200/32,192.168.7.9/24",
        "AllowedIPs=fd00::200",
        "Endpoint=[2001:db8::1]:51820",
        "[PEER]",
        f"PUBLICKEY={KEYS[31]}",
        f"PresharedKey={PRIVATE}",
        "PersistentKeepalive=off",
        "[Interface]",
        "FwMark=0xca6c",
    ]


def test_managed_block_has_exactly_the_documented_form() -> None:
    assert render(b"", [numbered(0)]) == numbered_text(0)
    assert (
        block("x_Y-9", KEYS[1], "10.1.2.3").text
        == (
            f"\n# wireguard-provisioning: managed peer x_Y-9\n[Peer]\nPublicKey = {KEYS[1]}\n"
            "AllowedIPs = 10.1.2.3/32\n"
        ).encode()
    )


@pytest.mark.parametrize(
    "label", ["", "a b", "a\n", "a\n[Interface]\nPostUp = id", "a\r", "\u00e9", "a#", "x" * 129]
)
def test_label_that_could_reach_beyond_its_line_is_refused(label: str) -> None:
    with pytest.raises(ValueError, match="label is 1 to 128"):
        block(label, KEYS[0], "10.0.0.2")


def test_peer_that_was_not_parsed_is_refused() -> None:
    with pytest.raises(ValueError, match="canonical base64"):
        PeerBlock.make("a", WireGuardKey(KEYS[0] + "\nx"), networks("10.0.0.2"))
    with pytest.raises(ValueError, match="0 to 65535"):
        block("a", KEYS[0], "10.0.0.2", 65_536)


@pytest.mark.parametrize(
    "operator_text",
    [OPERATORS, OPERATORS + b"\n", OPERATORS + b"\r\n", MINIMAL, MINIMAL[:-1], MINIMAL + b"\n\n"],
)
def test_operators_text_comes_back_exactly_with_and_without_its_last_newline(operator_text: bytes) -> None:
    peers = (numbered(0), numbered(1, None), numbered(2, 0))
    parsed = parse(render(operator_text, peers))
    assert parsed.operator_text == operator_text
    assert parsed.blocks == peers


@pytest.mark.parametrize("edited", [b"", b"\n# by hand\n"])
def test_a_block_of_ours_whose_key_is_a_second_spelling_is_still_ours(edited: bytes) -> None:
    """Earlier versions let such keys in. Taken for the operator's, it would never go again."""
    peer = block("node-0", other_spelling(KEYS[0]), "10.0.0.2")
    parsed = parse(render(MINIMAL, [peer, numbered(1)]) + edited)
    assert parsed.blocks == (peer, numbered(1))
    assert parsed.operator_peers == ()


def test_text_that_an_operator_put_behind_our_blocks_moves_before_them_in_order() -> None:
    first = f"[Peer]\nPublicKey = {KEYS[5]}\n".encode()
    second = f"# mine\n[Peer]\nPublicKey = {KEYS[6]}".encode()
    parsed = parse(MINIMAL[:-1] + numbered_text(0) + first + numbered_text(1) + second)
    assert parsed.operator_text == MINIMAL + first + second
    assert parsed.blocks == (numbered(0), numbered(1))
    assert [peer.public_key for peer in parsed.operator_peers] == [KEYS[5], KEYS[6]]


def test_keys_in_a_managed_block_are_ours_and_comments_in_it_are_the_operators() -> None:
    edited = numbered_text(0).replace(
        b"AllowedIPs", b"# asked by Ann\nEndpoint = 192.0.2.1:7\n\nnonsense\nAllowedIPs"
    )
    parsed = parse(
        MINIMAL + edited + b"PresharedKey = " + PRIVATE.encode() + b"\n# below\n" + numbered_text(1)
    )
    assert parsed.operator_text == MINIMAL + b"# asked by Ann\n\n# below\n"
    assert parsed.operator_peers == ()
    # A line that `wg` would refuse makes the block one that we never wrote.
    assert parsed.blocks == (numbered(1),)


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
    text = MINIMAL + line + b"\n" + between + f"[Peer]\nPublicKey = {KEYS[1]}\n".encode()
    assert parse(text).operator_text == text
    assert parse(render(text, [numbered(0)])).operator_text == text


_COMMENT_LIKE_A_MARKER: Final = b"# wireguard-provisioning: managed peer mine\n"


@pytest.mark.parametrize(
    "before",
    [
        _COMMENT_LIKE_A_MARKER + numbered_text(0),
        numbered_text(0) + _COMMENT_LIKE_A_MARKER + b"AllowedIPs = 10.0.0.9/32\n",
        numbered_text(0) + _COMMENT_LIKE_A_MARKER[:-1] + numbered_text(1),
    ],
)
def test_removing_a_block_makes_no_marker_of_ours_out_of_an_operators_comment(before: bytes) -> None:
    operator_peers = f"[Peer]\nPublicKey = {KEYS[7]}\n".encode()
    parsed = parse(MINIMAL + before + operator_peers)
    assert parsed.operator_text == MINIMAL + _COMMENT_LIKE_A_MARKER + b"\n" + operator_peers
    again = parse(render(parsed.operator_text, [numbered(2)]))
    assert again.operator_text == parsed.operator_text
    assert again.operator_peers == (OperatorPeer(KEYS[7], ()),)
    assert again.blocks == (numbered(2),)


def test_file_that_an_editor_gave_carriage_returns_keeps_our_peers_ours() -> None:
    text = render(MINIMAL, [numbered(0), numbered(1)]).replace(b"\n", b"\r\n")
    parsed = parse(text)
    assert parsed.operator_text == MINIMAL.replace(b"\n", b"\r\n")
    assert parsed.blocks == (numbered(0), numbered(1))


@pytest.mark.parametrize("character", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028"])
def test_only_a_newline_ends_a_line(character: str) -> None:
    comment = f"# a{character}PostUp = id{character}[Peer]{character}nonsense\n".encode()
    parsed = parse(MINIMAL + comment)
    assert parsed.operator_text == MINIMAL + comment
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
        (f"[Interface]\nPrivateKey = {ZERO}\n", "line 2: PrivateKey is all zero"),
        ("[Interface]\n", "no [Interface] section has a PrivateKey"),
        ("", "no [Interface] section has a PrivateKey"),
        (f"[Peer]\nPublicKey = {KEYS[0]}\n", "no [Interface] section has a PrivateKey"),
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


def test_operators_networks_are_those_that_wg_would_make() -> None:
    text = MINIMAL + f"[Peer]\nPublicKey={KEYS[0]}\nAllowedIPs=10.1.2.3/8,fd00::1:2/112\n".encode()
    assert parse(text).operator_peers == (
        OperatorPeer(KEYS[0], (IPv4Network("10.0.0.0/8"), IPv6Network("fd00::1:0/112"))),
    )
