"""Several hubs: a table of them, the hub of each row, and how far a peer's newest change has come."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_NAMING = {"uq": "uq_%(table_name)s_%(column_0_name)s", "fk": "fk_%(table_name)s_%(column_0_name)s"}
# Beside `peers`.
_TABLES = ("removed_peers", "notices")
_UNSETTLED = sa.text("state <> 'active'")


def upgrade() -> None:
    """Make the one hub that there was the first of `hubs`. All peers are its own, and active.

    A start brings the hub up to all records, so it makes no difference that some were not applied yet.
    """
    hubs = op.create_table(
        "hubs",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(15), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("observed_generation", sa.BigInteger(), nullable=False),
        sa.Column("decision", sa.String(8), nullable=True),
        sa.Column("decision_basis", sa.String(64), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_hubs")),
        sa.UniqueConstraint("name", name=op.f("uq_hubs_name")),
    )
    before = sa.table(
        "hub_state", *map(sa.column, ("generation", "applied_generation", "decision", "decision_basis"))
    )
    op.execute(
        sa.insert(hubs).from_select(
            ["id", "name", "generation", "observed_generation", "decision", "decision_basis"],
            sa.select(sa.literal(1), sa.literal(""), *before.c),
        )
    )
    op.drop_table("hub_state")
    with op.batch_alter_table("peers", naming_convention=_NAMING) as peers:
        peers.add_column(sa.Column("hub", sa.Integer(), nullable=False, server_default=sa.text("1")))
        peers.add_column(sa.Column("state", sa.String(8), nullable=False, server_default="active"))
        peers.alter_column("assigned_ip", existing_type=sa.String(15), type_=sa.String(39))
        peers.drop_constraint("uq_peers_assigned_ip", type_="unique")
        peers.create_unique_constraint(op.f("uq_peers_hub"), ["hub", "assigned_ip"])
        peers.create_foreign_key(op.f("fk_peers_hub"), "hubs", ["hub"], ["id"])
    with op.batch_alter_table("peers") as peers:
        # For the rows that were there alone.
        peers.alter_column("hub", existing_type=sa.Integer(), server_default=None)
        peers.alter_column("state", existing_type=sa.String(8), server_default=None)
    for table in _TABLES:
        with op.batch_alter_table(table) as rows:
            rows.add_column(sa.Column("hub", sa.Integer(), nullable=False, server_default=sa.text("1")))
            rows.create_foreign_key(op.f(f"fk_{table}_hub"), "hubs", ["hub"], ["id"])
        with op.batch_alter_table(table) as rows:
            rows.alter_column("hub", existing_type=sa.Integer(), server_default=None)
    op.create_index(
        "ix_peers_unsettled",
        "peers",
        ["hub", "generation"],
        sqlite_where=_UNSETTLED,
        postgresql_where=_UNSETTLED,
    )


def downgrade() -> None:
    """Go back to the one before, which knows one hub and no peers whose removal is under way."""
    op.drop_index("ix_peers_unsettled", "peers")
    for table in _TABLES:
        op.execute(f"DELETE FROM {table} WHERE hub <> 1")  # noqa: S608 - a name of ours
        with op.batch_alter_table(table) as rows:
            rows.drop_constraint(op.f(f"fk_{table}_hub"), type_="foreignkey")
            rows.drop_column("hub")
    # A hub that is not rid of them yet knows them by their keys.
    op.execute(
        "INSERT INTO removed_peers (wireguard_public_key, node_id, generation, removed_at) "
        "SELECT wireguard_public_key, node_id, generation, CURRENT_TIMESTAMP FROM peers "
        "WHERE state = 'removing' AND wireguard_public_key NOT IN "
        "(SELECT wireguard_public_key FROM removed_peers)"
    )
    op.execute("DELETE FROM answers WHERE node_id IN (SELECT node_id FROM peers WHERE state = 'removing')")
    op.execute("DELETE FROM peers WHERE hub <> 1 OR state = 'removing'")
    with op.batch_alter_table("peers", naming_convention=_NAMING) as peers:
        peers.drop_constraint(op.f("fk_peers_hub"), type_="foreignkey")
        peers.drop_constraint(op.f("uq_peers_hub"), type_="unique")
        peers.create_unique_constraint(op.f("uq_peers_assigned_ip"), ["assigned_ip"])
        peers.alter_column("assigned_ip", existing_type=sa.String(39), type_=sa.String(15))
        peers.drop_column("state")
        peers.drop_column("hub")
    hub_state = op.create_table(
        "hub_state",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("applied_generation", sa.BigInteger(), nullable=False),
        sa.Column("decision", sa.String(8), nullable=True),
        sa.Column("decision_basis", sa.String(64), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_hub_state")),
        sa.CheckConstraint("id = 1", name=op.f("ck_hub_state_single")),
    )
    hubs = sa.table(
        "hubs", *map(sa.column, ("id", "generation", "observed_generation", "decision", "decision_basis"))
    )
    op.execute(
        sa.insert(hub_state).from_select(
            ["id", "generation", "applied_generation", "decision", "decision_basis"],
            sa.select(*hubs.c).where(hubs.c.id == 1),
        )
    )
    op.drop_table("hubs")
