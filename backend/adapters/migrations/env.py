"""Alembic's entry: runs the migrations over the connection that it is given."""

from alembic import context

from backend.adapters.records import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
