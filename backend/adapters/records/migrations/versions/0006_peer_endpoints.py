"""The endpoints that peers were seen at last."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table, empty: the interface knows the endpoints."""
    op.create_table(
        "peer_endpoints",
        sa.Column(
            "peer",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=False,
            nullable=False,
        ),
        sa.Column("endpoint", sa.String(64), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["peer"], ["peers.sequence"], name=op.f("fk_peer_endpoints_peer"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("peer", name=op.f("pk_peer_endpoints")),
    )


def downgrade() -> None:
    """Drop the table: without it a hub that was restarted waits for its peers, as it did before."""
    op.drop_table("peer_endpoints")
