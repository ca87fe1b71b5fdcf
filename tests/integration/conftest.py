"""The records on each kind of database, with the current schema."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from backend.adapters.records.database import Database
from backend.adapters.records.unit_of_work import SqlRecords
from tests.harness.records import database_url


@pytest.fixture(params=["file", "memory", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return database_url(request, tmp_path)


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    database = Database(url)
    database.migrate()
    yield database
    database.close()


@pytest.fixture
def records(database: Database) -> SqlRecords:
    return SqlRecords(database)
