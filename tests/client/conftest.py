"""A hub, a node, and a client that doesn't sleep between its tries."""

from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from backend.client.node import Client, Node
from backend.models.wireguard.keys import WireGuardPrivateKey
from tests.harness.joining_hub import TOKEN, Hub, Naps


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    try:
        yield hub
    finally:
        hub.close()


@pytest.fixture
def node() -> Node:
    return Node("swarm-node-001", Ed25519PrivateKey.generate(), WireGuardPrivateKey.generate().reveal())


@pytest.fixture
def naps() -> Naps:
    return Naps()


@pytest.fixture
def client(hub: Hub, naps: Naps) -> Client:
    return Client(hub.url, TOKEN, sleep=naps)
