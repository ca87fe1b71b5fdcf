"""Texts of a hub's wg-quick file: an operator's, and blocks of ours with numbers."""

from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import Final

from backend.models.wireguard.keys import WireGuardPrivateKey
from backend.services.hub.config_text import OperatorPeer, PeerBlock
from tests.harness.peers import block

PRIVATE: Final = "iB4Y8yRkAyI8mdFBYCpOUXLTn1kAbGbyGmtXGvRZ/F4="
HUB: Final = WireGuardPrivateKey.parse(PRIVATE).public_key()
KEYS: Final = tuple(WireGuardPrivateKey(bytes([number + 1] * 32)).public_key() for number in range(40))
ZERO: Final = "A" * 43 + "="
MINIMAL: Final = f"[Interface]\nPrivateKey = {PRIVATE}\n".encode()
# What an operator's file may look like: hooks, comments, odd spacing, CRLF, Latin-1, peers of their own.
OPERATORS: Final = (
    b"# H\xf4tel de ville, r\xe9seau\r\n"
    b"  [interface]   # the hub\r\n"
    b"Address = 10.0.0.1/24, fd00::1/64\n"
    b"\tlistenport=51820\n"
    b"PrivateKey\t=" + PRIVATE.encode() + b" # don't show\n"
    b"PostUp = iptables -A FORWARD -i %i -j ACCEPT; echo 'a\\b' # why\n"
    b"SaveConfig = FALSE\n\n\n"
    b"[Peer]\n# Zo\xeb's laptop \x0b \x0c \x1c \x85 \xe2\x80\xa8 all in one line\n"
    b"PublicKey = " + KEYS[30].encode() + b"\r\n"
    b"AllowedIPs = 10.0.0.200/32 , 192.168.7.9/24\nAllowedIPs = fd00::200\n"
    b"Endpoint = [2001:db8::1]:51820\n\n"
    b"[PEER]\nPUBLICKEY=" + KEYS[31].encode() + b"\nPresharedKey = " + PRIVATE.encode() + b"\n"
    b"PersistentKeepalive = off\n"
    b"[Interface]\nPostUp = echo second\nFwMark = 0xca6c\n"
    b"# the end"
)
OPERATOR_PEERS: Final = (
    OperatorPeer(
        KEYS[30],
        (IPv4Network("10.0.0.200/32"), IPv4Network("192.168.7.0/24"), IPv6Network("fd00::200/128")),
    ),
    OperatorPeer(KEYS[31], (), preshared_key=PRIVATE),
)


def numbered(number: int, keepalive: int | None = 25, label: str | None = None) -> PeerBlock:
    """Return a block of ours: KEYS[number] at 10.0.0.(number + 2)."""
    return block(label or f"node-{number}", KEYS[number], IPv4Address("10.0.0.2") + number, keepalive)


def numbered_text(number: int) -> bytes:
    """Return the text of `numbered(number)`."""
    return (
        f"\n# wireguard-provisioning: managed peer node-{number}\n[Peer]\nPublicKey = {KEYS[number]}\n"
        f"AllowedIPs = 10.0.0.{number + 2}/32\nPersistentKeepalive = 25\n"
    ).encode()
