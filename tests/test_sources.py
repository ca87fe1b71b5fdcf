"""Whose request it is: what a trusted proxy says of it, and what nobody else can."""

import pytest

from backend.models.access.sources import TrustedProxies, network_of


def forwarded(*values: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"hub"), *((b"x-forwarded-for", value.encode()) for value in values)]


@pytest.mark.parametrize(
    ("peer", "trusted"),
    [
        ("127.0.0.1", True),
        ("::ffff:127.0.0.1", True),
        ("127.0.0.2", False),
        ("10.1.2.3", True),
        ("10.2.0.1", False),
        ("2001:db8::5", True),
        ("2001:db9::5", False),
        ("fe80::1%eth0", False),
        ("testclient", False),
        (None, False),
    ],
)
def test_proxies_are_trusted_by_their_network(peer: str | None, trusted: bool) -> None:
    proxies = TrustedProxies.parse("127.0.0.1, 10.1.0.0/16,2001:db8::/32")
    for _ in range(2):
        assert proxies.trust(peer) is trusted
    assert not TrustedProxies().trust(peer)


@pytest.mark.parametrize(
    ("values", "source"),
    [
        ((), "127.0.0.1"),
        (("203.0.113.7",), "203.0.113.7"),
        (("198.51.100.1, 203.0.113.7",), "203.0.113.7"),
        (("198.51.100.1,203.0.113.7",), "203.0.113.7"),
        (("198.51.100.1", "203.0.113.7"), "203.0.113.7"),
        (("203.0.113.7:4711",), "203.0.113.7"),
        (("2001:db8:1::7",), "2001:db8:1::7"),
        (("[2001:db8:1::7]:4711",), "2001:db8:1::7"),
        (("2001:DB8:1:0::7",), "2001:db8:1::7"),
        (("::ffff:203.0.113.7",), "203.0.113.7"),
        (("203.0.113.7, unknown",), "127.0.0.1"),
        (("203.0.113.7,",), "127.0.0.1"),
        (("203.0.113.7 evil",), "127.0.0.1"),
        (("fe80::1%eth0",), "127.0.0.1"),
        (("\u0661.2.3.4",), "127.0.0.1"),
    ],
)
def test_last_hop_is_the_source(values: tuple[str, ...], source: str) -> None:
    proxies = TrustedProxies.parse("127.0.0.1")
    assert proxies.source("127.0.0.1", forwarded(*values)) == source
    # From any other peer the header says nothing.
    assert proxies.source("192.0.2.1", forwarded(*values)) == "192.0.2.1"
    assert proxies.source(None, forwarded(*values)) is None
    assert TrustedProxies().source("127.0.0.1", forwarded(*values)) == "127.0.0.1"


def test_unix_socket_may_be_a_proxy_too() -> None:
    proxies = TrustedProxies.parse("unix")
    assert proxies.source(None, forwarded("203.0.113.7")) == "203.0.113.7"
    assert proxies.source(None, forwarded()) is None
    assert proxies.source("127.0.0.1", forwarded("203.0.113.7")) == "127.0.0.1"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("10.0.0.1/8", "write 10.0.0.0/8"),
        ("127.0.0.1,proxy.example", "'proxy.example', which is no network"),
        ("127.0.0.1/33", "is no network"),
        ("::ffff:127.0.0.1", "write it as such, like 127.0.0.1"),
    ],
)
def test_invalid_network_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        TrustedProxies.parse(text)


def test_ipv6_counts_by_its_64_and_mapped_ipv4_as_itself() -> None:
    assert network_of("2001:db8::1") == network_of("2001:db8::2") == "2001:db8::/64"
    assert network_of("::ffff:192.0.2.1") == network_of("192.0.2.1") == "192.0.2.1"
    assert network_of("not:an:address") == "not:an:address"
