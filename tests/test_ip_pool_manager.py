"""The pool of addresses."""

import resource
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from threading import Barrier
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from backend.errors import IPPoolExhaustedError
from backend.services.ip_pool_manager import IPPoolManager
from tests.harness.torture import tried


def _stats(pool: IPPoolManager) -> tuple[int, int, int, int]:
    stats = pool.get_pool_stats()
    return (
        stats["total_addresses"],
        stats["reserved_addresses"],
        stats["allocated_addresses"],
        stats["available_addresses"],
    )


def _networks(*texts: str) -> list[IPv4Network]:
    return [IPv4Network(text) for text in texts]


def test_lowest_free_address_is_handed_out_first_and_a_released_one_comes_back() -> None:
    pool = IPPoolManager("10.0.0.0/24", ["10.0.0.1"])
    assert [pool.allocate_ip(name) for name in "abc"] == ["10.0.0.2", "10.0.0.3", "10.0.0.4"]
    pool.deallocate_ip("b")
    assert pool.get_allocated_ip("b") is None
    assert not pool.is_allocated("10.0.0.3")
    assert pool.allocate_ip("d") == "10.0.0.3"
    assert pool.get_allocated_ip("d") == "10.0.0.3"
    assert pool.is_allocated("10.0.0.3")


def test_second_address_for_a_peer_is_refused_and_the_first_stays() -> None:
    pool = IPPoolManager("10.0.0.0/24")
    first = pool.allocate_ip("a")
    with pytest.raises(ValueError, match=r"Peer a already has IP 10\.0\.0\.1"):
        pool.allocate_ip("a")
    with pytest.raises(ValueError, match="already has IP"):
        pool.adopt("a", IPv4Address("10.0.0.9"))
    assert pool.get_allocated_ip("a") == first
    assert pool.available_count() == 253


def test_network_may_have_host_bits_and_nothing_reserved() -> None:
    pool = IPPoolManager("10.0.0.5/24", None)
    assert pool.network == IPv4Network("10.0.0.0/24")
    assert pool.allocate_ip("a") == "10.0.0.1"


def test_release_of_an_unknown_peer_is_refused() -> None:
    with pytest.raises(ValueError, match="peer nobody has no address"):
        IPPoolManager("10.0.0.0/24").deallocate_ip("nobody")


def test_question_about_something_else_than_an_address_is_refused() -> None:
    with pytest.raises(ValueError):
        IPPoolManager("10.0.0.0/24").is_allocated("10.0.0")


def test_full_pool_says_how_many_are_allocated_and_from_which_range() -> None:
    pool = IPPoolManager("10.0.0.0/24", ["10.0.0.1"])
    for number in range(253):
        pool.allocate_ip(f"peer{number}")
    with pytest.raises(IPPoolExhaustedError) as caught:
        pool.allocate_ip("one-too-many")
    assert str(caught.value) == "IP pool exhausted: 253 addresses allocated from range 10.0.0.0/24"
    assert pool.get_allocated_ip("one-too-many") is None
    assert pool.get_pool_stats() == {
        "total_addresses": 254,
        "reserved_addresses": 1,
        "allocated_addresses": 253,
        "available_addresses": 0,
        "utilization_percent": 99,
    }


@pytest.mark.parametrize(
    ("network", "reserved", "message"),
    [
        ("10.0.0.0/31", [], "choose an IPv4 network with a prefix length from /8 to /30"),
        ("10.0.0.0", [], "choose an IPv4 network with a prefix length from /8 to /30"),
        ("0.0.0.0/7", [], "choose an IPv4 network with a prefix length from /8 to /30"),
        (IPv4Network("10.0.0.0/32"), [], "choose an IPv4 network"),
        ("fd00::/64", [], "fd00::"),
        ("10.0.0.0/24", ["10.0.1.1"], r"reserved address 10\.0\.1\.1 is not in 10\.0\.0\.0/24"),
    ],
)
def test_invalid_pool_is_refused_with_a_reason(
    network: str | IPv4Network, reserved: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        IPPoolManager(network, reserved)


@pytest.mark.parametrize("prefix", range(8, 31))
def test_first_and_last_address_of_a_network_are_reserved(prefix: int) -> None:
    pool = IPPoolManager(f"10.0.0.0/{prefix}")
    size = pool.network.num_addresses
    assert _stats(pool) == (size - 2, 0, 0, size - 2)
    assert pool.allocate_ip("first") == "10.0.0.1"
    # Everything but the last usable address is taken by the operator's peers.
    pool.set_operators(pool.network.address_exclude(IPv4Network((pool.network.broadcast_address - 1, 32))))
    if prefix < 30:
        assert pool.allocate_ip("last") == str(pool.network.broadcast_address - 1)
    else:
        assert pool.allocate_ip("last") == "10.0.0.2"
    with pytest.raises(IPPoolExhaustedError):
        pool.allocate_ip("more")


def test_recorded_address_is_taken_over_although_it_is_reserved_or_an_operators_peers() -> None:
    pool = IPPoolManager("10.0.0.0/24", ["10.0.0.1"])
    pool.set_operators(_networks("10.0.0.16/28"))
    assert _stats(pool) == (254, 17, 0, 237)
    pool.adopt("reserved", IPv4Address("10.0.0.1"))
    pool.adopt("operators", IPv4Address("10.0.0.17"))
    assert _stats(pool) == (254, 15, 2, 237)
    pool.deallocate_ip("reserved")
    pool.deallocate_ip("operators")
    assert _stats(pool) == (254, 17, 0, 237)
    assert pool.allocate_ip("next") == "10.0.0.2"


@pytest.mark.parametrize("address", ["192.168.7.7", "9.255.255.255", "10.0.1.0", "10.0.0.0", "10.0.0.255"])
def test_recorded_address_that_the_pool_could_not_give_is_kept_and_not_counted(address: str) -> None:
    pool = IPPoolManager("10.0.0.0/24")
    pool.adopt("old", IPv4Address(address))
    assert pool.get_allocated_ip("old") == address
    assert pool.is_allocated(address)
    assert _stats(pool) == (254, 0, 0, 254)
    with pytest.raises(ValueError, match="is held by peer old"):
        pool.adopt("other", IPv4Address(address))
    assert pool.get_allocated_ip("other") is None
    pool.deallocate_ip("old")
    assert not pool.is_allocated(address)
    assert pool.allocate_ip("new") == "10.0.0.1"
    assert _stats(pool) == (254, 0, 1, 253)


def test_operators_peers_keep_their_networks_until_they_go() -> None:
    pool = IPPoolManager("10.0.0.0/28", ["10.0.0.1"])
    pool.set_operators(_networks("10.0.0.2/31", "10.0.0.4/32", "10.0.0.3/32", "192.168.0.0/16"))
    assert [pool.is_operators(IPv4Address(f"10.0.0.{last}")) for last in range(1, 6)] == [
        False,
        True,
        True,
        True,
        False,
    ]
    assert not pool.is_operators(IPv4Address("192.168.0.1"))
    assert not pool.is_operators(IPv4Address("9.9.9.9"))
    assert pool.allocate_ip("a") == "10.0.0.5"
    pool.set_operators(_networks("10.0.0.2/32"))
    assert pool.allocate_ip("b") == "10.0.0.3"


def test_network_that_covers_the_pool_is_a_route_and_holds_nothing() -> None:
    pool = IPPoolManager("10.0.0.0/24")
    pool.set_operators(_networks("0.0.0.0/0", "10.0.0.0/8", "10.0.0.0/24"))
    assert not pool.is_operators(IPv4Address("10.0.0.7"))
    assert pool.available_count() == 254


def test_address_held_by_a_peer_and_an_operator_is_free_only_when_both_are_gone() -> None:
    pool = IPPoolManager("10.0.0.0/24")
    assert pool.allocate_ip("ours") == "10.0.0.1"
    pool.set_operators(_networks("10.0.0.1/32"))
    pool.set_operators([])
    assert pool.allocate_ip("next") == "10.0.0.2"
    pool.set_operators(_networks("10.0.0.1/32"))
    pool.deallocate_ip("ours")
    assert pool.allocate_ip("third") == "10.0.0.3"
    pool.set_operators([])
    assert pool.allocate_ip("fourth") == "10.0.0.1"


def test_thirty_two_threads_get_distinct_addresses() -> None:
    pool = IPPoolManager("10.0.0.0/20", ["10.0.0.1"])
    barrier = Barrier(32)

    def work(thread: int) -> list[str]:
        barrier.wait()
        for number in range(100):
            pool.allocate_ip(f"{thread}-{number}")
            if number % 3 == 0:
                pool.deallocate_ip(f"{thread}-{number}")
        kept = [pool.get_allocated_ip(f"{thread}-{number}") for number in range(100)]
        return [address for address in kept if address is not None]

    with ThreadPoolExecutor(32) as threads:
        addresses = [address for kept in threads.map(work, range(32)) for address in kept]
    assert len(addresses) == len(set(addresses)) == 32 * 66
    assert _stats(pool) == (4094, 1, 32 * 66, 4093 - 32 * 66)


def test_one_address_that_all_threads_want_goes_to_one() -> None:
    pool = IPPoolManager("10.0.0.0/30", ["10.0.0.1"])
    barrier = Barrier(32)

    def work(thread: int) -> str | None:
        barrier.wait()
        try:
            return pool.allocate_ip(str(thread))
        except IPPoolExhaustedError:
            return None

    with ThreadPoolExecutor(32) as threads:
        results = list(threads.map(work, range(32)))
    assert results.count("10.0.0.2") == 1
    assert results.count(None) == 31


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_slash_eight_is_not_materialised() -> None:
    before = _resident_bytes()
    pools = [IPPoolManager("10.0.0.0/8", ["10.0.0.1"]) for _ in range(20)]
    for pool in pools:
        pool.set_operators(_networks("10.0.0.0/9"))
        assert pool.allocate_ip("a") == "10.128.0.0"
    # A bit for each address would be 2 MiB.
    assert (_resident_bytes() - before) / len(pools) < 200_000
    assert _stats(pool) == (2**24 - 2, 2**23 - 1, 1, 2**23 - 2)


def _events(work: Callable[[], Any]) -> int:
    """Count the calls that a piece of work makes, Python's and C's."""
    count = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_work_does_not_grow_with_the_fill() -> None:
    pool = IPPoolManager("10.0.0.0/16", ["10.0.0.1"])

    def round_trip(peer: str) -> None:
        pool.allocate_ip(peer)
        pool.get_pool_stats()
        pool.deallocate_ip(peer)
        pool.adopt(peer, IPv4Address("10.0.255.250"))
        pool.deallocate_ip(peer)

    empty = _events(lambda: round_trip("probe"))
    for number in range(65_000):
        pool.allocate_ip(f"peer{number}")
    # Anything that looked at each address, or at each node of 256, would be far beyond.
    assert _events(lambda: round_trip("probe")) <= empty + 20


_SIZE = 2**17
_EDGES = st.sampled_from(
    [0, 1, 255, 256, 257, 511, 512, 65_535, 65_536, 65_537, 66_000, _SIZE - 2, _SIZE - 1]
)


@tried(30)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("adopt"), _EDGES),
            st.tuples(st.just("deallocate"), _EDGES),
            st.tuples(st.integers(16, 32), _EDGES),
        ),
        max_size=12,
    )
)
def test_the_lowest_free_address_of_a_large_pool_is_the_one_that_a_search_finds(
    steps: list[tuple[str | int, int]],
) -> None:
    pool = IPPoolManager("10.0.0.0/15")
    ours = set[int]()
    networks = list[IPv4Network]()
    for step, offset in steps:
        address = pool.network[offset]
        if isinstance(step, int):
            networks.append(IPv4Network((int(address), step), strict=False))
            pool.set_operators(networks)
        elif step == "adopt" and offset not in ours:
            pool.adopt(str(offset), address)
            ours.add(offset)
        elif step == "deallocate" and offset in ours:
            pool.deallocate_ip(str(offset))
            ours.remove(offset)
    taken = bytearray(_SIZE)
    for network in networks:
        start = int(network.network_address - int(pool.network.network_address))
        taken[start : start + network.num_addresses] = b"\1" * network.num_addresses
    for offset in (0, _SIZE - 1, *ours):
        taken[offset] = 1
    assert pool.available_count() == taken.count(0)
    lowest = taken.find(0)
    if lowest < 0:
        with pytest.raises(IPPoolExhaustedError):
            pool.allocate_ip("next")
    else:
        assert pool.allocate_ip("next") == str(pool.network[lowest])


class _PoolAgainstModel(RuleBasedStateMachine):
    """The pool beside a model that keeps three plain collections and looks through all of them."""

    @initialize(prefix=st.integers(26, 30), reserved=st.sets(st.integers(0, 63)))
    def start(self, prefix: int, reserved: Iterable[int]) -> None:
        self.network = IPv4Network(f"10.9.8.0/{prefix}")
        self.size = self.network.num_addresses
        self.reserved = {self.network[offset] for offset in reserved if offset < self.size}
        self.operators: set[IPv4Address] = set()
        self.held: dict[str, IPv4Address] = {}
        self.pool = IPPoolManager(self.network, map(str, self.reserved))
        self.names = (f"peer{number}" for number in range(10**6))

    def _free(self) -> list[IPv4Address]:
        taken = self.reserved | self.operators | set(self.held.values())
        return [address for address in self.network.hosts() if address not in taken]

    @rule()
    def allocate(self) -> None:
        name, free = next(self.names), self._free()
        if free:
            assert self.pool.allocate_ip(name) == str(free[0])
            self.held[name] = free[0]
        else:
            with pytest.raises(IPPoolExhaustedError):
                self.pool.allocate_ip(name)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def deallocate(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.held)))
        self.pool.deallocate_ip(name)
        del self.held[name]

    @rule(offset=st.integers(-3, 70))
    def adopt(self, offset: int) -> None:
        name, address = next(self.names), self.network.network_address + offset
        if address in self.held.values():
            with pytest.raises(ValueError, match="is held by"):
                self.pool.adopt(name, address)
        else:
            self.pool.adopt(name, address)
            self.held[name] = address

    @rule(networks=st.lists(st.tuples(st.integers(-4, 70), st.integers(23, 32)), max_size=5))
    def set_operators(self, networks: list[tuple[int, int]]) -> None:
        held = [
            IPv4Network((self.network.network_address + offset, prefix), strict=False)
            for offset, prefix in networks
        ]
        self.pool.set_operators(held)
        self.operators = {
            address
            for address in self.network
            for network in held
            if address in network and not self.network.subnet_of(network)
        }

    @invariant()
    def figures_and_answers_agree(self) -> None:
        usable, held = set(self.network.hosts()), set(self.held.values())
        stats = self.pool.get_pool_stats()
        assert stats == {
            "total_addresses": len(usable),
            "reserved_addresses": len(usable & (self.reserved | self.operators) - held),
            "allocated_addresses": len(usable & held),
            "available_addresses": len(self._free()),
            "utilization_percent": len(usable & held) * 100 // len(usable),
        }
        assert self.pool.available_count() == stats["available_addresses"]
        for address in self.network:
            assert self.pool.is_allocated(str(address)) == (address in held)
            assert self.pool.is_operators(address) == (address in self.operators)
        for name, address in self.held.items():
            assert self.pool.get_allocated_ip(name) == str(address)


_PoolAgainstModel.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPoolAgainstModel = _PoolAgainstModel.TestCase
