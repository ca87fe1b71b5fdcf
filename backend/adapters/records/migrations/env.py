"""Alembic's entry: runs the migrations over the connection that it is given."""

from alembic import context

from backend.adapters.records.tables import metadata

connection = context.config.attributes["connection"]
if connection.dialect.name == "sqlite":
    # All or nothing: the driver would commit each table by itself, and a crash leave some of them.
    connection.exec_driver_sql("BEGIN IMMEDIATE")
# Every table is in the same metadata, once the module that was written last is imported.
context.configure(connection=connection, target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
