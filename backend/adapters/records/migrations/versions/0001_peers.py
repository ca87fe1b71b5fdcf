"""Peers, and the hub's state."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go on to this revision."""
    op.create_table(
        "peers",
        sa.Column("sequence", sa.BigInteger().with_variant(sa.Integer, "sqlite"), nullable=False),
        sa.Column("node_id", sa.String(128), nullable=False),
        sa.Column("wireguard_public_key", sa.String(44), nullable=False),
        sa.Column("assigned_ip", sa.String(15), nullable=False),
        sa.Column("public_key", sa.String(256), nullable=False),
        sa.Column("provisioned_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("version", sa.String(256), nullable=False),
        sa.Column("capabilities", sa.JSON(), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=True),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("sequence", name="pk_peers"),
        sa.UniqueConstraint("node_id", name="uq_peers_node_id"),
        sa.UniqueConstraint("wireguard_public_key", name="uq_peers_wireguard_public_key"),
        sa.UniqueConstraint("assigned_ip", name="uq_peers_assigned_ip"),
    )
    hub_state = op.create_table(
        "hub_state",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("applied_generation", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_hub_state"),
        sa.CheckConstraint("id = 1", name="ck_hub_state_single"),
    )
    op.bulk_insert(hub_state, [{"id": 1, "generation": 0, "applied_generation": 0}])


def downgrade() -> None:
    """Go back to the one before."""
    op.drop_table("hub_state")
    op.drop_table("peers")
