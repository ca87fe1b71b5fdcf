"""The SQL of the peers' last endpoints. Each function runs in the given transaction."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from backend.adapters.records.tables import UtcDateTime, peer_endpoints, peers
from backend.models.wireguard.health import RecordedEndpoint

# Selects no row, so that nothing is written, for a peer that was removed meanwhile.
_ROW: Final = sa.select(
    peers.c.sequence,
    sa.bindparam("endpoint", type_=sa.String()),
    sa.bindparam("seen", type_=UtcDateTime()),
).where(peers.c.hub == sa.bindparam("on"), peers.c.wireguard_public_key == sa.bindparam("key"))
_INSERT: Final[dict[str, sqlite.Insert | postgresql.Insert]] = {
    "sqlite": sqlite.insert(peer_endpoints),
    "postgresql": postgresql.insert(peer_endpoints),
}
# Never an older one over a newer one: another process may have seen the peer since. One from the future is
# from a clock that was wrong, and would stay for good.
_SAVE: Final = {
    dialect: insert.from_select(["peer", "endpoint", "seen_at"], _ROW).on_conflict_do_update(
        index_elements=["peer"],
        set_={name: insert.excluded[name] for name in ("endpoint", "seen_at")},
        where=(peer_endpoints.c.seen_at <= insert.excluded.seen_at)
        | (peer_endpoints.c.seen_at > sa.bindparam("now", type_=UtcDateTime())),
    )
    for dialect, insert in _INSERT.items()
}
_LOAD: Final = (
    sa.select(peers.c.wireguard_public_key, peer_endpoints.c.endpoint, peer_endpoints.c.seen_at)
    .join(peers, peers.c.sequence == peer_endpoints.c.peer)
    .where(peers.c.hub == sa.bindparam("on"))
)


def load(connection: sa.Connection, hub: int) -> dict[str, RecordedEndpoint]:
    """Return a hub's endpoints by WireGuard key."""
    rows = connection.execute(_LOAD, {"on": hub})
    return {key: RecordedEndpoint(endpoint, seen_at) for key, endpoint, seen_at in rows}


def save(connection: sa.Connection, hub: int, endpoints: Mapping[str, RecordedEndpoint]) -> None:
    """Write endpoints by WireGuard key; skip those of unknown peers, and those that are older."""
    now = datetime.now(UTC)
    rows = [
        {"on": hub, "key": key, "endpoint": recorded.endpoint, "seen": recorded.seen_at, "now": now}
        for key, recorded in endpoints.items()
    ]
    connection.execute(_SAVE[connection.dialect.name], rows)
