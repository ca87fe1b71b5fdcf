"""Credentials, the audit log, answers that are given again, and nonces."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# A slip, such as tidying the wrong table, is refused here; who means to change the log is found out by
# its chain of hashes.
_APPEND_ONLY = {
    "sqlite": tuple(
        f"CREATE TRIGGER audit_refuses_{event.lower()} BEFORE {event} ON audit "
        "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
        for event in ("UPDATE", "DELETE")
    ),
    "postgresql": (
        """
        CREATE FUNCTION audit_is_append_only() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE EXCEPTION 'the audit log is append-only'; END $$
        """,
        """
        CREATE TRIGGER audit_is_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit
        FOR EACH STATEMENT EXECUTE FUNCTION audit_is_append_only()
        """,
    ),
}


def upgrade() -> None:
    """Go on to this revision."""
    op.add_column("peers", sa.Column("token_id", sa.String(16), nullable=True))
    op.create_table(
        "credentials",
        sa.Column("id", sa.String(16), nullable=False),
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("role", sa.String(8), nullable=True),
        sa.Column("secret_hash", sa.String(64), nullable=False),
        sa.Column("note", sa.String(256), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_by", sa.String(256), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("max_uses", sa.Integer(), nullable=True),
        sa.Column("uses", sa.Integer(), nullable=False),
        sa.Column("node_id_pattern", sa.String(128), nullable=True),
        sa.Column("source_cidr", sa.String(43), nullable=True),
        sa.Column("ephemeral", sa.Boolean(), nullable=False),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_credentials")),
        sa.CheckConstraint(
            "(kind = 'token' AND role IS NULL AND max_uses IS NOT NULL) OR "
            "(kind = 'key' AND role IS NOT NULL AND role IN ('read', 'operate', 'admin') "
            "AND max_uses IS NULL)",
            name=op.f("ck_credentials_kind"),
        ),
        sa.CheckConstraint(
            "uses >= 0 AND (max_uses IS NULL OR uses <= max_uses)", name=op.f("ck_credentials_uses")
        ),
    )
    access_state = op.create_table(
        "access_state",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("credentials_version", sa.BigInteger(), nullable=False),
        sa.Column("audit_sequence", sa.BigInteger(), nullable=False),
        sa.Column("audit_hash", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_access_state")),
        sa.CheckConstraint("id = 1", name=op.f("ck_access_state_single")),
    )
    op.bulk_insert(
        access_state, [{"id": 1, "credentials_version": 0, "audit_sequence": 0, "audit_hash": "0" * 64}]
    )
    op.create_table(
        "audit",
        sa.Column(
            "sequence",
            sa.BigInteger().with_variant(sa.Integer, "sqlite"),
            autoincrement=False,
            nullable=False,
        ),
        sa.Column("at", sa.String(32), nullable=False),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("outcome", sa.String(16), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("subject", sa.Text(), nullable=True),
        sa.Column("source", sa.Text(), nullable=True),
        sa.Column("request_id", sa.Text(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("previous_hash", sa.String(64), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_audit")),
    )
    for statement in _APPEND_ONLY[op.get_bind().dialect.name]:
        op.execute(statement)
    op.create_table(
        "answers",
        sa.Column("scope", sa.String(128), nullable=False),
        sa.Column("key_hash", sa.String(64), nullable=False),
        sa.Column("body_hash", sa.String(64), nullable=False),
        sa.Column("node_id", sa.String(128), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("scope", "key_hash", name=op.f("pk_answers")),
    )
    op.create_index("ix_answers_node_id", "answers", ["node_id"])
    op.create_index("ix_answers_created_at", "answers", ["created_at"])
    op.create_table(
        "nonces",
        sa.Column("identity", sa.String(128), nullable=False),
        sa.Column("nonce", sa.String(128), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("identity", "nonce", name=op.f("pk_nonces")),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_nonces_expires_at", "nonces", ["expires_at"])


def downgrade() -> None:
    """Go back to the one before."""
    for table in ("nonces", "answers", "audit", "access_state", "credentials"):
        op.drop_table(table)
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION audit_is_append_only()")
    op.drop_column("peers", "token_id")
