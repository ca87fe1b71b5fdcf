"""The tables of the hub and its peers."""

from datetime import UTC, datetime
from typing import Final

import sqlalchemy as sa

from backend.models.wireguard.peer import PeerState

NAMING: Final = {
    "pk": "pk_%(table_name)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
}


class UtcDateTime(sa.TypeDecorator[datetime]):
    """An aware datetime in UTC, also where the database (SQLite) forgets the zone."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:  # noqa: ARG002 - the base class's
        """Store UTC."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:  # noqa: ARG002 - the base class's
        """Return UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


metadata: Final = sa.MetaData(naming_convention=NAMING)

hubs: Final = sa.Table(
    "hubs",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    # The interface.
    sa.Column("name", sa.String(15), nullable=False, unique=True),
    # The newest desired state, and the newest that file and interface are known to have had.
    sa.Column("generation", sa.BigInteger(), nullable=False),
    sa.Column("observed_generation", sa.BigInteger(), nullable=False),
    # An operator's decision about peers that the records don't know, until it is carried out.
    sa.Column("decision", sa.String(8), nullable=True),
    # Which unknown peers the operator was shown (removal_guard.fingerprint).
    sa.Column("decision_basis", sa.String(64), nullable=True),
)

peers: Final = sa.Table(
    "peers",
    metadata,
    # The order in which the peers were added, which is their order in the file.
    sa.Column("sequence", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("node_id", sa.String(128), nullable=False, unique=True),
    sa.Column("wireguard_public_key", sa.String(44), nullable=False, unique=True),
    sa.Column("assigned_ip", sa.String(39), nullable=False),
    sa.Column("public_key", sa.String(256), nullable=False),
    sa.Column("provisioned_at", UtcDateTime(), nullable=False),
    sa.Column("version", sa.String(256), nullable=False),
    sa.Column("capabilities", sa.JSON(), nullable=False),
    sa.Column("metadata", sa.JSON(none_as_null=True), nullable=True),
    # The hub's generation that added the peer or, where it is being removed, removes it.
    sa.Column("generation", sa.BigInteger(), nullable=False),
    # The enrolment token that the node was provisioned with, if it was one.
    sa.Column("token_id", sa.String(16), nullable=True),
    sa.Column("hub", sa.Integer, sa.ForeignKey("hubs.id"), nullable=False),
    # A PeerState.
    sa.Column("state", sa.String(8), nullable=False),
    sa.UniqueConstraint("hub", "assigned_ip"),
)
# Few rows at a time: those whose newest change is not known to be on the hub.
UNDER_WAY: Final = sa.text(f"state <> '{PeerState.ACTIVE}'")
sa.Index(
    "ix_peers_unsettled",
    peers.c.hub,
    peers.c.generation,
    sqlite_where=UNDER_WAY,
    postgresql_where=UNDER_WAY,
)

# Tombstones: a reconciliation may remove a peer with one of these keys from the hub.
removed_peers: Final = sa.Table(
    "removed_peers",
    metadata,
    sa.Column("wireguard_public_key", sa.String(44), primary_key=True),
    sa.Column("node_id", sa.String(128), nullable=False),
    # The hub's generation that removed the peer.
    sa.Column("generation", sa.BigInteger(), nullable=False),
    sa.Column("removed_at", UtcDateTime(), nullable=False),
    sa.Column("hub", sa.Integer, sa.ForeignKey("hubs.id"), nullable=False),
    sa.Index("ix_removed_peers_removed_at", "removed_at"),
)

# At which address and port a peer was seen last, so that a new interface can reach it.
peer_endpoints: Final = sa.Table(
    "peer_endpoints",
    metadata,
    sa.Column(
        "peer",
        sa.BigInteger().with_variant(sa.Integer, "sqlite"),
        sa.ForeignKey("peers.sequence", ondelete="CASCADE"),
        primary_key=True,
        autoincrement=False,
    ),
    # As `wg` prints it: [address%interface]:port is the longest.
    sa.Column("endpoint", sa.String(64), nullable=False),
    sa.Column("seen_at", UtcDateTime(), nullable=False),
)

# What `/readyz` says until an operator has acknowledged it.
notices: Final = sa.Table(
    "notices",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("at", UtcDateTime(), nullable=False),
    sa.Column("text", sa.Text(), nullable=False),
    sa.Column("hub", sa.Integer, sa.ForeignKey("hubs.id"), nullable=False),
)
