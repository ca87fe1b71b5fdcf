"""A SQLite and a PostgreSQL database for each test, empty or with the current schema."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from backend.adapters.records.database import Database


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/state/records.sqlite"
    address: str = request.getfixturevalue("postgres_database")
    return address


@pytest.fixture
def unmigrated(url: str) -> Iterator[Database]:
    opened = Database(url)
    yield opened
    opened.close()


@pytest.fixture
def engine(unmigrated: Database) -> sa.Engine:
    unmigrated.migrate()
    return unmigrated.engine
