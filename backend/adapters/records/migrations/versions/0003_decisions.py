"""What an operator decided where records and hub don't fit, what was removed on the record, and notices."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the two tables, and the columns for a decision."""
    op.add_column("hub_state", sa.Column("decision", sa.String(8), nullable=True))
    op.add_column("hub_state", sa.Column("decision_basis", sa.String(64), nullable=True))
    op.create_table(
        "removed_peers",
        sa.Column("wireguard_public_key", sa.String(44), nullable=False),
        sa.Column("node_id", sa.String(128), nullable=False),
        sa.Column("generation", sa.BigInteger(), nullable=False),
        sa.Column("removed_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("wireguard_public_key", name=op.f("pk_removed_peers")),
    )
    op.create_index("ix_removed_peers_removed_at", "removed_peers", ["removed_at"])
    op.create_table(
        "notices",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_notices")),
    )


def downgrade() -> None:
    """Go back to the one before."""
    op.drop_table("notices")
    op.drop_table("removed_peers")
    op.drop_column("hub_state", "decision_basis")
    op.drop_column("hub_state", "decision")
