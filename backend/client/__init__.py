"""What a node needs to join, for other programs to use or to imitate.

    from backend.client import Client, Node

    node = Node("swarm-node-001", identity_private_key, wireguard_private_key)
    configuration = Client("https://hub.example.com", token).provision(node, version="1.0.0")
    print(configuration.wg_quick(node.wireguard_private_key))

What the hub or the network may do to it is a JoinError; a ValueError is the caller's own mistake.
"""

from backend.client.configuration import Configuration
from backend.client.errors import AnswerError, JoinError, RefusedError, UnreachableError
from backend.client.node import Client, Node

__all__ = [
    "AnswerError",
    "Client",
    "Configuration",
    "JoinError",
    "Node",
    "RefusedError",
    "UnreachableError",
]
