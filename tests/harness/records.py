"""Changes of peers, for tests that write to the records themselves."""

from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from backend.adapters.records import tables
from backend.adapters.records.database import IN_MEMORY, Database
from backend.models.wireguard.keys import WireGuardKey
from backend.models.wireguard.peer import Change, Peer, PeerState
from backend.models.wireguard.provisioning import NodeCapabilities
from tests.harness.peers import NOON
from tests.harness.requests import new_key


def adding(node_id: str, address: str, key: str | None = None, token_id: str | None = None) -> Change:
    """Return the change that adds a peer, with all that its node says of itself."""
    peer = Peer(
        node_id=node_id,
        public_key="libp2p",
        wireguard_public_key=WireGuardKey.parse(key or new_key()),
        address=IPv4Address(address),
        provisioned_at=NOON,
        token_id=token_id,
        version="1.0.0",
        capabilities=NodeCapabilities(models=["llama-2-7b"]).model_dump(mode="json"),
        metadata={"nul": "\x00", "deep": [{"a": None}]},
    )
    return Change(None, peer)


def removing(peer: Peer) -> Change:
    """Return the change that removes a peer."""
    return Change(peer, None)


def altering(peer: Peer, **said: Any) -> Change:
    """Return the change that writes what a peer's node says of itself."""
    return Change(peer, replace(peer, **said))


def states(database: Database) -> dict[str, PeerState]:
    """Return the state of each row of a peer, by node_id, in the order of the file."""
    with database.engine.connect() as connection:
        rows = connection.execute(
            sa.select(tables.peers.c.node_id, tables.peers.c.state).order_by(tables.peers.c.sequence)
        )
        return {node_id: PeerState(state) for node_id, state in rows}


def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of a new database: of "file", "memory" or "postgresql", a fixture's parameter."""
    if request.param == "memory":
        return IN_MEMORY
    if request.param == "file":
        return f"sqlite:///{tmp_path}/state/provisioning.sqlite"
    url: str = request.getfixturevalue("postgres_database")
    return url
