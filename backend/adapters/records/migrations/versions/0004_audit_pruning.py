"""Where the audit log begins once its oldest rows were pruned; these alone may be deleted."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

# As 0002 has made it.
_REFUSE_ALL = {
    "sqlite": (
        "DROP TRIGGER audit_refuses_delete",
        """
        CREATE TRIGGER audit_refuses_delete BEFORE DELETE ON audit
        BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END
        """,
    ),
    "postgresql": (
        "DROP TRIGGER audit_refuses_delete ON audit",
        "DROP FUNCTION audit_refuses_delete()",
        "DROP TRIGGER audit_is_append_only ON audit",
        """
        CREATE TRIGGER audit_is_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit
        FOR EACH STATEMENT EXECUTE FUNCTION audit_is_append_only()
        """,
    ),
}
_REFUSE_BEHIND_THE_PRUNED = {
    "sqlite": (
        "DROP TRIGGER audit_refuses_delete",
        """
        CREATE TRIGGER audit_refuses_delete BEFORE DELETE ON audit
        WHEN OLD.sequence > (SELECT audit_pruned_sequence FROM access_state)
        BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END
        """,
    ),
    "postgresql": (
        "DROP TRIGGER audit_is_append_only ON audit",
        """
        CREATE TRIGGER audit_is_append_only BEFORE UPDATE OR TRUNCATE ON audit
        FOR EACH STATEMENT EXECUTE FUNCTION audit_is_append_only()
        """,
        """
        CREATE FUNCTION audit_refuses_delete() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN
            IF OLD.sequence > (SELECT audit_pruned_sequence FROM access_state) THEN
                RAISE EXCEPTION 'the audit log is append-only';
            END IF;
            RETURN OLD;
        END $$
        """,
        """
        CREATE TRIGGER audit_refuses_delete BEFORE DELETE ON audit
        FOR EACH ROW EXECUTE FUNCTION audit_refuses_delete()
        """,
    ),
}


def upgrade() -> None:
    """Add the columns, and let the triggers look at them."""
    op.add_column(
        "access_state",
        sa.Column("audit_pruned_sequence", sa.BigInteger(), nullable=False, server_default=sa.text("0")),
    )
    op.add_column(
        "access_state",
        sa.Column("audit_pruned_hash", sa.String(64), nullable=False, server_default="0" * 64),
    )
    for statement in _REFUSE_BEHIND_THE_PRUNED[op.get_bind().dialect.name]:
        op.execute(statement)


def downgrade() -> None:
    """Go back to the one before. Its `audit verify` misses the rows that were pruned."""
    for statement in _REFUSE_ALL[op.get_bind().dialect.name]:
        op.execute(statement)
    op.drop_column("access_state", "audit_pruned_hash")
    op.drop_column("access_state", "audit_pruned_sequence")
