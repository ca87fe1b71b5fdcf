"""DBOS's pickles, none of which is read: to unpickle is to run what the pickle says.

DBOS pickles by default, and each row of its tables names its own decoder. So another serializer alone doesn't
keep an INSERT into the queue from running code in this process.
"""

from typing import Final, NoReturn

import sqlalchemy as sa

_SCHEMA: Final = "dbos"
# DBOS's tables whose rows name their decoder.
_DECODED: Final = (
    "workflow_status",
    "operation_outputs",
    "notifications",
    "workflow_events",
    "workflow_events_history",
    "streams",
)
# DBOS decodes these as the workflow's row in workflow_status says. No foreign key binds them to that.
_PAYLOADS: Final = ("workflow_input", "workflow_output")


class PickleRefusedError(Exception):
    """A row of DBOS's tables holds a pickle, which is never read."""

    def __str__(self) -> str:
        return str(self.__doc__)


def refuse_pickles() -> None:
    """Make every later attempt of DBOS to read a pickle in this process raise PickleRefusedError."""
    # The import takes long, and nothing before DBOS's launch needs it.
    from dbos._serialization import DefaultSerializer  # noqa: PLC0415 - see above

    # On the class: DBOS's own instance is used wherever a row names this decoder.
    setattr(DefaultSerializer, DefaultSerializer.deserialize.__name__, _refuse)


def _refuse(*_: object) -> NoReturn:
    raise PickleRefusedError


def delete_unreadable(engine: sa.Engine, serializer: str) -> None:
    """Delete, undecoded, what DBOS's tables hold from any other serializer, as an earlier version's pickles.

    Nothing is lost: the peers' records are in tables of their own, and each start brings the hub to them.
    """
    schema = _SCHEMA if engine.dialect.name == "postgresql" else None
    with engine.begin() as connection:
        found = sa.inspect(connection).get_multi_columns(schema, filter_names=[*_DECODED, *_PAYLOADS])
        # On the first start there are none.
        tables = {
            name: sa.table(name, *(sa.column(column["name"]) for column in columns), schema=schema)
            for (_, name), columns in found.items()
        }
        for name in set(_DECODED) & set(tables):
            rows = tables[name]
            connection.execute(sa.delete(rows).where(rows.c.serialization.is_distinct_from(serializer)))
        for name in set(_PAYLOADS) & set(tables):
            rows, workflows = tables[name], tables["workflow_status"]
            orphaned = rows.c.workflow_uuid.not_in(sa.select(workflows.c.workflow_uuid))
            connection.execute(sa.delete(rows).where(orphaned))
