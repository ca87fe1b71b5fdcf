"""Many clients at once, over real sockets."""

import asyncio
from collections import Counter
from itertools import count
from pathlib import Path

import pytest

from tests.harness.crowds import post_all
from tests.harness.requests import new_key, provision_body
from tests.harness.service import StartService
from tests.harness.three_places import assert_in_step, settings_for
from tests.harness.wireguard import HubInterface


@pytest.mark.parametrize("nodes", [400, pytest.param(2000, marks=pytest.mark.torture(only=True))])
def test_concurrent_provisions_get_distinct_addresses(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path, nodes: int
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path, WIREGUARD_IP_POOL="10.0.0.0/20"))
    bodies = iter([provision_body(f"node-{number}") for number in range(nodes)])
    answers = asyncio.run(post_all(service, bodies, clients=64))
    assert Counter(answer.status_code for answer in answers) == {200: nodes}
    addresses = {answer.json()["config"]["assigned_ip"] for answer in answers}
    assert len(addresses) == nodes
    assert set(assert_in_step(service, hub_interface).values()) == addresses


def test_one_of_many_concurrent_requests_for_a_node_or_a_key_succeeds(
    hub_interface: HubInterface, start_service: StartService, tmp_path: Path
) -> None:
    service = start_service(settings_for(hub_interface, tmp_path))
    numbers = count()
    for race in range(10):
        name, key = f"one-name-{race}", new_key()
        same_name = [provision_body(name) for _ in range(8)]
        same_key = [provision_body(f"one-key-{next(numbers)}", key) for _ in range(8)]
        for bodies in (same_name, same_key):
            answers = asyncio.run(post_all(service, iter(bodies), clients=8))
            assert Counter(answer.status_code for answer in answers) == {200: 1, 409: 7}
    assert len(assert_in_step(service, hub_interface)) == 20
