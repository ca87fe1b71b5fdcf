"""What a request is told that meets a peer which is there already, and what it can't find out."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from backend import errors
from backend.models.access.callers import SERVICE, Caller
from backend.models.access.identity import NodeIdentity
from tests.harness.core import World, request
from tests.harness.patience import WAIT
from tests.harness.requests import new_key

KNOWN: Final = "node-known"
UNKNOWN: Final = "node-unknown"


class Hub(World):
    """A hub with a peer, KNOWN, that its own token added, another one, and an operator's."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.identity = NodeIdentity(Ed25519PrivateKey.generate().public_key().public_bytes_raw())
        self.key, self.anothers, self.operators = new_key(), new_key(), new_key()
        self.its_token = self.token()
        self.append(self.operators, "10.0.0.99/32")

    def ask(self, node_id: str, key: str, caller: Caller, public_key: str | None = None) -> None:
        body = request(node_id, key, public_key=public_key or self.identity.peer_id)
        self.submit(body, caller).result(WAIT)

    def refusal(
        self, node_id: str, key: str, caller: Caller, public_key: str | None = None
    ) -> errors.ProvisioningError:
        """Return why it is refused, and check that nothing came of it."""
        before = self.text, self.service.get_pool_stats()
        with pytest.raises(errors.ProvisioningError) as refused:
            self.ask(node_id, key, caller, public_key)
        assert (self.text, self.service.get_pool_stats()) == before
        return refused.value

    def told(
        self, node_id: str, key: str, caller: Caller, public_key: str | None = None
    ) -> Mapping[str, object]:
        refused = self.refusal(node_id, key, caller, public_key)
        assert isinstance(refused, errors.DuplicatePeerError)
        return refused.existing_config


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    hub = Hub(tmp_path)
    try:
        hub.start()
        hub.ask(KNOWN, hub.key, hub.its_token)
        hub.ask("node-2", hub.anothers, hub.token())
        yield hub
    finally:
        hub.stop()
        hub.records.database.close()


KEYS: Final[dict[str, Callable[[Hub], str]]] = {
    "the hub's": lambda hub: hub.hub_key,
    "an operator's peer's": lambda hub: hub.operators,
    "another peer's": lambda hub: hub.anothers,
    "the known peer's": lambda hub: hub.key,
}


@pytest.mark.parametrize("held", KEYS)
def test_a_key_that_cannot_be_provisioned_does_not_tell_which_names_are_there(hub: Hub, held: str) -> None:
    """Otherwise a token asks for any number of names, and keeps its use."""
    answers = {
        (type(refused), str(refused).replace(name, "node"), refused.args[1:])
        for name in (KNOWN, UNKNOWN)
        for refused in [hub.refusal(name, KEYS[held](hub), hub.token())]
    }
    assert len(answers) == 1


def test_an_address_is_told_to_the_peers_token_its_proven_identity_and_operators_alone(hub: Hub) -> None:
    address = {"node_id": KNOWN, "assigned_ip": "10.0.0.2"}
    stranger = NodeIdentity(Ed25519PrivateKey.generate().public_key().public_bytes_raw())
    whole = hub.service.get_peer_config(KNOWN).model_dump(mode="json")
    for caller, same, other_key in (
        (SERVICE, whole, address),
        (hub.its_token, whole, address),
        (replace(hub.token(), identity=hub.identity), whole, address),
        (replace(hub.token(), identity=stranger), {}, {}),
        (hub.token(), {}, {}),
    ):
        assert hub.told(KNOWN, hub.key, caller) == same
        assert hub.told(KNOWN, new_key(), caller) == other_key


def test_another_public_key_alone_keeps_the_configuration_from_all_but_the_address(hub: Hub) -> None:
    address = {"node_id": KNOWN, "assigned_ip": "10.0.0.2"}
    for caller, expected in ((SERVICE, address), (hub.its_token, address), (hub.token(), {})):
        assert hub.told(KNOWN, hub.key, caller, "another") == expected


def test_a_name_that_is_taken_is_called_so_where_the_address_is_not_told(hub: Hub) -> None:
    assert str(hub.refusal(KNOWN, new_key(), hub.token())) == f"Peer {KNOWN} is already provisioned"
    assert str(hub.refusal(UNKNOWN, hub.key, SERVICE)) == (
        f"The WireGuard public key sent for {UNKNOWN} is already provisioned"
    )


def test_a_known_node_that_sends_another_peers_key_is_told_of_neither(hub: Hub) -> None:
    for caller in (SERVICE, hub.its_token, hub.token()):
        assert hub.told(KNOWN, hub.anothers, caller) == {}


def test_a_token_that_is_used_up_is_not_told_of_a_key_either(hub: Hub) -> None:
    used = hub.token(max_uses=1)
    hub.ask("node-3", new_key(), used)
    for key in (hub.anothers, hub.operators, new_key()):
        for name in (KNOWN, UNKNOWN, "node-3"):
            refused = hub.refusal(name, key, used)
            assert isinstance(refused, errors.UnauthenticatedError)
            assert refused.audit_reason == "used_up"
